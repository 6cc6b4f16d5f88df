// SVG time charts, drawn from definitions sent by the server.

import { figureAt, format, formatTime, NOT_MEASURED, words } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 160;
const MARGIN = { left: 62, right: 8, top: 8, bottom: 20 };
const MOST_POINTS = 240;
const RATE_S = 2; // as in charts.py
const DASHES = ["", "6 3", "2 3", "9 3 2 3", "1 2", "12 4", "4 2 1 2", "8 2"];

function svg(name, attributes = {}) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

export const colourOf = (index) => `var(--c${index % 8})`;

// Every n-th item, counted from the end so that the latest is included.
export function everyNth(list, most) {
  const step = Math.ceil(list.length / most);
  return step <= 1 ? list : list.filter((_, i) => (list.length - 1 - i) % step === 0);
}

function labelsOf(path, samples) {
  const star = path.indexOf("*");
  if (star < 0) return [null];
  const seen = new Set();
  for (const { snapshot } of samples) {
    let table = snapshot;
    for (const key of path.slice(0, star)) table = table?.[key];
    for (const key of Object.keys(table ?? {})) seen.add(key);
  }
  return [...seen];
}

// Growth per second over the latest span of at least two seconds, or since the first point.
function rates(points) {
  let start = 0;
  return points.slice(1).map(({ t, value }) => {
    while (points[start + 1].t <= t - RATE_S) start += 1;
    const before = points[start];
    const known = before.value !== null && value !== null && t > before.t;
    return { t, value: known ? (value - before.value) / (t - before.t) : null };
  });
}

export function linesOf(chart, samples) {
  const lines = [];
  for (const { label, path, rate, optional } of chart.series) {
    const keys = path.split(".");
    for (const name of labelsOf(keys, samples)) {
      const exact = keys.map((key) => (key === "*" ? name : key));
      const points = samples.map(({ t, snapshot }) => ({ t, value: figureAt(snapshot, exact) }));
      if (optional && points.every(({ value }) => value === null)) continue;
      lines.push({ label: label.replace("{}", name), points: rate ? rates(points) : points });
    }
  }
  return lines;
}

function niceTop(value) {
  if (!(value > 0)) return 1;
  const scale = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * scale).find((top) => top >= value * 0.999);
}

export class ChartView {
  constructor(chart, parent) {
    this.chart = chart;
    this.node = document.createElement("article");
    this.node.className = "card chart";
    this.node.dataset.chart = chart.key;
    const title = document.createElement("h3");
    title.textContent = chart.title;
    const note = document.createElement("p");
    note.className = "note";
    note.textContent = chart.note;
    this.svg = svg("svg", { role: "img", preserveAspectRatio: "none" });
    this.legend = document.createElement("ul");
    this.legend.className = "legend";
    this.node.append(title, note, this.svg, this.legend);
    parent.append(this.node);
  }

  draw(all, cursorT) {
    const { chart } = this;
    const samples = everyNth(all, MOST_POINTS);
    const lines = linesOf(chart, samples);
    const width = this.svg.clientWidth || 400;
    const values = lines.flatMap((line) => line.points.map((point) => point.value)).filter((value) => value !== null);
    const parts = [];
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    if (!values.length) {
      const group = svg("g", { class: "absent" });
      const text = svg("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" });
      text.textContent = NOT_MEASURED;
      group.append(text);
      parts.push(group);
    } else {
      const stacked = chart.style === "stack";
      const top = stacked ? 1 : niceTop(Math.max(...values));
      const start = samples[0].t;
      const end = Math.max(samples[samples.length - 1].t, start + 1);
      const x = (t) => MARGIN.left + ((t - start) / (end - start)) * (width - MARGIN.left - MARGIN.right);
      const y = (value) => HEIGHT - MARGIN.bottom - (value / top) * (HEIGHT - MARGIN.top - MARGIN.bottom);
      parts.push(...this.axes(x, y, top, start, end, width));
      parts.push(...(stacked ? stack(lines, x, y) : chart.style === "bars" ? bars(lines, x, y) : paths(lines, x, y)));
      if (cursorT !== null && cursorT >= start && cursorT <= end) {
        const at = x(cursorT);
        parts.push(svg("line", { class: "cursor", x1: at, x2: at, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
      }
    }
    this.svg.replaceChildren(...parts);
    this.tell(lines, cursorT);
  }

  axes(x, y, top, start, end, width) {
    const parts = [];
    for (const share of [0, 0.5, 1]) {
      const at = y(share * top);
      parts.push(svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at }));
      const text = svg("text", { x: MARGIN.left - 6, y: at + 4, "text-anchor": "end" });
      text.textContent = format(share * top, this.chart.unit);
      parts.push(text);
    }
    for (const [t, anchor] of [[start, "start"], [end, "end"]]) {
      const text = svg("text", { x: x(t), y: HEIGHT - 5, "text-anchor": anchor });
      text.textContent = formatTime(t);
      parts.push(text);
    }
    return parts;
  }

  // Figures at the cursor, or the latest, as text, also for screen readers.
  tell(lines, cursorT) {
    const rows = lines.map((line, index) => {
      const until = cursorT === null ? line.points : line.points.filter((point) => point.t <= cursorT + 1e-6);
      const value = until.length ? until[until.length - 1].value : null;
      return { label: line.label, index, text: format(value, this.chart.unit), value };
    });
    this.svg.setAttribute("aria-label", `${this.chart.title}: ${rows.map((row) => `${words(row.label)} ${row.text}`).join(", ")}`);
    this.legend.replaceChildren(
      ...rows.map(({ label, index, text, value }) => {
        const item = document.createElement("li");
        const key = svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
        key.append(mark(this.chart.style, index));
        const figure = document.createElement("span");
        figure.textContent = `${words(label)}: ${text}`;
        figure.classList.toggle("absent", value === null);
        item.append(key, figure);
        return item;
      }),
    );
  }
}

function mark(style, index) {
  if (style !== "line") return svg("rect", { x: 8, width: 10, height: 10, fill: colourOf(index) });
  return svg("line", {
    x2: 26, y1: 5, y2: 5, stroke: colourOf(index), "stroke-width": 2.5, "stroke-dasharray": DASHES[index % 8],
  });
}

function paths(lines, x, y) {
  return lines.map(({ points }, index) => {
    let d = "";
    let pen = false;
    for (const { t, value } of points) {
      if (value !== null) d += `${pen ? "L" : "M"}${x(t).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = value !== null;
    }
    return svg("path", { class: "line", d, stroke: colourOf(index), "stroke-dasharray": DASHES[index % 8] });
  });
}

function bars(lines, x, y) {
  return lines.map(({ points }, index) => {
    let d = "";
    points.forEach(({ t, value }, i) => {
      if (!value) return;
      const left = i ? x(points[i - 1].t) : x(t) - 2;
      d += `M${left.toFixed(1)} ${y(0)}V${y(value).toFixed(1)}H${Math.max(x(t), left + 1).toFixed(1)}V${y(0)}Z`;
    });
    return svg("path", { d, fill: colourOf(index) });
  });
}

function stack(lines, x, y) {
  const base = new Map();
  return lines.map(({ points }, index) => {
    let d = "";
    points.forEach(({ t, value }, i) => {
      if (!value) return;
      const low = base.get(t) ?? 0;
      const high = Math.min(low + value, 1);
      base.set(t, high);
      const left = (i ? x(points[i - 1].t) : x(t) - 2).toFixed(1);
      d += `M${left} ${y(low).toFixed(1)}V${y(high).toFixed(1)}H${x(t).toFixed(1)}V${y(low).toFixed(1)}Z`;
    });
    return svg("path", { d, fill: colourOf(index) });
  });
}
