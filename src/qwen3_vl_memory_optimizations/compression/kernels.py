"""Which kernel computes a product: measured at first use, for each class of problem, on the machine at hand.

No constant decides: which of torch's kernels is fastest depends on the instruction set, the number of rows and the
shape (on AVX2, bf16 products lose to fp32; on AVX512-BF16 they win).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import torch

_Result = TypeVar("_Result")

_LEAST_RUNS, _MOST_RUNS, _ENOUGH_S = 3, 20, 0.02
_FINE_S = 1e-5
_FIRST_RETRY, _WORTH_A_RETRY = 8, 4.0
_CLOSE = 2.0
_MARGIN = 0.95
"""A kernel must take less than this share of the time of those before it in the order of preference to be chosen."""


@dataclass(slots=True)
class KernelChoice:
    """The kernel chosen for one class of problems; empty while candidates are still being timed.

    Attributes:
        name: the chosen one.
        seconds: the least that each candidate took a unit of work.
        runs: how often each candidate was timed; its first run warms up and is not.
        spent_s: the time of those runs.
        calls: runs since the choice was made.
    """

    name: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    spent_s: dict[str, float] = field(default_factory=dict)
    calls: int = 0

    def settled(self, name: str) -> bool:
        """Whether a candidate was timed enough: short runs are noisy, so there are more of them."""
        return self.runs[name] >= _LEAST_RUNS and (self.spent_s[name] >= _ENOUGH_S or self.runs[name] >= _MOST_RUNS)


class KernelSelector:
    """Chooses among kernels by timing them for each class of problem, a few times each.

    Candidates take turns on real work: no result is computed twice, and each one meets weights as they come from
    memory. (Timed again and again on one weight they would find it in the cache, where other kernels win.) The first
    runs fall into the pass that reads the weights and grows the heap, so one that came close is timed again at the
    calls 8, 16, 32 and so on.

    Args:
        timer: a monotonic clock in seconds.
    """

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self._timer = timer
        self._lock = threading.Lock()  # several threads may compute; none computes while it is held
        self._choices: dict[Hashable, KernelChoice] = {}

    def chosen(self, key: Hashable) -> str | None:
        """Return the kernel chosen for `key` if it is to be used without being timed; otherwise call `run`."""
        choice = self._choices.get(key)
        if choice is None or not choice.name or _is_retry(choice.calls + 1):
            return None
        choice.calls += 1
        return choice.name

    def run(self, key: Hashable, candidates: Mapping[str, Callable[[], _Result]], work: float = 1.0) -> _Result:
        """Run the kernel chosen for `key`, or, while none is, the candidate that was timed least.

        Args:
            key: the class of the problem (rows, columns, dtype...); candidates of one key have the same names.
            candidates: name -> computation, in order of preference when speeds are close.
            work: the size of this problem, in any unit that time grows with.
        """
        with self._lock:
            choice = self._choices.get(key)
            if choice is None:
                choice = self._choices[key] = KernelChoice(
                    runs=dict.fromkeys(candidates, -1), spent_s=dict.fromkeys(candidates, 0.0)
                )
            name, is_timed = choice.name, True
            if not name:
                unsettled = [each for each in candidates if not choice.settled(each)]
                name = min(unsettled, key=choice.runs.__getitem__)
            else:
                choice.calls += 1
                is_timed = _is_retry(choice.calls)
                if is_timed:
                    limit = _WORTH_A_RETRY * choice.seconds[name]
                    close = [each for each in candidates if choice.seconds[each] <= limit]
                    name = close[choice.calls.bit_length() % len(close)]
        if not is_timed:
            return candidates[name]()
        start = self._timer()
        result = candidates[name]()
        seconds = self._timer() - start
        with self._lock:
            self._note(choice, name, candidates, seconds, work)
        return result

    @staticmethod
    def _note(choice: KernelChoice, name: str, candidates: Iterable[str], seconds: float, work: float) -> None:
        choice.runs[name] += 1
        if choice.runs[name] > 0:
            choice.spent_s[name] += seconds
            choice.seconds[name] = min(seconds / work, choice.seconds.get(name, math.inf))
        if all(choice.settled(candidate) for candidate in candidates):
            chosen = ""
            for candidate in candidates:
                if not chosen or choice.seconds[candidate] < _MARGIN * choice.seconds[chosen]:
                    chosen = candidate
            choice.name = chosen

    def choices(self) -> dict[Hashable, KernelChoice]:
        """Return what was measured and chosen so far."""
        return dict(self._choices)


def _is_retry(calls: int) -> bool:
    return calls >= _FIRST_RETRY and not calls & (calls - 1)


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
    """Return the dtype to compute in here, bf16 or fp32, by measurement (about 30 ms).

    The format stored is not the format computed in: without AVX512-BF16 or AMX, bf16 products fall back to code 2.5 to
    50 times slower than fp32 (design, "Compression"). Where the two are close, bf16 takes half the memory for
    activations and the KV cache, and computes on weights as they are stored.

    It is asked while a model is loaded and other threads read: by the clock, with all threads, it found bf16 on AVX2 in
    half of the starts. So one thread multiplies, and the time that it had the processor counts.
    """
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
    return torch.bfloat16 if best[torch.bfloat16] < _CLOSE * best[torch.float32] else torch.float32
