// What is known of a run: its records become samples, each a whole snapshot and the memory map of that time.

const MOST_SAMPLES = 1800;
const MOST_EVENTS = 500;

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
      if (this.events.length > MOST_EVENTS) this.events.shift();
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

  // The older half loses every second sample, so that the whole run stays.
  thin() {
    const half = this.samples.length >> 1;
    this.samples = this.samples.filter((sample, i) => i >= half || i % 2 === 0);
  }
}

// "3r1s" is "rrrs".
export function expandRuns(runs) {
  let letters = "";
  for (const [, count, letter] of runs.matchAll(/(\d+)([a-z])/g)) letters += letter.repeat(Number(count));
  return letters;
}
