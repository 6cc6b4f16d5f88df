"""`MemoryFigures`: the metrics of section 7.1 from the counters of an optimizer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..cache import HierarchicalCacheSystem
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

METRICS = (
    "pool_utilization_rate",
    "allocation_speedup",
    "cache_hit_rate",
    "cache_efficiency",
    "compression_ratio",
    "compression_quality",
    "swap_operations_count",
    "swap_efficiency",
    "tier_migration_rate",
    "tier_optimization_effectiveness",
    "gc_success_rate",
    "predicted_lifetime_accuracy",
    "memory_bandwidth_utilization",
    "cache_hit_improvement",
)
"""The keys of section 7.1."""

_CACHE = "cache"
_MEASURING = "measuring"


class CollectorFigures(Protocol):
    """Figures reported by a predictive collector."""

    def success_rate(self) -> float | None:
        """Return the share of collected items not needed again."""

    def lifetime_accuracy(self) -> float | None:
        """Return the share of correct lifetime predictions."""


class TieringFigures(Protocol):
    """Figures reported by a tiering system."""

    def effectiveness(self) -> float | None:
        """Return the share of prefetched tensors used before they left again; `None` before the first."""


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
        cache: result cache, if any.
        collector: predictive collector, if any.
        tiering: tiering system that prefetches runtime tensors, if any.
        timer: a monotonic clock in seconds.

    Attributes:
        encodings: log of encodings in this process.
        responses: response times of the model.
        shadow: LRU run on the actual accesses, for comparison.
        packed_dirs: weight name prefix -> packed checkpoint of that model.
    """

    pager: Pager
    pool: AdvancedMemoryPool | None = None
    cache: HierarchicalCacheSystem | None = None
    collector: CollectorFigures | None = None
    tiering: TieringFigures | None = None
    timer: Callable[[], float] = time.monotonic
    encodings: EncodingLog = field(init=False)
    responses: ResponseTimes = field(init=False)
    shadow: ShadowLRU = field(init=False)
    packed_dirs: dict[str, Path] = field(init=False, default_factory=dict)
    _start_s: float = field(init=False)
    _measured: dict[str, float] = field(init=False, default_factory=dict)
    _measuring: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        stats, frames = self.pager.stats, self.pager.frames
        self.encodings = self.pager.encodings
        self.responses = ResponseTimes(lambda: stats.hit_bytes + stats.miss_bytes)
        self.shadow = ShadowLRU(stats, lambda: frames.limit_bytes, self.pager.entries)
        self.pager.listen(self.shadow, to_all=True)
        self._start_s = self.timer()

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return self.timer() - self._start_s

    # --- section 7.1 --------------------------------------------------------------------------------------------------

    def metrics(
        self, *, measure: bool = True, uses: Iterable[TensorUse] | None = None
    ) -> dict[str, float | int | None]:
        """Return all metrics by the keys of section 7.1.

        Args:
            measure: take missing measurements (once, about 0.3 s); otherwise use only existing ones.
            uses: the Pager's tensor usage, if already known.
        """
        uses = self.pager.usage() if uses is None else uses
        values = (
            self.pool_utilization(),
            self.allocation_speedup(measure=measure),
            self.cache_hit_rate(),
            self.cache_efficiency(),
            self.compression_ratio(uses),
            self.compression_quality(uses),
            self.swap_count(),
            self.swap_efficiency(),
            self.tier_migration_rate(),
            self.tier_effectiveness(),
            self.gc_success_rate(),
            self.lifetime_accuracy(),
            self.bandwidth_utilization(measure=measure),
            self.shadow.improvement,
        )
        return dict(zip(METRICS, values, strict=True))

    def pool_utilization(self) -> float | None:
        """Return granted bytes / address space of the typed pools, now; `None` without pooling."""
        rows = self.pools().values()
        if not rows:
            return None
        return sum(row["used_bytes"] or 0 for row in rows) / sum(row["size_bytes"] or 0 for row in rows)

    def allocation_speedup(self, *, measure: bool = True) -> float | None:
        """Return the time of `torch.empty` / that of a pool for 32 MiB with first touch; measured once."""
        if self.pool is None:
            return None
        return self._once("allocation_speedup", ALLOCATION_BYTES, lambda: allocation_speedup(ALLOCATION_BYTES), measure)

    def cache_hit_rate(self) -> float | None:
        """Return the hit rate of the result cache since the start."""
        return None if self.cache is None else self.cache.stats()["hit_rate"]

    def cache_efficiency(self) -> float | None:
        """Return seconds saved by hits / (seconds saved + seconds computing), since the start."""
        if self.cache is None:
            return None
        stats = self.cache.stats()
        total_s = stats["saved_s"] + stats["computed_s"]
        return stats["saved_s"] / total_s if total_s > 0 else None

    def compression_ratio(self, uses: Iterable[TensorUse] | None = None) -> float | None:
        """Return original / encoded bytes over all weights now and all other encodings since the start."""
        rows = self.compression(uses)
        encoded = sum(row.encoded_bytes for row in rows.values())
        return sum(row.original_bytes for row in rows.values()) / encoded if encoded else None

    def compression_quality(self, uses: Iterable[TensorUse] | None = None) -> float | None:
        """Return 1 - mean relative error by bytes, over tensors with a known error."""
        rows = self.compression(uses).values()
        sampled = sum(row.sampled_bytes for row in rows)
        return 1 - sum(row.error_bytes for row in rows) / sampled if sampled else None

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
                weights.original_bytes += use.logical_bytes
                weights.encoded_bytes += use.encoded_bytes + use.beside_bytes
                error = 0.0 if use.lossless else errors.get(use.tensor_id)
                all_known = all_known and error is not None
                weights.error_bytes += (error or 0.0) * use.logical_bytes
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

    def swap_count(self) -> int:
        """Return the pages written to and read from the swap file since the start."""
        stats = self.pager.stats
        return stats.swap_writes + stats.swap_reads

    def swap_efficiency(self) -> float | None:
        """Return the share of page reads from the SSD that were prefetched in time."""
        stats = self.pager.stats
        # Clamped at 0: lookups of single rows may fault on a page without counting as an access.
        return max(0.0, 1 - stats.faults / stats.misses) if stats.misses else None

    def tier_migration_rate(self) -> float | None:
        """Return pages per second moved between SSD and memory since the start."""
        return self.moves() / self.uptime_s if self.uptime_s > 0 else None

    def moves(self) -> int:
        """Return pages moved between SSD and memory since the start."""
        stats = self.pager.stats
        return stats.page_reads + stats.evictions + stats.swap_writes

    def tier_effectiveness(self) -> float | None:
        """Return the share of tensors prefetched by tiering and used before they left again."""
        return None if self.tiering is None else self.tiering.effectiveness()

    def gc_success_rate(self) -> float | None:
        """Return the share of collected items not needed again; `None` without a collector."""
        return None if self.collector is None else self.collector.success_rate()

    def lifetime_accuracy(self) -> float | None:
        """Return the share of correct lifetime predictions; `None` without a collector."""
        return None if self.collector is None else self.collector.lifetime_accuracy()

    def bandwidth_utilization(self, *, measure: bool = True) -> float | None:
        """Return encoded bytes used per second of decoding / memory bandwidth of this machine.

        Covers the time after the first token in the last 64 responses. The bandwidth is measured once.
        """
        responses = self.responses.recent()
        seconds = sum(each.decode_s for each in responses)
        bandwidth = self._bandwidth(measure=measure and seconds > 0)
        if bandwidth is None or seconds <= 0:
            return None
        return sum(each.decode_bytes for each in responses) / seconds / bandwidth

    def measure(self) -> None:
        """Take the measurements that `metrics` needs, once: 0.3 s, using up to 64 MiB."""
        self.allocation_speedup()
        self._bandwidth(measure=True)

    def _bandwidth(self, *, measure: bool) -> float | None:
        return self._once("memory_bandwidth", BANDWIDTH_BYTES, lambda: memory_bandwidth(BANDWIDTH_BYTES), measure)

    def _once(self, name: str, n_bytes: int, run: Callable[[], float], measure: bool) -> float | None:
        """Return a measurement, taking it first if the budget has room for it."""
        with self._measuring:
            if name not in self._measured and measure:
                try:
                    self.pager.debit(_MEASURING, n_bytes, PROCESS)
                except MemoryBudgetExceeded:
                    return None
                try:
                    self._measured[name] = run()
                finally:
                    self.pager.debit(_MEASURING, -n_bytes, PROCESS)
            return self._measured.get(name)

    # --- ours ---------------------------------------------------------------------------------------------------------

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
