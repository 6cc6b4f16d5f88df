"""What decides which kernel computes a product on this machine.

Kernels round differently, so the one for a product follows from its shape and dtype and from the three properties of
the machine below. Timing kernels on live products instead gave one input several answers
(docs/adr/0018-kernels-by-rule.md).
"""

from __future__ import annotations

import math
import time
from functools import lru_cache

import torch

_FINE_S = 1e-5
_CLOSE = 2.0
_NATIVE = 0.4
"""AVX512-BF16 takes a quarter of the time of fp32, AVX512 without it 1.25 times, AVX2 3.8 times (measured)."""


@lru_cache(maxsize=1)
def int8_product_saturates() -> bool:
    """Whether this machine's INT8 product loses carries.

    Without VNNI, oneDNN adds 128 to the left operand and multiplies pairs into 16-bit sums, which saturate above
    32767. The result is then wrong by any amount, silently; so it is tested, not assumed.
    """
    left = torch.full((4, 64), 127, dtype=torch.int8)
    right = torch.full((64, 64), 127, dtype=torch.int8)
    return int(torch._int_mm(left, right.t())[0, 0]) != 64 * 127 * 127


@lru_cache(maxsize=1)
def has_fast_int8_row() -> bool:
    """Whether one row times an INT8 matrix is fast as an integer product.

    With AVX512 oneDNN reads the matrix up to three times as fast as torch's weight-only kernel does. With AVX2-VNNI it
    takes more than twice as long.
    """
    return torch.backends.cpu.get_cpu_capability().upper().startswith("AVX512")


class _Bf16Cost:
    """The time of bf16 products in that of fp32 ones: measured at first use, unless it was kept by a process before."""

    def __init__(self) -> None:
        self.value: float | None = None


_bf16_cost = _Bf16Cost()


def bf16_cost() -> float:
    """Return how long a bf16 product takes here, as a multiple of the same product in fp32 (about 30 ms once).

    It is asked while a model is loaded and other threads read: by the clock, with all threads, it found bf16 fast on
    AVX2 in half of the starts. So one thread multiplies, and the time that it had the processor counts.
    """
    if _bf16_cost.value is None:
        _bf16_cost.value = _measured_bf16_cost()
    return _bf16_cost.value


def use_bf16_cost(cost: float) -> None:
    """Use what was measured on this machine before; in a process that has a figure already, that one stays."""
    if _bf16_cost.value is None:
        _bf16_cost.value = cost


def fastest_dtype() -> torch.dtype:
    """Return the dtype to compute in here, bf16 or fp32.

    The format stored is not the format computed in: without AVX512-BF16 or AMX, bf16 products fall back to code 2.5 to
    50 times slower than fp32 (design, "Compression"). Where the two are close, bf16 takes half the memory for
    activations and the KV cache, and computes on weights as they are stored.
    """
    return torch.bfloat16 if bf16_cost() < _CLOSE else torch.float32


def has_native_bf16() -> bool:
    """Whether bf16 products are clearly faster than fp32 ones, as with AVX512-BF16 or AMX."""
    return bf16_cost() < _NATIVE


def _measured_bf16_cost() -> float:
    rows, columns = 64, 1024
    problems = {
        dtype: (torch.ones(rows, columns, dtype=dtype), torch.ones(columns, columns, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    }
    fine = time.get_clock_info("thread_time").resolution < _FINE_S
    timer = time.thread_time if fine else time.perf_counter
    best = dict.fromkeys(problems, math.inf)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            for dtype, problem in problems.items():
                start = timer()
                torch.nn.functional.linear(*problem)
                best[dtype] = min(best[dtype], timer() - start)
    finally:
        torch.set_num_threads(n_threads)
    return best[torch.bfloat16] / max(best[torch.float32], 1e-9)
