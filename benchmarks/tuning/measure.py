"""Run one workload: search a grid, let the tuner search from a bad start, compare; print figures as JSON.

One process, so that all settings meet the same weights, files and machine; the settings take turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from qwen3_vl_memory_optimizations import create_optimized_model  # noqa: E402
from qwen3_vl_memory_optimizations.tuning import AutoTuner  # noqa: E402

READ_AHEADS = [2**20 * step for step in (4, 8, 16, 20, 32, 64, 96)]
CACHES = [2**10 * step for step in (48, 96, 192, 384, 768, 1536, 3072)]
_MOST_S = 600.0
_PICTURES = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=("decode", "pictures"))
    parser.add_argument("--model", help="checkpoint, for `decode`")
    parser.add_argument("--cache-dir", help="where packed checkpoints lie, for `decode`")
    parser.add_argument("--tensor-budget", default="300MB", help="for `decode`")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    run = decode if arguments.workload == "decode" else pictures
    print(json.dumps({"workload": arguments.workload} | run(arguments)))


def decode(arguments: argparse.Namespace) -> dict:
    """An answer without end, of a model that does not fit: how much is read ahead, and so not kept."""
    from benchmarks.budget.measure import make_inputs

    settings = {"tensor_budget": arguments.tensor_budget, "codec": "int8_rotated", "private": True}
    model = create_optimized_model(arguments.model, settings | {"cache_dir": arguments.cache_dir})
    inputs = make_inputs(model.config, 0, 32, model.dtype)
    stats = model.memory_optimizer.pager.stats

    def block() -> dict[str, float]:
        read, start_s, tokens = stats.bytes_read, time.perf_counter(), 12
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        seconds = time.perf_counter() - start_s
        return {"figure": tokens / seconds, "read_bytes": (stats.bytes_read - read) / tokens}

    return compare(model, "read_ahead_bytes", READ_AHEADS, READ_AHEADS[0], block, arguments.rounds)


def pictures(arguments: argparse.Namespace) -> dict:
    """Questions about 60 pictures, some of which come again and again, and a cache that starts too small."""
    from tests.model import tiny

    images, _, questions, _ = tiny.heldout()
    weights = 1 / np.arange(1, _PICTURES + 1)
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        model = create_optimized_model(
            tiny.DIRECTORY,
            {
                "codec": "none",
                "cache_dir": directory,
                "private": True,
                "prefix_reuse": "off",
                "l2_cache_size": CACHES[0],
                "l2_cache_max": CACHES[-1],
            },
        )
        prompts = [tiny.batch([tiny.prompt(questions[0])], images[number : number + 1]) for number in range(_PICTURES)]
        counters = model.memory_optimizer.cache.l2_cache.counters

        def block() -> dict[str, float]:
            hits, misses = counters.hits, counters.misses
            start_s, cpu_s = time.perf_counter(), time.process_time()
            count = 200
            for number in draw.choice(_PICTURES, count, p=weights / weights.sum()):
                with torch.no_grad():
                    model.generate(**prompts[number], max_new_tokens=3, min_new_tokens=3, do_sample=False)
            return {
                "figure": (counters.hits - hits) / max(1, counters.hits - hits + counters.misses - misses),
                "requests_per_s": count / (time.perf_counter() - start_s),
                "cpu_s_per_request": (time.process_time() - cpu_s) / count,
            }

        return compare(model, "l2_cache_size", CACHES, CACHES[0], block, arguments.rounds)


def compare(
    model: Any, name: str, grid: Sequence[int], start: int, block: Callable[[], dict[str, float]], rounds: int
) -> dict:
    """Search the grid, then tune from `start`, then measure what was found beside the grid's best."""
    optimizer = model.memory_optimizer
    parameter = optimizer.parameters[name]

    def turns(values: Sequence[int]) -> dict[int, list[dict[str, float]]]:
        found: dict[int, list[dict[str, float]]] = {value: [] for value in values}
        for _, value in itertools.product(range(rounds), values):
            parameter.set(value)
            block()  # the plan changes, the cache fills
            found[value].append(block())
        return found

    searched = turns(grid)
    best = max(grid, key=lambda value: median(searched[value], "figure"))
    if optimizer.cache is not None:
        optimizer.cache.clear()
    parameter.set(start)
    tuner = AutoTuner(optimizer.pager, optimizer.parameters, cache=optimizer.cache)  # what `auto_tune=True` makes
    tuner.start()
    curve, start_s = [], time.perf_counter()
    while not tuner.resting and time.perf_counter() - start_s < _MOST_S:
        seen = block()
        curve.append({"s": round(time.perf_counter() - start_s, 1), "value": parameter.read()} | rounded(seen))
    tuner.close()
    tuned = int(parameter.read())
    final = turns(list(dict.fromkeys([best, tuned, start])))
    return {
        "parameter": name,
        "grid": [{"value": value} | summary(searched[value]) for value in grid],
        "best": best,
        "start": start,
        "tuned": tuned,
        "tuning_s": round(time.perf_counter() - start_s, 1) if not curve else curve[-1]["s"],
        "rested": tuner.resting,
        "curve": curve,
        "log": tuner.log(),
        "final": [{"value": value} | summary(rows) for value, rows in final.items()],
    }


def median(rows: Sequence[dict[str, float]], name: str) -> float:
    """Return the middle of a figure."""
    return statistics.median(row[name] for row in rows)


def summary(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the medians, and all values of the figure."""
    return rounded({name: median(rows, name) for name in rows[0]}) | {"all": [round(row["figure"], 4) for row in rows]}


def rounded(row: dict[str, float]) -> dict[str, float]:
    """Return figures with four digits behind the point."""
    return {name: round(value, 4) for name, value in row.items()}


if __name__ == "__main__":
    main()
