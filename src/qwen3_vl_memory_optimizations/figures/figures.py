"""`MemoryFigures`: figures read from the counters of an optimizer, from which its metrics are computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..compression import EncodingCounters, EncodingLog
from ..errors import ConfigurationError, MemoryBudgetExceeded
from ..model.checkpoint.packed_encodings import PackedEncodings
from ..model.checkpoint.packing import plan_path_of
from ..model.checkpoint.plan import CompressionPlan
from ..model.run.response_times import ResponseTimes
from ..paging import PROCESS, TENSORS, Pager, TensorUse
from ..pools import AdvancedMemoryPool
from ..process import process_memory, usable_memory
from ..runtime_policy import ShadowLRU
from .measured import ALLOCATION_BYTES, BANDWIDTH_BYTES, allocation_speedup, memory_bandwidth
from .verdict import Verdict, judge

_CACHE = "cache"
_ACCOUNT = "measuring"
_MEASUREMENTS: dict[str, tuple[int, Callable[[int], float]]] = {
    "allocation_speedup": (ALLOCATION_BYTES, allocation_speedup),
    "memory_bandwidth": (BANDWIDTH_BYTES, memory_bandwidth),
}


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Non-evictable memory and the capacity.

    Attributes:
        undroppable_bytes: non-evictable bytes of the process or, with `tensor_budget` alone, of the managed tensors.
        capacity_bytes: the budget, or without one the machine's memory.
    """

    undroppable_bytes: int
    capacity_bytes: int

    @property
    def share(self) -> float:
        """Non-evictable share of the capacity."""
        return self.undroppable_bytes / self.capacity_bytes


@dataclass(slots=True)
class MemoryFigures:
    """Reads the counters of an optimizer; has no side effects except those of `measure`.

    `None` means not measurable, or not measured yet.

    Args:
        pager: source of the paging counters.
        pool: pools of runtime tensors; `None`: no pooling.
        timer: a monotonic clock in seconds.

    Attributes:
        encodings: log of encodings in this process.
        responses: response times of the model.
        shadow: LRU run on the actual accesses, for comparison.
        packed_dirs: weight name prefix -> packed checkpoint of that model.
        peak_before_bytes: peak resident memory of the process before the model, which is not charged to the budget.
    """

    pager: Pager
    pool: AdvancedMemoryPool | None = None
    timer: Callable[[], float] = time.monotonic
    encodings: EncodingLog = field(init=False)
    responses: ResponseTimes = field(init=False)
    shadow: ShadowLRU = field(init=False)
    packed_dirs: dict[str, Path] = field(init=False, default_factory=dict)
    peak_before_bytes: int = field(init=False)
    _start_s: float = field(init=False)
    _measured: dict[str, float] = field(init=False, default_factory=dict)
    _measuring: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        stats, frames = self.pager.stats, self.pager.frames
        self.encodings = self.pager.encodings
        self.responses = ResponseTimes(lambda: stats.hit_bytes + stats.miss_bytes, paging=stats)
        self.shadow = ShadowLRU(stats, lambda: frames.limit_bytes, self.pager.entries)
        self.pager.listen(self.shadow, to_all=True)
        self.peak_before_bytes = process_memory().peak_rss_bytes
        self._start_s = self.timer()

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return self.timer() - self._start_s

    def peak_bytes(self) -> int:
        """Return the peak resident memory of the process since the model began, or the current one if that is lower
        than an earlier peak.
        """
        memory = process_memory()
        return memory.peak_rss_bytes if memory.peak_rss_bytes > self.peak_before_bytes else memory.rss_bytes

    # --- weights and moves --------------------------------------------------------------------------------------------

    def compression(self, uses: Iterable[TensorUse] | None = None) -> dict[str, EncodingCounters]:
        """Return encoding counters by kind: weights as managed now, all others since the start.

        The error of a weight comes from its compression plan, or was sampled during encoding. If any is unknown, the
        error of weights is unknown. Encoding speeds are those of the process that encoded them.
        """
        all_known, errors = True, self._weight_errors()
        rows = self.encodings.rows()
        weights = rows.get("weights", EncodingCounters())
        weights.original_bytes = weights.encoded_bytes = weights.sampled_bytes = 0
        weights.error_bytes = 0.0
        for use in self.pager.usage() if uses is None else uses:
            if use.kind == "weights":
                weights.original_bytes += use.original_bytes
                weights.encoded_bytes += use.encoded_bytes + use.beside_bytes
                error = 0.0 if use.lossless else errors.get(use.tensor_id)
                all_known = all_known and error is not None
                weights.error_bytes += (error or 0.0) * use.original_bytes
        rows.pop("weights", None)
        if weights.encoded_bytes:
            weights.sampled_bytes = weights.original_bytes if all_known else 0
            weights.error_bytes = weights.error_bytes if all_known else 0.0
            rows["weights"] = weights
        return rows

    def _weight_errors(self) -> Mapping[str, float]:
        """Return errors by tensor; those recorded by packing are loaded on first use."""
        for prefix, directory in list(self.packed_dirs.items()):
            if self.packed_dirs.pop(prefix, None) is None:
                continue  # loaded by another thread
            kept = PackedEncodings.load(directory)
            self.encodings.add("weights", kept.counted)
            self.encodings.weight_errors |= {prefix + name: error for name, error in kept.errors.items()}
            try:
                plan = CompressionPlan.load(plan_path_of(directory))
            except ConfigurationError:  # packed without a plan, or the plan was removed
                continue
            for name, weight in plan.weights.items():
                if weight.relative_error is not None:
                    self.encodings.weight_errors[prefix + name] = weight.relative_error
        return self.encodings.weight_errors

    def moves(self) -> int:
        """Return pages moved between SSD and memory since the start."""
        stats = self.pager.stats
        return stats.page_reads + stats.evictions + stats.swap_writes

    # --- measured -----------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Take the measurements that the metrics need, once: 0.3 s, using up to 64 MiB."""
        if self.pool is not None:
            self.measured("allocation_speedup")
        self.measured("memory_bandwidth")

    def measured(self, name: str, *, measure: bool = True) -> float | None:
        """Return a measurement of this machine, taken once; `None`: not taken, or no room for it in the budget.

        Args:
            name: `allocation_speedup`, or `memory_bandwidth` in bytes per second.
            measure: take it if it is missing.
        """
        n_bytes, run = _MEASUREMENTS[name]
        with self._measuring:
            if name not in self._measured and measure:
                try:
                    self.pager.debit(_ACCOUNT, n_bytes, PROCESS)
                except MemoryBudgetExceeded:
                    return None
                try:
                    self._measured[name] = run(n_bytes)
                finally:
                    self.pager.debit(_ACCOUNT, -n_bytes, PROCESS)
            return self._measured.get(name)

    # --- pools and memory

    def verdict(self) -> Verdict:
        """Return what limits decoding, from the last 64 decode steps."""
        ledger = self.pager.ledger
        return judge(
            self.responses.steps.recent(),
            budget_bytes=ledger.ram_budget_bytes or ledger.tensor_budget_bytes,
            available_bytes=usable_memory()[1],
            bandwidth=self.measured("memory_bandwidth", measure=False),
        )

    def fragmentation(self) -> float | None:
        """Return the highest external fragmentation of any typed pool: 1 - largest hole / free bytes.

        Page frames have none: they can be moved between addresses, so any free frame is usable.
        """
        shares = (row["external_fragmentation"] for row in self.pools().values())
        return max((share for share in shares if share is not None), default=None)

    def pools(self) -> dict[str, dict[str, float | int | None]]:
        """Return the statistics of each typed pool; empty without pooling."""
        if self.pool is None:
            return {}
        with self.pager.exclusive():  # pools change under this lock
            return self.pool.stats()

    def occupancy(self, uses: Iterable[TensorUse] | None = None) -> Occupancy:
        """Return the non-evictable memory.

        A budget is meant to be full: clean weights stay until the room is needed, and cached results are evicted for
        anything else, so neither counts. What counts is the rest of the process (including reservations of forward
        passes and budget withheld under outside pressure), and managed pages in use or dirty.
        """
        ledger = self.pager.ledger
        uses = list(self.pager.usage() if uses is None else uses)
        managed = sum(use.undroppable_bytes for use in uses)
        if ledger.ram_budget_bytes is not None:
            accounts = ledger.accounts()
            return Occupancy(sum(accounts.values()) - accounts.get(_CACHE, 0) + managed, ledger.ram_budget_bytes)
        if ledger.tensor_budget_bytes is not None:
            accounts = ledger.accounts(TENSORS)
            return Occupancy(sum(accounts.values()) - accounts.get(_CACHE, 0) + managed, ledger.tensor_budget_bytes)
        clean = sum(use.resident_bytes for use in uses) - managed
        others = process_memory().anonymous_bytes - clean - ledger.held_bytes(_CACHE)
        return Occupancy(max(0, others), usable_memory()[0])
