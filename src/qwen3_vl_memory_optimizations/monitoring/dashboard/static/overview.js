// The overview of one sample: verdict, four figures, active alerts.

import { figureAt, format, formatBytes, formatDuration, NOT_MEASURED } from "./format.js";

const PHASES = {
  loading: "Loading", packing: "Packing", pictures: "Pictures", prompt: "Prompt", answer: "Answer",
};
const LIMITS = { SSD: "SSD", memory: "Memory", processor: "Processor" };

const byId = (id) => document.getElementById(id);

// Writes only what changed, so that screen readers and selections are left alone.
function write(id, text, absent = false) {
  const node = byId(id);
  if (node.textContent !== text) node.textContent = text;
  node.classList.toggle("absent", absent);
}

function fillMeter(id, share) {
  const bar = byId(id);
  bar.parentElement.hidden = share === null;
  bar.style.width = `${100 * Math.min(1, share ?? 0)}%`;
}

export function showOverview(snapshot, ended) {
  const { verdict, budget, progress } = snapshot;
  write("verdict", verdict?.text ?? `What limits decoding: ${NOT_MEASURED}.`);
  byId("verdict").dataset.limit = verdict?.limit ?? "";
  showPhase(progress, ended);
  showSpeed(snapshot);
  if (budget) showMemory(snapshot);
  showLimit(verdict);
  const active = (snapshot.alerts ?? []).filter((alert) => alert.active).map((alert) => alert.message);
  const list = byId("active-alerts");
  if (list.dataset.shown !== active.join()) {
    list.dataset.shown = active.join();
    list.replaceChildren(...active.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  }
}

function showPhase(progress, ended) {
  if (!progress) {
    write("phase", ended ? "Ended" : "Idle");
    write("phase-note", ended ? "the run is over" : "no request in progress");
    fillMeter("phase-bar", null);
    return;
  }
  const { phase, done, total, unit, left_s: leftS, elapsed_s: elapsedS } = progress;
  const amount = (value) => (unit === "bytes" ? formatBytes(value) : value.toLocaleString("en"));
  const most = phase === "answer" ? "up to " : "";
  const of = total === null ? `${amount(done)} ${unit}` : `${amount(done)} of ${most}${amount(total)}${unit === "bytes" ? "" : ` ${unit}`}`;
  const time = leftS === null ? `for ${formatDuration(elapsedS)}` : `about ${formatDuration(leftS)} left`;
  write("phase", ended ? "Ended" : PHASES[phase] ?? phase);
  write("phase-note", ended ? `stopped in the phase "${phase}", ${of}` : `${of}, ${time}`);
  fillMeter("phase-bar", total ? done / total : null);
}

function showSpeed(snapshot) {
  const rate = figureAt(snapshot, ["responses", "tokens_per_s"]);
  const first = figureAt(snapshot, ["responses", "first_token_s"]);
  write("speed", rate === null ? NOT_MEASURED : `${format(rate, "plain")} tokens/s`, rate === null);
  byId("speed").dataset.value = rate ?? "";
  write("speed-note", `first token: ${first === null ? NOT_MEASURED : `after ${formatDuration(first)}`}`);
}

function showMemory({ budget, process }) {
  const [used, peak, limit, whose] = budget.ram_budget_bytes === null && budget.tensor_budget_bytes !== null
    ? [budget.frames_used_bytes, budget.frames_peak_bytes, budget.tensor_budget_bytes, "of tensors"]
    : [process.rss_bytes, budget.peak_bytes ?? process.peak_rss_bytes, budget.ram_budget_bytes, "of the process"];
  const over = limit !== null && peak > limit;
  write("memory", limit === null ? formatBytes(used) : `${formatBytes(used)} of ${formatBytes(limit)}`);
  write("memory-note", `${limit === null ? "no budget, " : ""}peak ${whose}: ${formatBytes(peak)}${over ? ", over the budget" : ""}`);
  byId("memory-note").classList.toggle("bad", over);
  fillMeter("memory-bar", limit === null ? null : used / limit);
}

function showLimit(verdict) {
  const limit = LIMITS[verdict?.limit];
  write("limit", limit ?? NOT_MEASURED, limit === undefined);
  const read = verdict?.read_bytes_per_token;
  const rate = verdict?.disk_bytes_per_s;
  const notes = {
    SSD: `${format(read, "bytes")} per token${rate ? ` at ${format(rate, "bytes/s")}` : ""}`,
    memory: `${format(verdict?.memory_share, "share")} of its bandwidth`,
    processor: `${format(verdict?.waiting_share, "share")} waiting for the SSD`,
  };
  write("limit-note", notes[verdict?.limit] ?? "no token decoded yet");
}
