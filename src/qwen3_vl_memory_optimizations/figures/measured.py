"""Measurements of this machine: memory bandwidth, and the allocation speedup of pools."""

from __future__ import annotations

import time
from collections.abc import Callable
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
_LONGEST_S = 0.5


def memory_bandwidth(n_bytes: int) -> float:
    """Measure the read bandwidth of all threads in bytes/s by summing a tensor of `n_bytes`."""
    block = torch.ones(n_bytes // 4, dtype=torch.float32)
    return n_bytes / best_seconds(block.sum, runs=7)


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


def best_seconds(run: Callable[[], Any], runs: int) -> float:
    """Return the time of the fastest of several runs after a warm-up; slow runs are repeated less."""
    begin = time.perf_counter()
    run()
    best = time.perf_counter() - begin
    for _ in range(runs):
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        best = min(best, end - start)
        # Slow bf16 fallbacks take long enough in one run.
        if end - begin > _LONGEST_S:
            break
    return best
