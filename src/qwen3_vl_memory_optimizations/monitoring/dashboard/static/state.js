// State of a run: records become samples, each a full snapshot with its memory map.

const MOST_SAMPLES = 1800;
const MOST_EVENTS = 500;

// Frequent event types (up to two per second), capped separately so that they do not crowd out the others.
const ROUTINE = ["response", "stall", "swap"];

// The latest events: at most `most` routine ones and `most` others.
export function latestEvents(events, most) {
  const isRoutine = ({ event }) => ROUTINE.includes(event);
  const kept = new Set([...events.filter(isRoutine).slice(-most), ...events.filter((each) => !isRoutine(each)).slice(-most)]);
  return events.filter((event) => kept.has(event));
}

export class RunState {
  constructor(header = {}) {
    this.header = header;
    this.samples = [];
    this.events = [];
    this.snapshot = {};
    this.tensors = [];
    this.runs = "";
  }

  apply(record) {
    if (!("set" in record)) {
      this.events.push(record);
      if (this.events.length > 3 * MOST_EVENTS) this.events = latestEvents(this.events, MOST_EVENTS);
      return;
    }
    this.snapshot = { ...this.snapshot, ...record.set };
    if (record.tensors) this.changeTensors(record.tensors);
    if (record.map !== undefined) this.runs = record.map;
    this.samples.push({ t: record.t, snapshot: this.snapshot, tensors: this.tensors, runs: this.runs });
    if (this.samples.length > MOST_SAMPLES) this.thin();
  }

  changeTensors({ remove, add }) {
    const gone = new Set(remove);
    const kept = this.tensors.filter((tensor) => !gone.has(tensor.id));
    const known = new Set(kept.map((tensor) => tensor.id));
    const added = add.filter(([id]) => !known.has(id));
    this.tensors = kept.concat(added.map(([id, kind, codec, bytes, pages]) => ({ id, kind, codec, bytes, pages })));
  }

  // Keeps the latest third and thins the older samples evenly.
  thin() {
    const recent = this.samples.slice(-MOST_SAMPLES / 3);
    const old = this.samples.slice(0, -MOST_SAMPLES / 3);
    const gap = (old[old.length - 1].t - old[0].t) / (MOST_SAMPLES / 3);
    let last = -Infinity;
    const kept = old.filter(({ t }) => {
      const keeps = t - last >= gap;
      if (keeps) last = t;
      return keeps;
    });
    this.samples = kept.concat(recent);
  }
}

// "3r1s" is "rrrs".
export function expandRuns(runs) {
  let letters = "";
  for (const [, count, letter] of runs.matchAll(/(\d+)([a-z])/g)) letters += letter.repeat(Number(count));
  return letters;
}
