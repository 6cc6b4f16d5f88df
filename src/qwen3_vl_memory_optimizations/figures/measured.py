"""Measurements of this machine: memory bandwidth, and the allocation speedup of pools."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..paging import alias_memory
from ..pools import FRAME_BYTES, FramePool, TensorPool
from ..process import trim_heap

BANDWIDTH_BYTES = 64 << 20
"""Larger than the caches of supported processors."""
ALLOCATION_BYTES = 32 << 20
"""From this size on, glibc allocates from the system unless its heap has a hole that large."""
_RUNS = 5
READINGS = 7
_SLOW_READINGS, _LONGEST_S = 2, 0.5
_LEAST_READING_S = 0.02
_WARM_UP_READINGS = 3


def memory_bandwidth(n_bytes: int) -> float:
    """Measure the read bandwidth of all threads in bytes/s by summing a tensor of `n_bytes`."""
    return read_bandwidth(n_bytes).per_s


def read_bandwidth(n_bytes: int, *, readings: int = READINGS) -> Reading:
    """Measure the read bandwidth of all threads in bytes/s, with its spread."""
    block = torch.ones(n_bytes // 4, dtype=torch.float32)
    return read_rates({"": (block.sum, n_bytes)}, readings=readings)[""]


def allocation_speedup(n_bytes: int = ALLOCATION_BYTES, timer: Callable[[], float] = time.perf_counter) -> float:
    """Measure how many times faster a pool allocates a block than `torch.empty`, first touch included.

    Both allocate `n_bytes` and write one byte per page. `torch.empty` gets memory from the system. The pool moves the
    frames of a freed block to a new address, as for a tensor of another size. The best of five runs counts for each.
    Uses `n_bytes` of memory meanwhile.

    Args:
        n_bytes: a multiple of the page size.
        timer: a monotonic clock in seconds.
    """
    fresh_s = pooled_s = float("inf")
    for _ in range(_RUNS):
        trim_heap()  # a heap hole with memory would act as a pool
        start_s = timer()
        block = torch.empty(n_bytes, dtype=torch.uint8)
        block[::FRAME_BYTES] = 1
        fresh_s = min(fresh_s, timer() - start_s)
        del block
    pool, frames = TensorPool((_RUNS + 1) * n_bytes), FramePool(n_bytes)
    try:
        for run in range(_RUNS + 1):
            start_s = timer()
            address = pool.allocate(n_bytes)
            frames.back(address, n_bytes, owner=pool.kind)
            alias_memory(address, n_bytes)[::FRAME_BYTES] = 1
            took_s = timer() - start_s
            pooled_s = min(pooled_s, took_s if run else pooled_s)  # the first run has no frames to reuse
            frames.release(address, n_bytes)
    finally:
        pool.close()
    return fresh_s / pooled_s


@dataclass(frozen=True, slots=True)
class Reading:
    """A rate, read several times.

    Attributes:
        per_s: the median.
        spread: the range of the middle half of the readings over their median; large if the machine is busy.
    """

    per_s: float
    spread: float

    @classmethod
    def of(cls, rates: Sequence[float]) -> Reading:
        """Return the median of rates, and their spread."""
        middle = statistics.median(rates)
        if len(rates) < 2:
            return cls(middle, 0.0)
        quarters = statistics.quantiles(rates, n=4, method="inclusive")
        return cls(middle, (quarters[2] - quarters[0]) / middle)


def read_rates(
    runs: Mapping[str, tuple[Callable[[], Any], float]],
    *,
    readings: int = READINGS,
    least_s: float = _LEAST_READING_S,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, Reading]:
    """Measure rates: after a warm-up, each is read in turn, so that a disturbance does not hit one of them alone.

    A reading is the fastest of the runs within it: what interrupts a run is not part of its rate.

    Args:
        runs: name -> what to run, and the work of one run.
        readings: per rate; slow runs are read twice.
        least_s: how long a reading lasts at least; short runs are repeated within it.
        timer: a monotonic clock in seconds.

    Returns:
        Name -> work per second.
    """
    for run, _ in runs.values():
        _fastest_s(run, _WARM_UP_READINGS * least_s, timer)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(readings):
        for name, (run, work) in runs.items():
            if turn < _SLOW_READINGS or work / rates[name][-1] < _LONGEST_S:
                rates[name].append(work / _fastest_s(run, least_s, timer))
    return {name: Reading.of(found) for name, found in rates.items()}


def _fastest_s(run: Callable[[], Any], least_s: float, timer: Callable[[], float]) -> float:
    """Run again and again for some time, once at least; return the time of the fastest run."""
    start_s = timer()
    fastest_s = math.inf
    while True:
        before_s = timer()
        run()
        now_s = timer()
        fastest_s = min(fastest_s, now_s - before_s)
        if now_s - start_s >= least_s:
            return fastest_s
