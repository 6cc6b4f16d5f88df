"""Which kernel computes a product: measured at first use, for each class of problem, on the machine at hand.

No constant decides: which of torch's kernels is fastest depends on the instruction set, the number of rows and the
shape (on AVX2, bf16 products lose to fp32; on AVX512-BF16 they win).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch

_TIMED_RUNS = 3
_MARGIN = 0.9
"""A less exact kernel must take less than this share of the time of the exact ones to be chosen."""


@dataclass(slots=True)
class KernelChoice:
    """The kernel chosen for one class of problems and the seconds each candidate took."""

    name: str
    seconds: dict[str, float] = field(default_factory=dict)


class KernelSelector:
    """Chooses among kernels by timing them once for each class of problem.

    Args:
        timer: a monotonic clock in seconds.
    """

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self._timer = timer
        self._choices: dict[Hashable, KernelChoice] = {}

    def run(self, key: Hashable, candidates: Mapping[str, Callable[[], torch.Tensor]]) -> torch.Tensor:
        """Run the kernel chosen for `key`; at the first call all candidates are timed.

        Args:
            key: the class of the problem (rows, columns, dtype...).
            candidates: name -> computation, in order of preference when speeds are close.
        """
        choice = self._choices.get(key)
        if choice is not None and choice.name in candidates:
            return candidates[choice.name]()
        choice = KernelChoice("")
        results: dict[str, torch.Tensor] = {}
        for name, compute in candidates.items():
            seconds = []
            for _ in range(_TIMED_RUNS):
                start = self._timer()
                results[name] = compute()
                seconds.append(self._timer() - start)
            choice.seconds[name] = min(seconds)
            if not choice.name or choice.seconds[name] < _MARGIN * choice.seconds[choice.name]:
                choice.name = name
        self._choices[key] = choice
        return results[choice.name]

    def choices(self) -> dict[Hashable, KernelChoice]:
        """Return what was measured and chosen so far."""
        return dict(self._choices)


def row_class(n_rows: int) -> int:
    """Return the class of a number of rows: the next power of two, at most 1024."""
    return min(1 << max(0, n_rows - 1).bit_length(), 1024)


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
def fastest_dtype() -> torch.dtype:
    """Return the dtype whose matrix products are fastest here, bf16 or fp32, by measurement (about 30 ms).

    The format stored is not the format computed in: without AVX512-BF16 or AMX, bf16 products fall back to code 2.5 to
    50 times slower than fp32 (design, "Compression").
    """
    rows, columns = 64, 1024
    best = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, w = torch.ones(rows, columns, dtype=dtype), torch.ones(columns, columns, dtype=dtype)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            seconds.append(time.perf_counter() - start)
        best[dtype] = min(seconds)
    return torch.bfloat16 if best[torch.bfloat16] < best[torch.float32] else torch.float32
