// Formatting of figures. Missing figures read "not measured", never zero.

export const NOT_MEASURED = "not measured";

function digits(value) {
  return value === 0 ? "0" : String(Number(value.toPrecision(3)));
}

// Three digits, trailing zeros included: "2.00 GB".
export function formatBytes(bytes) {
  for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    const value = bytes / scale;
    const size = Math.abs(value);
    if (size >= 0.9995) return `${value.toFixed(size < 9.995 ? 2 : size < 99.95 ? 1 : 0)} ${unit}`;
  }
  return `${Math.round(bytes)} B`;
}

const FORMATS = {
  bytes: formatBytes,
  "bytes/s": (value) => `${formatBytes(value)}/s`,
  share: (value) => `${Math.abs(value) < 0.01 ? Number((100 * value).toPrecision(2)) : Number((100 * value).toFixed(1))} %`,
  "/s": (value) => `${digits(value)}/s`,
  times: (value) => `${digits(value)} x`,
  cores: (value) => digits(value),
  count: (value) => (Number.isInteger(value) ? value.toLocaleString("en") : digits(value)),
  s: (value) => `${digits(value)} s`,
  plain: digits,
};

export function format(value, unit) {
  return typeof value === "number" ? FORMATS[unit](value) : NOT_MEASURED;
}

// A length of time: "0.8 s", "23 s", "4 min 10 s", "2 h 5 min".
export function formatDuration(seconds) {
  if (seconds < 10) return `${digits(Number(seconds.toFixed(1)))} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor(whole / 60) % 60} min`;
}

// A moment of the run.
export function formatTime(seconds) {
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const whole = Math.floor(seconds);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return parts.slice(parts[0] ? 0 : 1).map((part, i) => (i ? String(part).padStart(2, "0") : part)).join(":");
}

// Path of keys, as in the chart definitions.
export function figureAt(snapshot, keys) {
  let value = snapshot;
  for (const key of keys) value = value !== null && typeof value === "object" ? value[key] : undefined;
  return typeof value === "number" ? value : null;
}

export function words(name) {
  return name.replaceAll("_", " ");
}
