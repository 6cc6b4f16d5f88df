// The memory map: parts of tensors as squares, at the same position in each tier.

import { formatBytes, words } from "./format.js";
import { expandRuns } from "./state.js";

const CELL = 11;
const GAP = 2;
const ROWS = 9;
const IN_MEMORY = "rplw";
const STATES = {
  r: "in memory", p: "in memory, in use", l: "being read into memory", w: "being written to the SSD", s: "on SSD only",
  f: "freed",
};
const KINDS = ["weights", "kv_cache", "vision_features", "text_embeddings", "general"];

// Kinds have fixed colours; codecs get theirs in order of appearance.
export class Palette {
  constructor() {
    this.names = { kind: [...KINDS], codec: [] };
  }

  index(by, name) {
    const names = this.names[by];
    if (!names.includes(name)) names.push(name);
    return names.indexOf(name) % 8;
  }
}

export class MapView {
  constructor(palette) {
    this.palette = palette;
    this.canvases = { cpu: document.getElementById("map-cpu"), ssd: document.getElementById("map-ssd") };
    this.readout = document.getElementById("map-readout");
    this.colour = document.getElementById("colour");
    this.cells = [];
    this.before = new Map();
    this.drawn = [];
    for (const canvas of Object.values(this.canvases)) {
      canvas.addEventListener("pointermove", (event) => this.tell(canvas, event));
    }
  }

  // Repaints only after a change; `look` is everything else the drawing depends on.
  draw(sample, look) {
    const key = [sample.runs, sample.tensors, look, this.colour.value, this.canvases.cpu.clientWidth];
    if (key.every((part, i) => part === this.drawn[i])) return;
    this.drawn = key;
    const pages = this.pagesOf(sample);
    const total = pages.reduce((sum, page) => sum + page.bytes, 0);
    for (const [tier, canvas] of Object.entries(this.canvases)) {
      const columns = Math.max(1, Math.floor(canvas.clientWidth / (CELL + GAP)));
      this.cells = cellsOf(pages, total / (columns * ROWS));
      this.paint(tier, canvas, columns);
    }
    this.before = new Map(pages.map((page) => [page.key, page.state]));
  }

  pagesOf({ tensors, runs }) {
    const letters = expandRuns(runs);
    const pages = [];
    let start = 0;
    for (const tensor of tensors) {
      for (let i = 0; i < tensor.pages; i += 1) {
        const key = `${tensor.id}:${i}`;
        const state = letters[start + i] ?? "s";
        const moved = this.before.has(key) && IN_MEMORY.includes(this.before.get(key)) !== IN_MEMORY.includes(state);
        pages.push({ tensor, i, key, state, moved, bytes: tensor.bytes / tensor.pages });
      }
      start += tensor.pages;
    }
    return pages;
  }

  paint(tier, canvas, columns) {
    const ratio = window.devicePixelRatio || 1;
    const rows = Math.max(1, Math.ceil(this.cells.length / columns));
    const [width, height] = [canvas.clientWidth, rows * (CELL + GAP)];
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.height = `${height}px`;
    }
    const style = getComputedStyle(document.documentElement);
    const theme = (name) => style.getPropertyValue(name).trim();
    const [line, text, card] = ["--line", "--text", "--card"].map(theme);
    const colours = Array.from({ length: 8 }, (_, i) => theme(`--c${i}`));
    const by = this.colour.value;
    const brush = canvas.getContext("2d");
    brush.setTransform(ratio, 0, 0, ratio, 0, 0);
    brush.clearRect(0, 0, width, height);
    this.cells.forEach((page, i) => {
      const x = (i % columns) * (CELL + GAP) + 1;
      const y = Math.floor(i / columns) * (CELL + GAP) + 1;
      const moves = "lw".includes(page.state);
      const there = tier === "cpu" ? "rp".includes(page.state) : page.state === "s";
      brush.fillStyle = colours[this.palette.index(by, page.tensor[by])];
      if (there) brush.fillRect(x, y, CELL, CELL);
      if (moves) triangle(brush, x, y);
      if (there && page.state === "p") {
        brush.fillStyle = card;
        brush.fillRect(x + CELL / 2 - 2, y + CELL / 2 - 2, 4, 4);
      }
      brush.lineWidth = page.moved ? 2 : 1;
      brush.strokeStyle = page.moved && there ? text : line;
      if (!there || page.moved) brush.strokeRect(x + 0.5, y + 0.5, CELL - 1, CELL - 1);
    });
  }

  tell(canvas, event) {
    const box = canvas.getBoundingClientRect();
    const columns = Math.max(1, Math.floor(canvas.clientWidth / (CELL + GAP)));
    const column = Math.floor((event.clientX - box.left) / (CELL + GAP));
    const page = column < columns ? this.cells[column + columns * Math.floor((event.clientY - box.top) / (CELL + GAP))] : null;
    if (!page) return;
    const { tensor, i, state } = page;
    const which = tensor.pages > 1 ? `, page ${i + 1} of ${tensor.pages}` : "";
    this.readout.textContent =
      `${tensor.id} (${words(tensor.kind)}, codec ${tensor.codec}, ${formatBytes(tensor.bytes)}${which}): ${STATES[state]}`;
  }
}

// Each page gets squares in proportion to its size, at least one.
function cellsOf(pages, bytesPerCell) {
  const cells = [];
  for (const page of pages) {
    const count = Math.max(1, Math.round(page.bytes / (bytesPerCell || 1)));
    for (let i = 0; i < count; i += 1) cells.push(page);
  }
  return cells;
}

function triangle(brush, x, y) {
  brush.beginPath();
  brush.moveTo(x, y);
  brush.lineTo(x + CELL, y);
  brush.lineTo(x, y + CELL);
  brush.closePath();
  brush.fill();
}
