"""Choose the product kernels for this machine.

Kernels round differently, so the choice depends only on a product's shape and dtype and on the three machine
properties below. Timing kernels on live products gave different results for the same input
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
"""AVX512-BF16 takes a quarter of the fp32 time, AVX512 without it 1.25 times, AVX2 3.8 times (measured)."""


@lru_cache(maxsize=1)
def int8_product_saturates() -> bool:
    """Return whether this machine's INT8 product saturates.

    Without VNNI, oneDNN adds 128 to the left operand and multiplies pairs into 16-bit sums, which saturate above
    32767. The result is then silently wrong by any amount, so this is tested, not assumed.
    """
    left = torch.full((4, 64), 127, dtype=torch.int8)
    right = torch.full((64, 64), 127, dtype=torch.int8)
    return int(torch._int_mm(left, right.t())[0, 0]) != 64 * 127 * 127


@lru_cache(maxsize=1)
def has_fast_int8_row() -> bool:
    """Return whether one row times an INT8 matrix is fast as an integer product.

    With AVX512, oneDNN reads the matrix up to three times as fast as torch's weight-only kernel. With AVX2-VNNI it
    takes more than twice as long.
    """
    return torch.backends.cpu.get_cpu_capability().upper().startswith("AVX512")


class _Bf16Cost:
    """Time of bf16 products relative to fp32: measured at first use unless an earlier measurement is set."""

    def __init__(self) -> None:
        self.value: float | None = None


_bf16_cost = _Bf16Cost()


def bf16_cost() -> float:
    """Return the time of a bf16 product relative to the same product in fp32 (measured once, in about 30 ms).

    It is measured while a model loads and other threads read. Wall-clock time with all threads rated bf16 as fast on
    AVX2 in half of the starts. So one thread multiplies, and its CPU time counts.
    """
    if _bf16_cost.value is None:
        _bf16_cost.value = _measured_bf16_cost()
    return _bf16_cost.value


def use_bf16_cost(cost: float) -> None:
    """Use an earlier measurement from this machine, unless this process already has one."""
    if _bf16_cost.value is None:
        _bf16_cost.value = cost


def fastest_dtype() -> torch.dtype:
    """Return the dtype to compute in on this machine, bf16 or fp32.

    The stored format need not be the compute format: without AVX512-BF16 or AMX, bf16 products fall back to code 2.5
    to 50 times slower than fp32 (design, "Compression"). If the two are close, bf16 halves the memory for activations
    and the KV cache, and computes on weights as stored.
    """
    return torch.bfloat16 if bf16_cost() < _CLOSE else torch.float32


def has_native_bf16() -> bool:
    """Return whether bf16 products are clearly faster than fp32, as with AVX512-BF16 or AMX."""
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
