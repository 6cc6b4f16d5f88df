// The memory map by layer: how much of each part of the model is in memory, and how much streams from the SSD.

import { formatBytes, format, words } from "./format.js";
import { expandRuns } from "./state.js";

const IN_MEMORY = "rplw";
const LAYER = /\.layers\.(\d+)\./;
const PARTS = [
  ["Embedding", (id) => id.includes("embed_tokens")],
  ["Output head", (id) => id.includes("lm_head")],
  ["Vision tower", (id) => id.includes("visual.")],
];
const RUNTIME = { kv_cache: "Keys and values", vision_features: "Image features", text_embeddings: "Text embeddings" };

const byId = (id) => document.getElementById(id);

// The layer number of a decoder weight, else the name of its part.
export function partOf({ id, kind }) {
  if (kind !== "weights") return RUNTIME[kind] ?? "Other runtime tensors";
  if (id.includes("/")) return `Draft model (${id.slice(0, id.lastIndexOf("/"))})`;
  const part = PARTS.find(([, matches]) => matches(id));
  if (part) return part[0];
  const layer = id.match(LAYER);
  return layer ? Number(layer[1]) : "Other weights";
}

// Sums by part: {bytes, there, tensors}.
export function sumParts({ tensors, runs }) {
  const letters = expandRuns(runs);
  const parts = new Map();
  let start = 0;
  for (const tensor of tensors) {
    const name = partOf(tensor);
    const sum = parts.get(name) ?? { bytes: 0, there: 0, tensors: 0 };
    let pages = 0;
    for (let i = start; i < start + tensor.pages; i += 1) if (IN_MEMORY.includes(letters[i])) pages += 1;
    start += tensor.pages;
    sum.bytes += tensor.bytes;
    sum.there += tensor.pages ? (tensor.bytes * pages) / tensor.pages : 0;
    sum.tensors += 1;
    parts.set(name, sum);
  }
  return parts;
}

let drawn = [];

export function showLayers({ tensors, runs }) {
  if (drawn[0] === tensors && drawn[1] === runs) return;
  drawn = [tensors, runs];
  const parts = sumParts({ tensors, runs });
  const layers = [...parts].filter(([name]) => typeof name === "number").sort(([a], [b]) => a - b);
  const others = [...parts].filter(([name]) => typeof name !== "number").sort(([, a], [, b]) => b.bytes - a.bytes);
  byId("map-text").textContent = summaryOf(layers);
  while (byId("layers").children.length > layers.length) byId("layers").lastChild.remove();
  layers.forEach(([number, sum], index) => showLayer(index, number, sum));
  showOthers(others);
}

function summaryOf(layers) {
  if (!layers.length) return "No decoder layer is managed.";
  const whole = layers.filter(([, { bytes, there }]) => there >= bytes).length;
  const [bytes, there] = ["bytes", "there"].map((key) => layers.reduce((sum, [, part]) => sum + part[key], 0));
  const rest = bytes - there >= 1
    ? ` The rest, ${formatBytes(bytes - there)}, is read from the SSD when a pass needs it.`
    : "";
  return `${formatBytes(there)} of ${formatBytes(bytes)} of the decoder in memory; ${whole} of ${layers.length} layers entirely.${rest}`;
}

function showLayer(index, number, { bytes, there }) {
  const list = byId("layers");
  let item = list.children[index];
  if (!item) {
    item = document.createElement("li");
    const fill = Object.assign(document.createElement("span"), { className: "fill" });
    const label = document.createElement("b");
    const text = Object.assign(document.createElement("span"), { className: "hidden" });
    item.append(fill, label, text);
    list.append(item);
  }
  const [fill, label, text] = item.children;
  const share = bytes ? there / bytes : 0;
  fill.style.height = `${100 * share}%`;
  label.textContent = String(number);
  text.textContent = `: ${format(share, "share")} in memory`;
  item.title = `Layer ${number}: ${formatBytes(there)} of ${formatBytes(bytes)} in memory, ${formatBytes(bytes - there)} on the SSD only`;
  item.dataset.share = String(share);
}

function showOthers(others) {
  const rows = others.map(([name, { bytes, there }]) => {
    const row = document.createElement("tr");
    const head = Object.assign(document.createElement("th"), { scope: "row", textContent: words(name) });
    const bar = Object.assign(document.createElement("td"), { className: "bar-cell" });
    const meter = Object.assign(document.createElement("span"), { className: "meter" });
    const fill = document.createElement("span");
    fill.style.width = `${bytes ? (100 * there) / bytes : 0}%`;
    meter.append(fill);
    bar.append(meter);
    const text = Object.assign(document.createElement("td"), {
      className: "number", textContent: `${formatBytes(there)} of ${formatBytes(bytes)}`,
    });
    row.append(head, bar, text);
    return row;
  });
  byId("parts-table").replaceChildren(...rows);
}
