"""Choose the dtype to compute in on this machine.

Kernels round differently, so the choice depends only on a property of the machine. Timing kernels on live products gave
different results for the same input (docs/adr/0018-kernels-by-rule.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F

_Key = TypeVar("_Key", bound=Hashable)

_FINE_S = 1e-5
_CLOSE = 2.0
_NATIVE = 0.4
"""AVX512-BF16 takes a quarter of the fp32 time, AVX512 without it 1.25 times, AVX2 3.8 times (measured)."""


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
    best = _best_s({dtype: partial(F.linear, *problem) for dtype, problem in problems.items()})
    return best[torch.bfloat16] / max(best[torch.float32], 1e-9)


def _best_s(products: Mapping[_Key, Callable[[], object]]) -> dict[_Key, float]:
    """Return the least CPU time of each product in five turns, with one thread."""
    fine = time.get_clock_info("thread_time").resolution < _FINE_S
    timer = time.thread_time if fine else time.perf_counter
    best = dict.fromkeys(products, math.inf)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            for name, product in products.items():
                start = timer()
                product()
                best[name] = min(best[name], timer() - start)
    finally:
        torch.set_num_threads(n_threads)
    return best
