"""Which share of the time of decoding goes into foretelling what is used next?

Every part that predicts (the schedule of weights, the plan of what stays, the rules of what leaves, the ranks of what
comes back and the training of the networks) is timed while a model writes an answer within a budget that it does not
fit. The clock itself counts as prediction, so the shares are upper bounds. Writes the table of README.md.

    python benchmarks/eviction/cost.py [model directory ...]
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks import results  # noqa: E402
from qwen3_vl_memory_optimizations import create_optimized_model  # noqa: E402
from qwen3_vl_memory_optimizations.collection import PredictiveGarbageCollector  # noqa: E402
from qwen3_vl_memory_optimizations.paging.transfers.resident_set import ResidentSet  # noqa: E402
from qwen3_vl_memory_optimizations.prediction import LightweightMLPredictor, PassSchedule  # noqa: E402
from qwen3_vl_memory_optimizations.runtime_policy import (  # noqa: E402
    MemoryTieringSystem,
    PredictiveSwappingAlgorithm,  # noqa: E402
)
from tests.model import tiny  # noqa: E402

HERE = Path(__file__).parent
BEGIN, END = "<!-- cost: begin (written by cost.py) -->", "<!-- cost: end -->"
WARM_UP_TOKENS, TOKENS = 8, 48
SHARE_OF_WEIGHTS = 0.5
PREDICTS: dict[type, tuple[str, ...]] = {
    PassSchedule: ("record", "distances", "cycles"),
    ResidentSet: ("_follow_order", "_replan", "_expected_pages", "victims"),
    PredictiveSwappingAlgorithm: ("insert", "touch", "left", "remove"),
    MemoryTieringSystem: ("note", "waits", "forget"),
    LightweightMLPredictor: ("train", "observe", "predict"),
    PredictiveGarbageCollector: ("_end_round", "_collect_from"),
}


class Meter:
    """Adds up the time that threads spend in prediction; what one part calls of another counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0
        self._inside = threading.local()

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "yes", False):
                return function(*args, **kwargs)
            self._inside.yes, start = True, time.perf_counter()
            try:
                found = function(*args, **kwargs)
                # Lists and dictionaries are made by now; an iterator works when it is asked.
                return self._iterate(found) if isinstance(found, Iterator) else found
            finally:
                self._add(start)

        return call

    def _iterate(self, found: Iterator[Any]) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            try:
                value = next(found)
            except StopIteration:
                return
            finally:
                self._add(start)
            yield value

    def _add(self, start: float) -> None:
        self._inside.yes = False
        self.seconds += time.perf_counter() - start
        self.calls += 1


def measure(directory: Path, meter: Meter) -> dict[str, float]:
    """Return seconds of decoding, and of prediction in them."""
    with tempfile.TemporaryDirectory() as cache:
        settings = {"codec": "none", "cache_dir": cache, "enable_cache_hierarchy": False}
        whole = create_optimized_model(directory, settings)
        weights = sum(use.encoded_bytes for use in whole.memory_optimizer.pager.usage())
        whole.memory_optimizer.close()
        settings["tensor_budget"] = int(SHARE_OF_WEIGHTS * weights) + weights_beside(whole)
        model = create_optimized_model(directory, settings)
        prompt = tiny.batch([tiny.prompt("what shape?", n_images=0)], None)
        marks: list[tuple[float, float, int]] = []

        class Clock(torch.nn.Module):
            def put(self, value: Any) -> None:
                marks.append((time.perf_counter(), meter.seconds, meter.calls))

            def end(self) -> None:
                pass

        length = WARM_UP_TOKENS + TOKENS
        with torch.no_grad():
            model.generate(**prompt, max_new_tokens=length, min_new_tokens=length, do_sample=False, streamer=Clock())
        (start_s, before_s, before), (end_s, after_s, after) = marks[WARM_UP_TOKENS], marks[-1]
        tokens = len(marks) - 1 - WARM_UP_TOKENS
        optimizer = model.memory_optimizer
        stats = optimizer.pager.stats
        optimizer.close()
        return {
            "token_ms": 1000 * (end_s - start_s) / tokens,
            "prediction_us": 1e6 * (after_s - before_s) / tokens,
            "calls": (after - before) / tokens,
            "share": (after_s - before_s) / (end_s - start_s),
            "read_mb": stats.bytes_read / 1e6,
        }


def weights_beside(model: Any) -> int:
    """Return the bytes that stay whatever happens: a budget has to hold them."""
    return model.memory_optimizer.pager.ledger.held_bytes("small weights")


def report(directories: list[Path]) -> Iterator[str]:
    """Give the lines of the table."""
    meter = Meter()
    for owner, names in PREDICTS.items():
        for name in names:
            setattr(owner, name, meter.timed(getattr(owner, name)))
    yield ""
    yield f"{results.machine_line(results.machine())} {results.now()}, at {results.commit()}."
    yield ""
    yield "| model | time per token | of it prediction | share | calls per token |"
    yield "|" + "---|" * 5
    for directory in directories:
        row = measure(directory, meter)
        assert row["read_mb"] > 0, "it fits, and nothing is foretold"
        costs = f"{row['prediction_us']:.0f} us | {100 * row['share']:.2f} % | {row['calls']:.0f}"
        yield f"| {directory.name} | {row['token_ms']:.1f} ms | {costs} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", default=[tiny.DIRECTORY])
    lines = list(report(parser.parse_args().models))
    print("\n".join(lines))
    results.write_between(HERE / "README.md", BEGIN, END, [*lines, ""])


if __name__ == "__main__":
    main()
