// The page: receives the records of a run and shows the sample at the cursor.

import { ChartView } from "./chart.js";
import { formatTime } from "./format.js";
import { showLayers } from "./layers.js";
import { MapView, Palette } from "./map.js";
import { showOverview } from "./overview.js";
import { showAbout, showBudget, showEvents, showTables, showTiers, showTiles } from "./panels.js";
import { RunState } from "./state.js";

const CHARTS_EVERY_MS = 2000;
const PLAY_EVERY_MS = 200;
const THEME = "qwen3vl-mem-theme";

const byId = (id) => document.getElementById(id);
const palette = new Palette();
const map = new MapView(palette);
const visible = new Set();
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) visible.add(target);
    else visible.delete(target);
  }
  schedule(true);
}, { rootMargin: "100px" });

let run = null;
let state = new RunState();
let charts = [];
let at = null; // index of the sample shown; null: the latest
let drawnMs = 0;
let scheduled = false;
let timer = null;
let playing = null;
let status = "";

function schedule(now = false) {
  if (scheduled || document.hidden) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    show(now);
  });
}

function sampleShown() {
  return state.samples[at ?? state.samples.length - 1];
}

// Figures and the map update with each sample, charts (more expensive) every two seconds. Only visible parts are drawn.
function show(chartsToo) {
  const sample = sampleShown();
  if (!sample) return;
  const inSight = (id) => visible.has(byId(id)) && byId(id).open !== false;
  byId("cursor").max = String(state.samples.length - 1);
  byId("cursor").value = String(at ?? state.samples.length - 1);
  byId("cursor").setAttribute("aria-valuetext", formatTime(sample.t));
  byId("at").textContent = formatTime(sample.t);
  byId("live").setAttribute("aria-pressed", String(at === null));
  document.body.dataset.t = String(sample.t);
  showStatus();
  if (inSight("overview")) showOverview(sample.snapshot, status === "ended" && at === null);
  if (inSight("map")) showLayers(sample);
  if (inSight("budget")) showBudget(sample.snapshot);
  if (inSight("more")) showTiles(sample.snapshot);
  if (inSight("pages")) {
    showTiers(sample.snapshot, palette, map.colour.value);
    map.draw(sample, document.documentElement.dataset.theme);
  }
  if (["allocation", "cache", "compression", "lives", "alerts", "about"].some(inSight)) showTables(sample.snapshot);
  if (inSight("timeline")) showEvents(state.events, at === null ? Infinity : sample.t);
  if (chartsToo || performance.now() - drawnMs > CHARTS_EVERY_MS) drawCharts(sample);
}

function drawCharts(sample) {
  drawnMs = performance.now();
  const window_s = Number(byId("window").value);
  const last = state.samples[state.samples.length - 1].t;
  const samples = window_s ? state.samples.filter(({ t }) => t >= last - window_s) : state.samples;
  for (const chart of charts) if (visible.has(chart.node)) chart.draw(samples, at === null ? null : sample.t);
}

function showStatus() {
  const texts = { live: "live", ended: "ended", lost: "connection lost; showing the last data" };
  const node = byId("status");
  if (node.textContent !== texts[status]) node.textContent = texts[status] ?? "connecting";
  node.className = `status ${status}`;
  document.body.dataset.status = status;
}

function setStatus(value) {
  status = value;
  showStatus();
}

function begin({ run: id, header, charts: definitions }) {
  setStatus("live");
  if (id === run) return; // reconnected to the same run
  run = id;
  at = null;
  state = new RunState(header);
  document.title = `qwen3vl-mem ${header.command ?? ""}`;
  for (const { node } of charts) node.remove();
  charts = definitions.map((chart) => new ChartView(chart, document.querySelector(`#${chart.section} .charts`)));
  for (const { node } of charts) observer.observe(node);
  showAbout(header);
}

function connect() {
  const source = new EventSource("/api/events");
  source.addEventListener("header", (event) => begin(JSON.parse(event.data)));
  source.addEventListener("end", () => {
    setStatus("ended");
    schedule(true);
  });
  source.addEventListener("message", (event) => {
    for (const record of JSON.parse(event.data)) state.apply(record);
    // Thinning must not move the cursor past the end.
    if (at !== null) at = Math.min(at, state.samples.length - 1);
    schedule();
    clearTimeout(timer);
    timer = setTimeout(() => schedule(true), CHARTS_EVERY_MS); // so that the charts include the last sample
  });
  source.addEventListener("error", () => {
    setStatus(status === "ended" ? "ended" : "lost");
    if (status === "ended") source.close(); // no more records follow
  });
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
  schedule(true);
}

function play() {
  if (playing !== null) {
    clearInterval(playing);
    playing = null;
  } else {
    if (at === null || at >= state.samples.length - 1) at = 0;
    playing = setInterval(() => {
      at += 1;
      if (at >= state.samples.length - 1) {
        at = null;
        play();
      }
      schedule();
    }, PLAY_EVERY_MS);
  }
  byId("play").textContent = playing === null ? "Play" : "Pause";
}

const dark = matchMedia("(prefers-color-scheme: dark)");
setTheme(localStorage.getItem(THEME) ?? (dark.matches ? "dark" : "light"));
dark.addEventListener("change", () => {
  if (!localStorage.getItem(THEME)) setTheme(dark.matches ? "dark" : "light");
});
byId("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem(THEME, theme);
  setTheme(theme);
});
byId("cursor").addEventListener("input", (event) => {
  const index = Number(event.target.value);
  at = index >= state.samples.length - 1 ? null : index;
  schedule(true);
});
byId("live").addEventListener("click", () => {
  at = null;
  schedule(true);
});
byId("play").addEventListener("click", play);
byId("window").addEventListener("change", () => schedule(true));
byId("colour").addEventListener("change", () => schedule(true));
document.addEventListener("visibilitychange", () => schedule(true));
addEventListener("resize", () => schedule(true));
for (const section of document.querySelectorAll("main > section, main > details")) {
  observer.observe(section);
  section.addEventListener("toggle", () => schedule(true));
}
connect();
