"""Which foretells better what is used next: the network of the tiering system, or each key's own history?

Follows the uses of each trace, and at every 20th asks both about 16 keys that were used before: which of two comes
sooner? Writes the table of README.md.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks import results  # noqa: E402
from benchmarks.eviction.replay import Trace  # noqa: E402
from benchmarks.eviction.run import traces  # noqa: E402
from qwen3_vl_memory_optimizations import MemoryTieringSystem  # noqa: E402
from qwen3_vl_memory_optimizations.prediction.mlp import features_of  # noqa: E402

HERE = Path(__file__).parent
BEGIN, END = "<!-- waits: begin (written by waits.py) -->", "<!-- waits: end -->"
ASKED, EVERY, TRAINED_EVERY = 16, 20, 50
WARM_UP = 0.3


def measure(trace: Trace) -> dict[str, float]:
    """Return the shares of pairs in the right order, and the cost of a prediction."""
    system, draw = MemoryTieringSystem(), np.random.default_rng(0)
    next_at = _next_uses(trace.keys)
    right: dict[str, list[float]] = {"network": [], "history": [], "decides": []}
    network_decides, note_s, predict_us = 0, 0.0, []
    last: dict[int, int] = {}
    keys = trace.keys.tolist()
    for position, key in enumerate(keys):
        start = time.thread_time()
        system.note(str(key), int(trace.n_bytes[key]), "general")  # kinds would tell it what a run does not follow
        note_s += time.thread_time() - start
        last[key] = position
        if position % TRAINED_EVERY == 0:
            system.predictor.train()
        if position % EVERY or position < WARM_UP * len(keys) or not system.predictor.ready:
            continue
        known = sorted(last)
        asked = [int(each) for each in draw.choice(known, min(ASKED, len(known)), replace=False)]
        truth = {each: next_at[last[each]] for each in asked}
        histories = {each: system._next_use.history(str(each)) for each in asked}
        asked = [each for each in asked if histories[each] is not None and np.isfinite(truth[each])]
        if len(asked) < 2:
            continue
        now = system._next_use.now
        rows = [features_of(histories[each], now, int(trace.n_bytes[each]), "general") for each in asked]
        start = time.perf_counter()
        found = system.predictor.predict(rows)
        predict_us.append(1e6 * (time.perf_counter() - start) / len(rows))
        by_network = dict(zip(asked, found.tolist(), strict=True))
        by_history = {each: system._next_use.wait(str(each)) for each in asked}
        decides = by_network if system.predictor.better else by_history
        network_decides += decides is by_network
        for name, waits in (("network", by_network), ("history", by_history), ("decides", decides)):
            right[name].append(_ordered(waits, truth))
    if not predict_us:
        return {}
    return {name: statistics.mean(values) for name, values in right.items()} | {
        "asked": len(predict_us),
        "network_decides": network_decides / len(predict_us),
        "predict_us": statistics.median(predict_us),
        "note_us": 1e6 * note_s / len(keys),
    }


def _next_uses(keys: np.ndarray) -> np.ndarray:
    """Return for each use the position of the next one of the same key; infinite: there is none."""
    following = np.full(len(keys), np.inf)
    seen: dict[int, int] = {}
    for position in range(len(keys) - 1, -1, -1):
        following[position] = seen.get(int(keys[position]), np.inf)
        seen[int(keys[position])] = position
    return following


def _ordered(waits: dict[int, float], truth: dict[int, float]) -> float:
    """Return the share of pairs of which the one that comes sooner was expected sooner; ties count half."""
    scores = []
    for one, other in itertools.combinations(waits, 2):
        sooner, later = (one, other) if truth[one] < truth[other] else (other, one)
        scores.append(0.5 if waits[sooner] == waits[later] else float(waits[sooner] < waits[later]))
    return statistics.mean(scores)


def report() -> Iterator[str]:
    """Give the lines of the table."""
    yield ""
    yield f"{results.machine_line(results.machine())} {results.now()}, at {results.commit()}."
    yield ""
    yield (
        "| trace | accuracy: network | accuracy: own history | accuracy: the one that decided | network decided "
        "| time per prediction, us | time per use, us |"
    )
    yield "|" + "---|" * 7
    for name, trace in traces():
        row = measure(trace)
        if row:
            shares = " | ".join(f"{row[each]:.3f}" for each in ("network", "history", "decides"))
            costs = f"{100 * row['network_decides']:.0f} % | {row['predict_us']:.1f} | {row['note_us']:.1f}"
            yield f"| {name} | {shares} | {costs} |"


if __name__ == "__main__":
    lines = list(report())
    print("\n".join(lines))
    results.write_between(HERE / "README.md", BEGIN, END, [*lines, ""])
