"""`MemoryMetrics`: the metrics of section 7.1, and memory use by place, from the parts of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..cache import HierarchicalCacheSystem
from ..collection import PredictiveGarbageCollector, TensorLifecycleTracker
from ..paging import TENSORS, Pager, PressureMonitor, TensorUse
from ..process import process_memory
from ..runtime_policy import MemoryTieringSystem
from ..tuning import AutoTuner
from .figures import MemoryFigures

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


USE_KEYS = ("tensors", "logical_bytes", "original_bytes", "encoded_bytes", "resident_bytes")
"""Figures of each kind and codec in `get_memory_efficiency_stats`."""


class MemoryMetrics:
    """The metrics of a `MemoryOptimizer`, whose parts are the attributes.

    `None`: not measurable, or not measured yet. `docs/metrics.md` lists them in a table.

    Attributes:
        figures: read from the counters of the parts.
        baseline_bytes: memory of the process besides managed memory.
        kv_store: keys and values of idle sequences (`model.kv.store.KVStore`); `None`: none are kept.
    """

    pager: Pager
    figures: MemoryFigures
    lifecycle: TensorLifecycleTracker
    cache: HierarchicalCacheSystem | None
    collector: PredictiveGarbageCollector | None
    tiering: MemoryTieringSystem | None
    pressure: PressureMonitor | None
    tuner: AutoTuner | None
    kv_store: Any
    baseline_bytes: int

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
            self.get_pool_utilization(),
            self.get_allocation_speedup(measure=measure),
            self.get_cache_hit_rate(),
            self.get_cache_efficiency(),
            self.get_average_compression_ratio(uses),
            self.get_compression_quality(uses),
            self.get_swap_count(),
            self.get_swap_efficiency(),
            self.get_tier_migration_rate(),
            self.get_tier_effectiveness(),
            self.get_gc_success_rate(),
            self.get_lifetime_prediction_accuracy(),
            self.get_memory_bandwidth_usage(measure=measure),
            self.get_cache_improvement_over_baseline(),
        )
        return dict(zip(METRICS, values, strict=True))

    def get_pool_utilization(self) -> float | None:
        """Return granted bytes / address space of the four typed pools, 0 to 1, now; `None` without pooling."""
        rows = self.figures.pools().values()
        if not rows:
            return None
        return sum(row["used_bytes"] or 0 for row in rows) / sum(row["size_bytes"] or 0 for row in rows)

    def get_allocation_speedup(self, *, measure: bool = True) -> float | None:
        """Return how many times faster a pool allocates 32 MiB than `torch.empty`, first touch included.

        The first call measures it (0.2 s, 32 MiB); `None`: no pooling, or no room in the budget.
        """
        return None if self.figures.pool is None else self.figures.measured("allocation_speedup", measure=measure)

    def get_cache_hit_rate(self) -> float | None:
        """Return the hit rate of the result cache, all levels, since the start, 0 to 1."""
        return None if self.cache is None else self.cache.stats()["hit_rate"]

    def get_cache_efficiency(self) -> float | None:
        """Return seconds saved by hits / (seconds saved + seconds spent computing misses), since the start."""
        if self.cache is None:
            return None
        stats = self.cache.stats()
        total_s = stats["saved_s"] + stats["computed_s"]
        return stats["saved_s"] / total_s if total_s > 0 else None

    def get_average_compression_ratio(self, uses: Iterable[TensorUse] | None = None) -> float | None:
        """Return original / encoded bytes over all weights now and all other encodings since the start.

        The original bytes of a weight are those in its checkpoint: 2 per value in bf16, also where the model computes
        in fp32.
        """
        rows = self.figures.compression(uses)
        encoded = sum(row.encoded_bytes for row in rows.values())
        return sum(row.original_bytes for row in rows.values()) / encoded if encoded else None

    def get_compression_quality(self, uses: Iterable[TensorUse] | None = None) -> float | None:
        """Return 1 - mean relative error by bytes, over tensors with a known error (sampled or from the plan)."""
        rows = self.figures.compression(uses).values()
        sampled = sum(row.sampled_bytes for row in rows)
        return 1 - sum(row.error_bytes for row in rows) / sampled if sampled else None

    def get_swap_count(self) -> int:
        """Return the pages written to and read from the swap file since the start."""
        return self.pager.stats.swap_writes + self.pager.stats.swap_reads

    def get_swap_efficiency(self) -> float | None:
        """Return 1 - faults / page accesses that needed a read, since the start, 0 to 1."""
        stats = self.pager.stats
        # Clamped at 0: lookups of single rows may fault on a page without counting as an access.
        return max(0.0, 1 - stats.faults / stats.misses) if stats.misses else None

    def get_tier_migration_rate(self) -> float | None:
        """Return pages per second moved between SSD and memory since the start."""
        uptime_s = self.figures.uptime_s
        return self.figures.moves() / uptime_s if uptime_s > 0 else None

    def get_tier_effectiveness(self) -> float | None:
        """Return the share of tier migrations (prefetched tensors) used before they left again, 0 to 1.

        `None`: no migration yet, or no tiering. (Weights are prefetched by their schedule, not migrated.)
        """
        return None if self.tiering is None else self.tiering.effectiveness()

    def get_gc_success_rate(self) -> float | None:
        """Return the share of collected items not needed again, 0 to 1."""
        return None if self.collector is None else self.collector.success_rate()

    def get_lifetime_prediction_accuracy(self) -> float | None:
        """Return the share of correct lifetime predictions of the collector, 0 to 1."""
        return None if self.collector is None else self.collector.lifetime_accuracy()

    def get_memory_bandwidth_usage(self, *, measure: bool = True) -> float | None:
        """Return encoded bytes used per second of decoding / memory bandwidth, over the last 64 responses.

        The first call after a response measures the bandwidth (0.1 s, 64 MiB).
        """
        responses = self.figures.responses.recent()
        seconds = sum(each.decode_s for each in responses)
        bandwidth = self.figures.measured("memory_bandwidth", measure=measure and seconds > 0)
        if bandwidth is None or seconds <= 0:
            return None
        return sum(each.decode_bytes for each in responses) / seconds / bandwidth

    def get_cache_improvement_over_baseline(self) -> float | None:
        """Return the byte hit rate minus that of LRU with the same memory, since the start, -1 to 1.

        A shadow LRU runs on the same accesses.
        """
        return self.figures.shadow.improvement

    # --- by place -----------------------------------------------------------------------------------------------------

    def get_memory_efficiency_stats(self) -> dict[str, Any]:
        """Return memory use by place, and event counters.

        The keys: `budget`, `paging`, `tiers`, `pools`, `kinds`, `codecs`, `cache`, `kv` (idle sequences), `gc`,
        `tuning`, `sessions_open`.
        """
        memory = process_memory()
        pager, ledger = self.pager, self.pager.ledger
        kinds: dict[str, dict[str, int]] = {}
        codecs: dict[str, dict[str, int]] = {}
        for use in pager.usage():
            for table, key in ((kinds, use.kind), (codecs, use.codec)):
                row = table.setdefault(key, dict.fromkeys(USE_KEYS, 0))
                row["tensors"] += 1
                row["logical_bytes"] += use.logical_bytes
                row["original_bytes"] += use.original_bytes
                row["encoded_bytes"] += use.encoded_bytes
                row["resident_bytes"] += use.resident_bytes
        encoded = sum(row["encoded_bytes"] for row in kinds.values())
        resident = sum(row["resident_bytes"] for row in kinds.values())
        return {
            "budget": {
                "ram_budget_bytes": ledger.ram_budget_bytes,
                "tensor_budget_bytes": ledger.tensor_budget_bytes,
                "baseline_bytes": self.baseline_bytes,
                "accounts_bytes": ledger.accounts(),
                "tensor_accounts_bytes": ledger.accounts(TENSORS),
                "frames_limit_bytes": pager.frames.limit_bytes if ledger.limited else None,
                "frames_used_bytes": pager.frames.used_bytes,
                "frames_peak_bytes": pager.frames.peak_bytes,
                "pressure_reliefs": 0 if self.pressure is None else self.pressure.reliefs,
                "process_rss_bytes": memory.rss_bytes,
                "process_peak_rss_bytes": memory.peak_rss_bytes,
            },
            "paging": pager.stats.as_dict(pager.schedule.passes),
            "tiers": {
                "gpu": None,  # no device tier in this process
                "cpu": {"resident_bytes": resident},
                "ssd": {"only_there_bytes": encoded - resident, "swap_used_bytes": pager.swap_used_bytes},
                "migrations": None if self.tiering is None else self.tiering.migrations,
                "migrations_used": None if self.tiering is None else self.tiering.useful_migrations,
                "predictor": None if self.tiering is None else self.tiering.explain(),
            },
            "pools": self.figures.pools(),
            "kinds": kinds,
            "codecs": codecs,
            "cache": None if self.cache is None else self.cache.stats(),
            "kv": None if self.kv_store is None else self.kv_store.stats(),
            "gc": None if self.collector is None else self.collector.stats(),
            "tuning": None if self.tuner is None else self.tuner.stats(),
            "sessions_open": self.lifecycle.sessions_open,
        }
