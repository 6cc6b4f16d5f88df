// The folded parts of the page: tiles and tables of one sample.

import { colourOf } from "./chart.js";
import { figureAt, format, formatBytes, formatTime, NOT_MEASURED, words } from "./format.js";
import { latestEvents } from "./state.js";

const TILES = [
  ["Tokens per second", "responses.tokens_per_s", "plain"],
  ["Time to first token", "responses.first_token_s", "s"],
  ["Process memory", "process.rss_bytes", "bytes"],
  ["Peak process memory", "process.peak_rss_bytes", "bytes"],
  ["Weight hit rate", "paging.hit_rate", "share"],
  ["Hit rate vs. LRU", "prediction.improvement_over_lru", "share"],
  ["Prefetched in time", "metrics.swap_efficiency", "share"],
  ["SSD stall time", "paging.stall_s", "s"],
  ["SSD reads", "paging.bytes_read", "bytes"],
  ["Cache hit rate", "cache.hit_rate", "share"],
  ["Compression ratio", "metrics.compression_ratio", "times"],
  ["Compression quality", "metrics.compression_quality", "share"],
  ["Non-evictable memory", "budget.undroppable_share", "share"],
  ["Fragmentation", "fragmentation", "share"],
];

const METRIC_UNITS = {
  allocation_speedup: "times", compression_ratio: "times", swap_operations_count: "count", tier_migration_rate: "/s",
};

const byId = (id) => document.getElementById(id);
const shown = new Map();

// Whether a place shows something new; unchanged parts of snapshots are the same objects.
function isNew(place, ...parts) {
  const before = shown.get(place);
  if (before && parts.every((part, i) => part === before[i])) return false;
  shown.set(place, parts);
  return true;
}

function cell(content, kind = "") {
  const node = document.createElement("td");
  node.className = kind;
  if (content instanceof Node) node.append(content);
  else node.textContent = content;
  if (content === NOT_MEASURED) node.classList.add("absent");
  return node;
}

const number = (value, unit) => cell(format(value, unit), "number");
const text = (value) => cell(value, "text");

// Columns: [heading, numeric]. `makeRows` builds lists of cells; without rows, `nothing` is shown.
function fill(id, source, columns, makeRows, nothing = NOT_MEASURED) {
  if (!isNew(id, source)) return;
  const rows = makeRows();
  const head = document.createElement("thead");
  const line = document.createElement("tr");
  for (const [heading, numeric] of columns) {
    const node = document.createElement("th");
    node.scope = "col";
    node.textContent = heading;
    if (numeric) node.className = "number";
    line.append(node);
  }
  head.append(line);
  const body = document.createElement("tbody");
  for (const { cells, className = "" } of rows) {
    const row = document.createElement("tr");
    row.className = className;
    row.append(...cells);
    body.append(row);
  }
  if (!rows.length) {
    const row = document.createElement("tr");
    const only = cell(nothing, "absent");
    only.colSpan = columns.length;
    row.append(only);
    body.append(row);
  }
  byId(id).replaceChildren(head, body);
}

const rowsOf = (table, cells) => Object.entries(table ?? {}).map(([name, row]) => ({ cells: cells(name, row) }));

export function showTiles(snapshot) {
  const list = byId("tiles");
  if (!list.children.length) {
    for (const [title, path, unit] of TILES) {
      const tile = document.createElement("div");
      const term = document.createElement("dt");
      term.textContent = title;
      const figure = document.createElement("dd");
      Object.assign(figure.dataset, { path, unit });
      tile.append(term, figure);
      list.append(tile);
    }
  }
  for (const figure of list.querySelectorAll("dd")) {
    const value = figureAt(snapshot, figure.dataset.path.split("."));
    if (!isNew(figure.dataset.path, value)) continue;
    figure.textContent = format(value, figure.dataset.unit);
    figure.dataset.value = value === null ? "" : String(value);
    figure.classList.toggle("absent", value === null);
  }
}

// Only accounts under the limit count: all of the process, or those of managed tensors.
export function showBudget({ budget }) {
  if (!budget || !isNew("budget", budget)) return;
  const total = budget.ram_budget_bytes ?? budget.tensor_budget_bytes;
  const accounts = budget.ram_budget_bytes === null ? budget.tensor_accounts_bytes : budget.accounts_bytes;
  const parts = Object.entries(accounts).map(([name, bytes]) => ({ name: words(name), bytes }));
  parts.push({ name: "page frames in use", bytes: budget.frames_used_bytes });
  parts.push({ name: "free page frames, kept for reuse", bytes: budget.frames_free_bytes });
  const held = parts.filter(({ bytes }) => bytes > 0).sort((a, b) => b.bytes - a.bytes);
  const sum = held.reduce((bytes, part) => bytes + part.bytes, 0);
  const whole = Math.max(total ?? 0, sum) || 1;
  const whose = budget.ram_budget_bytes === null ? "managed tensors" : "the whole process";
  byId("budget-text").textContent = total === null
    ? `No budget is set. ${formatBytes(sum)} in use.`
    : `${formatBytes(sum)} of ${formatBytes(total)} for ${whose} in use (${format(sum / total, "share")}).`;
  const swatch = (index) => {
    const node = document.createElement("span");
    node.className = "swatch";
    node.style.background = colourOf(index);
    return node;
  };
  byId("budget-bar").replaceChildren(
    ...held.map(({ name, bytes }, index) => {
      const part = document.createElement("span");
      part.style.width = `${(100 * bytes) / whole}%`;
      part.style.background = colourOf(index);
      part.title = `${name}: ${formatBytes(bytes)}`;
      return part;
    }),
  );
  const left = (total ?? 0) > sum
    ? [{ cells: [text("free"), number(total - sum, "bytes"), number((total - sum) / whole, "share")] }]
    : [];
  fill(
    "budget-table", budget,
    [["account", false], ["bytes", true], ["share of budget", true]],
    () => held
      .map(({ name, bytes }, index) => {
        const label = document.createElement("span");
        label.append(swatch(index), name);
        return { cells: [cell(label), number(bytes, "bytes"), number(total ? bytes / total : null, "share")] };
      })
      .concat(left),
  );
}

export function showTiers(snapshot, palette, by) {
  const { memory_map: rows = [], tiers = {}, cache } = snapshot;
  if (!isNew("tiers", rows, tiers, cache, by)) return;
  const cached = (level) => {
    const row = cache?.levels?.[level];
    return row ? `; ${formatBytes(row.used_bytes)} of cached results` : "";
  };
  const swap = tiers.ssd ? `; ${formatBytes(tiers.ssd.swap_used_bytes)} in the swap file` : "";
  byId("tier-gpu").textContent = tiers.gpu ? formatBytes(tiers.gpu.resident_bytes) : "absent: not used by this process";
  byId("tier-cpu").textContent = `${format(tiers.cpu?.resident_bytes, "bytes")} of tensors${cached("cpu")}`;
  byId("tier-ssd").textContent = `${format(tiers.ssd?.only_there_bytes, "bytes")} of tensors on SSD only${swap}${cached("ssd")}`;
  const sums = new Map();
  for (const row of rows) {
    const sum = sums.get(row[by]) ?? { cpu: 0, ssd: 0 };
    sum[row.tier] += row.bytes;
    sums.set(row[by], sum);
  }
  byId("map-legend").replaceChildren(
    ...[...sums].map(([name, { cpu, ssd }]) => {
      const item = document.createElement("li");
      const square = document.createElement("span");
      square.className = "swatch";
      square.style.background = colourOf(palette.index(by, name));
      item.append(square, `${words(name)}: ${formatBytes(cpu)} in memory, ${formatBytes(ssd)} on SSD only`);
      return item;
    }),
  );
  const names = { cpu: "memory", ssd: "SSD only", gpu: "GPU" };
  fill(
    "map-table", rows,
    [["tier", false], ["kind", false], ["codec", false], ["tensors", true], ["bytes", true]],
    () => rows.map((row) => ({
      cells: [text(names[row.tier]), text(words(row.kind)), text(row.codec), number(row.tensors, "count"), number(row.bytes, "bytes")],
    })),
    "no managed tensors",
  );
}

export function showTables(snapshot) {
  fill(
    "pools-table", snapshot.pools,
    [["pool", false], ["granted", true], ["size", true], ["utilization", true], ["allocations", true], ["internal fragmentation", true], ["external fragmentation", true]],
    () => rowsOf(snapshot.pools, (name, row) => [
      text(words(name)), number(row.used_bytes, "bytes"), number(row.size_bytes, "bytes"), number(row.utilization, "share"),
      number(row.allocations, "count"), number(row.internal_fragmentation, "share"), number(row.external_fragmentation, "share"),
    ]),
    "pooling is disabled",
  );
  fill(
    "levels-table", snapshot.cache,
    [["level", false], ["hits", true], ["misses", true], ["hit rate", true], ["entries", true], ["used", true], ["size", true], ["moved from another level", true], ["prediction efficiency", true]],
    () => rowsOf(snapshot.cache?.levels, (name, row) =>
      row === null || row.available === false
        ? [text(name), Object.assign(cell("absent", "absent"), { colSpan: 8 })]
        : [
            text(name), number(row.hits, "count"), number(row.misses, "count"), number(row.hit_rate, "share"),
            number(row.entries, "count"), number(row.used_bytes, "bytes"), number(row.size_bytes, "bytes"),
            number(row.migrations, "count"), number(row.prediction_efficiency, "share"),
          ],
    ),
    "the result cache is disabled",
  );
  fill(
    "kinds-table", snapshot.kinds,
    [["kind", false], ["tensors", true], ["original", true], ["encoded", true], ["ratio", true], ["relative error", true], ["encoding speed", true], ["decoding speed", true]],
    () => rowsOf(snapshot.kinds, (name, row) => [
      text(words(name)), number(row.tensors, "count"), number(row.original_bytes ?? row.logical_bytes, "bytes"), number(row.encoded_bytes, "bytes"),
      number(row.compression_ratio, "times"), number(row.relative_error, "share"), number(row.encode_bytes_per_s, "bytes/s"),
      number(row.decode_bytes_per_s, "bytes/s"),
    ]),
    "no managed tensors",
  );
  fill(
    "lives-table", snapshot.life_cycles,
    [["kind", false], ["created", true], ["freed", true], ["live", true], ["live bytes", true], ["mean lifetime, rounds", true]],
    () => rowsOf(snapshot.life_cycles, (name, row) => [
      text(words(name)), number(row.births, "count"), number(row.deaths, "count"), number(row.alive, "count"),
      number(row.alive_bytes, "bytes"), number(row.mean_rounds, "plain"),
    ]),
    "no runtime tensors yet",
  );
  const plain = Object.entries(snapshot.gc ?? {}).filter(([, value]) => value === null || typeof value !== "object");
  fill(
    "gc-table", snapshot.gc,
    [["statistic", false], ["value", true]],
    () => plain.map(([name, value]) => ({
      cells: [text(words(name)), typeof value === "string" ? cell(value, "number") : number(value, gcUnit(name))],
    })),
    "no collector",
  );
  fill(
    "metrics-table", snapshot.metrics,
    [["metric", false], ["value", true]],
    () => rowsOf(snapshot.metrics, (name, value) => {
      const shown = number(value, METRIC_UNITS[name] ?? "share");
      shown.dataset.metric = name;
      shown.dataset.value = value ?? "";
      return [text(words(name)), shown];
    }),
  );
  showAlerts(snapshot.alerts);
}

function gcUnit(name) {
  if (name.endsWith("_bytes")) return "bytes";
  return name.endsWith("rate") || name.endsWith("accuracy") ? "share" : "count";
}

function showAlerts(alerts) {
  const units = { response_time: "s" };
  fill(
    "alerts-table", alerts,
    [["alert", false], ["state", false], ["value", true], ["limit", true], ["time in state", true]],
    () => (alerts ?? []).map((row) => ({
      className: row.active ? "active" : "",
      cells: [
        text(words(row.name)), text(row.active ? "\u25B2 active" : "\u2713 clear"), number(row.value, units[row.name] ?? "share"),
        row.limit === null ? cell("not set", "number absent") : number(row.limit, units[row.name] ?? "share"),
        row.since_s === null ? cell("since start", "number") : number(row.since_s, "s"),
      ],
    })),
  );
}

export function showEvents(events, until) {
  const past = latestEvents(events.filter((event) => event.t <= until), 50).reverse();
  if (!isNew("events", past.length, past[0], past.at(-1))) return;
  byId("events").replaceChildren(
    ...past.map((event) => {
      const item = document.createElement("li");
      for (const part of [formatTime(event.t), event.event, event.text]) {
        const node = document.createElement("span");
        node.textContent = part;
        item.append(node);
      }
      return item;
    }),
  );
  if (!past.length) byId("events").textContent = "no events yet";
}

export function showAbout(header) {
  const rows = [];
  const add = (name, value) => {
    if (value !== null && typeof value === "object" && !Array.isArray(value)) {
      for (const [key, part] of Object.entries(value)) add(`${name}: ${words(key)}`, part);
    } else {
      rows.push({ cells: [text(name), text(value === null ? NOT_MEASURED : Array.isArray(value) ? value.join(", ") : String(value))] });
    }
  };
  for (const [key, value] of Object.entries(header)) {
    if (!["format", "version"].includes(key)) add(words(key), key === "started_s" ? new Date(1000 * value).toLocaleString("en-GB") : value);
  }
  fill("about-table", header, [["", false], ["", false]], () => rows);
  const of = [header.command, header.model, `process ${header.pid}`].filter(Boolean);
  byId("run").textContent = of.join(" \u00B7 ");
}
