"""Codecs on this machine: GB/s of each, and how often the selector picks what trying every method finds best.

A pick counts as right when no other method measures better, and as a tie when one does by less than 10 %: of times of
a few microseconds no more can be said. Times are those of one core that computes, so that what else runs on
the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.compression.cases import SORTS, draw, exhaustive  # noqa: E402
from qwen3_vl_memory_optimizations.compression import CompressionMethodSelector, create_codec, measure_codec_speeds
from qwen3_vl_memory_optimizations.compression.kernels import fastest_dtype  # noqa: E402
from qwen3_vl_memory_optimizations.compression.selection import relative_error  # noqa: E402
from qwen3_vl_memory_optimizations.compression.speeds import machine_name, timed  # noqa: E402

_TIE = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first case")
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the matrices that are coded")
    arguments = parser.parse_args()
    coding = {name: coding_speed(name, arguments.size) for name in ("int8", "fp16", "int4", "sparse", "svd")}
    print(
        json.dumps(
            {"machine": machine_name(), "coding": coding, "selector": agreement(arguments.first, arguments.cases)},
            indent=1,
        )
    )


def coding_speed(name: str, size: int) -> dict[str, object]:
    """Return GB/s of one core, of the 16-bit side, and the relative error."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values = torch.randn(size, size)
        if name == "sparse":
            values[torch.rand(size, size) < 0.9] = 0
        if name == "svd":
            values = torch.randn(size, 16) @ torch.randn(16, size)
        values = values.float() if name == "fp16" else values.bfloat16()
        codec = create_codec(name).fit(lambda: values)
        encoded, out = codec.encode(values), torch.empty(size, size, dtype=torch.bfloat16)
        best = {"encode": 9e9, "decode": 9e9}
        runs = {"encode": lambda: codec.encode(values), "decode": lambda: codec.decode(encoded, out)}
        for _ in range(9):
            for operation, run in runs.items():
                start = time.thread_time()  # of the core, whatever else runs on it
                run()
                best[operation] = min(best[operation], time.thread_time() - start)
        bytes_16 = 2 * values.numel()
        error = relative_error(values, codec.decode(encoded, torch.empty_like(values)))
        rates = {f"{name}_gb_per_s": round(bytes_16 / seconds / 1e9, 2) for name, seconds in best.items()}
        stored = sum(segment.nbytes for segment in encoded.values())
        return rates | {"bytes_of_16_bit": round(stored / bytes_16, 3), "relative_error": round(error, 5)}
    finally:
        torch.set_num_threads(threads)


def agreement(first: int, cases: int) -> dict[str, object]:
    """Return how often the selector picks what is best when all methods are tried and timed on the whole tensor."""
    dtype = fastest_dtype()
    torch.set_num_threads(1)
    speeds = measure_codec_speeds(dtype=dtype, timer=time.thread_time)
    selector = CompressionMethodSelector(speeds)
    tolerance = selector.tolerances["weights"]
    right = ties = 0
    picks: dict[str, Counter[str]] = {sort: Counter() for sort in SORTS}
    wrong = []
    for number in range(first, first + cases):
        sort, access, matrix = draw(number, dtype)
        chosen = selector.explain(matrix, kind="weights", access=access).chosen
        costs = exhaustive(
            matrix,
            access,
            tolerance,
            speeds.ssd_bytes_per_s,
            lambda codec, values: timed(codec, values, time.thread_time),
        )
        best = min(costs, key=costs.__getitem__)
        picks[sort][chosen] += 1
        right += chosen == best
        if chosen != best:
            tie = costs[chosen] <= _TIE * costs[best]
            ties += tie
            if not tie:
                wrong.append(f"{number}: {sort}, {access}, {list(matrix.shape)}: {chosen}, best {best} ({costs})")
                print(f"\n{wrong[-1]}", file=sys.stderr)
        print(f"{number + 1 - first}: {right} right, {ties} ties, {len(wrong)} wrong", end="\r", file=sys.stderr)
    return {
        "cases": cases,
        "dtype": str(dtype),
        "right": right,
        "ties": ties,
        "share": round((right + ties) / cases, 3),
        "picks": {sort: dict(counter) for sort, counter in picks.items()},
        "wrong": wrong,
        "speeds": speeds.to_dict(),
    }


if __name__ == "__main__":
    with torch.inference_mode():
        main()
