"""Replay traces of uses through each rule of what leaves memory first, at several capacities, beside Belady's optimum.

Writes the tables and the plot of README.md. ARC and S3-FIFO are those of libCacheSim (`pip install libcachesim`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks import results  # noqa: E402
from benchmarks.eviction.replay import Trace, replay, replay_belady  # noqa: E402
from qwen3_vl_memory_optimizations.runtime_policy import ALGORITHMS, create_swapping_algorithm  # noqa: E402

HERE = Path(__file__).parent
SHARES = (0.05, 0.1, 0.25, 0.5, 0.75)
JUDGED = (0.1, 0.25, 0.5)
RULES = ("lru", "clock", "S3-FIFO", "ARC", "predictive", "Belady")
RECORDED = ("image-chat", "documents", "long-decode", "vision-and-decode", "mixed")
SCHEDULES = ("cyclic", "long-decode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_result_options(parser, HERE, adds=False)
    arguments = parser.parse_args()
    if not arguments.report:
        content = {"environment": results.machine(), "date": results.now(), "commit": results.commit(), "rows": []}
        for name, trace in traces():
            for share, rule in itertools.product(SHARES, RULES):
                content["rows"].append({"trace": name, "share": share, "rule": rule} | measure(trace, share, rule))
            print(name, flush=True)
        results.keep(content, arguments.json)
    content = json.loads(arguments.json.read_text())
    results.publish(report(content), arguments.json, HERE)
    if arguments.json == parser.get_default("json"):
        plot(content["rows"])


def traces() -> Iterator[tuple[str, Trace]]:
    """Give the recorded traces, then the made ones."""
    for name in RECORDED:
        yield name, Trace.load(HERE / "traces" / f"{name}.npz")
    draw = np.random.default_rng(0)
    yield "cyclic", made(np.tile(np.arange(100), 120))
    weights = 1 / np.arange(1, 301)
    yield "Zipf", made(draw.choice(300, 12000, p=weights / weights.sum()))
    scanned = itertools.count(1000)
    yield "scan and hot set", made([draw.integers(40) if draw.random() < 0.5 else next(scanned) for _ in range(6000)])


def made(keys: np.ndarray | list[int]) -> Trace:
    """Return a trace of keys of one size."""
    names, indices = np.unique(np.asarray(keys), return_inverse=True)
    return Trace(indices.astype(np.int32), np.full(len(names), 4096, np.int64), np.full(len(names), "general"))


def measure(trace: Trace, share: float, rule: str) -> dict[str, float]:
    """Return the hit rates of a rule, and how long it took a use."""
    capacity = int(share * trace.total_bytes)
    start = time.thread_time()
    if rule == "Belady":
        found = replay_belady(trace, capacity)
    elif rule in ALGORITHMS:
        found = replay(trace, create_swapping_algorithm(rule), capacity)
    else:
        return of_library(trace, capacity, rule)
    seconds = time.thread_time() - start
    us_per_use = round(1e6 * seconds / len(trace.keys), 2)
    return {"hit_rate": found.hit_rate, "byte_hit_rate": found.byte_hit_rate, "us_per_use": us_per_use}


def of_library(trace: Trace, capacity: int, rule: str) -> dict[str, float]:
    """Return the hit rates of a rule of libCacheSim."""
    import libcachesim

    kinds: dict[str, Callable] = {"S3-FIFO": libcachesim.S3FIFO, "ARC": libcachesim.ARC}
    cache, request = kinds[rule](cache_size=capacity), libcachesim.Request()
    sizes, hits, hit_bytes = trace.n_bytes.tolist(), 0, 0
    for key in trace.keys.tolist():
        request.obj_id, request.obj_size = key + 1, sizes[key]
        if cache.get(request):
            hits += 1
            hit_bytes += sizes[key]
    used = int(trace.n_bytes[trace.keys].sum())
    return {"hit_rate": hits / len(trace.keys), "byte_hit_rate": hit_bytes / used}


def report(content: dict) -> Iterator[str]:
    """Give the lines of the report."""
    rows = {(row["trace"], row["share"], row["rule"]): row for row in content["rows"]}
    names = list(dict.fromkeys(row["trace"] for row in content["rows"]))

    def rate(name: str, share: float, rule: str) -> float:
        return rows[name, share, rule]["hit_rate"]

    yield ""
    yield f"{results.machine_line(content['environment'])} {content['date']}, at {content['commit']}."
    yield ""
    yield (
        f"| trace | memory, share of all bytes | {' | '.join(RULES)} "
        "| predictive vs. Belady | gap between LRU and Belady closed |"
    )
    yield "|" + "---|" * (len(RULES) + 4)
    for name, share in itertools.product(names, SHARES):
        best, least, found = (rate(name, share, rule) for rule in ("Belady", "lru", "predictive"))
        cells = [f"{rate(name, share, rule):.3f}" for rule in RULES]
        gap = best - least
        cells += [f"{found / best:.2f}" if best else "-", f"{(found - least) / gap:.2f}" if gap >= 0.005 else "-"]
        yield f"| {name} | {100 * share:g} % | {' | '.join(cells)} |"
    yield ""
    yield "Byte hit rates of the recorded traces (misses are read from the SSD):"
    yield ""
    yield f"| trace | memory, share of all bytes | {' | '.join(RULES)} |"
    yield "|" + "---|" * (len(RULES) + 2)
    for name, share in itertools.product(RECORDED, JUDGED):
        cells = [f"{rows[name, share, rule]['byte_hit_rate']:.3f}" for rule in RULES]
        yield f"| {name} | {100 * share:g} % | {' | '.join(cells)} |"
    yield ""
    below = min(
        (found["hit_rate"] - max(rate(name, share, rule) for rule in ("lru", "clock")), name, share)
        for (name, share, rule), found in rows.items()
        if rule == "predictive"
    )
    yield (
        f"- Compared with the better of LRU and CLOCK, the hit rate of prediction differs by at worst "
        f"{100 * below[0]:+.2f} points ({below[1]}, {100 * below[2]:g} % of memory)."
    )
    schedule = min((rate(name, share, "predictive") / rate(name, share, "Belady"), name, share)
                   for name in SCHEDULES for share in JUDGED)  # fmt: skip
    yield (
        f"- On schedules its hit rate is at least {schedule[0]:.3f} of Belady's "
        f"({schedule[1]}, {100 * schedule[2]:g} %)."
    )
    for name in ("mixed", "image-chat", "documents", "vision-and-decode"):
        mean = {rule: statistics.mean(rate(name, share, rule) for share in JUDGED) for rule in RULES}
        gap = (mean["predictive"] - mean["lru"]) / (mean["Belady"] - mean["lru"])
        yield (
            f"- {name}, mean of 10, 25 and 50 %: {mean['predictive']:.3f}, LRU {mean['lru']:.3f} "
            f"({mean['predictive'] / mean['lru']:.2f}x; Belady {mean['Belady'] / mean['lru']:.2f}x); "
            f"{100 * gap:.0f} % of the gap closed."
        )
    slowest = max(row.get("us_per_use", 0.0) for row in content["rows"] if row["rule"] == "predictive")
    yield f"- Prediction takes {slowest:g} us of CPU time per use at most, including its three shadow caches."


def plot(rows: list[dict]) -> None:
    """Draw hit rate against capacity for each trace."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["trace"] for row in rows))
    figure, axes = plt.subplots(2, 4, figsize=(15, 7), sharex=True, sharey=True)
    for axis, name in zip(axes.flat, names, strict=True):
        for rule in RULES:
            found = [row for row in rows if (row["trace"], row["rule"]) == (name, rule)]
            style = {"Belady": ":", "predictive": "-"}.get(rule, "--")
            axis.plot([100 * row["share"] for row in found], [row["hit_rate"] for row in found], style, label=rule)
        axis.set_title(name)
        axis.grid(alpha=0.3)
    figure.supxlabel("memory, % of all bytes")
    figure.supylabel("hit rate")
    axes.flat[0].legend()
    figure.tight_layout()
    figure.savefig(HERE / "hit_rates.png", dpi=80)


if __name__ == "__main__":
    main()
