"""`FigureMethods`: the methods of section 7.1 on an optimizer. They delegate to its `MemoryFigures`."""

from __future__ import annotations

from .figures import MemoryFigures


class FigureMethods:
    """The figures of section 7.1; `None`: not measurable, or not yet. `docs/metrics.md` has them in one table.

    Attributes:
        figures: reads the counters of the parts.
    """

    figures: MemoryFigures

    def get_pool_utilization(self) -> float | None:
        """Return granted bytes over address space of the four typed pools, 0 to 1, now; `None` without pooling."""
        return self.figures.pool_utilization()

    def get_allocation_speedup(self) -> float | None:
        """Return how many times faster 32 MiB from the pool are there than from `torch.empty`, first touch included.

        Measured at the first call, which takes 0.2 s and 32 MiB; `None`: no pooling, or no room in the budget.
        """
        return self.figures.allocation_speedup()

    def get_cache_hit_rate(self) -> float | None:
        """Return the share of look-ups that some level of the cache of results answered, since the start, 0 to 1."""
        return self.figures.cache_hit_rate()

    def get_cache_efficiency(self) -> float | None:
        """Return seconds saved by hits / (seconds saved + seconds spent computing what missed), since the start."""
        return self.figures.cache_efficiency()

    def get_average_compression_ratio(self) -> float | None:
        """Return original bytes / encoded bytes: of all weights now, and of all that was encoded since the start."""
        return self.figures.compression_ratio()

    def get_compression_quality(self) -> float | None:
        """Return 1 - the mean relative error by bytes, over what an error is known of (sampled, or from the plan)."""
        return self.figures.compression_quality()

    def get_swap_count(self) -> int:
        """Return the pages written to the swap file and read from it, since the start."""
        return self.figures.swap_count()

    def get_swap_efficiency(self) -> float | None:
        """Return 1 - faults / page accesses that found newly read bytes, since the start, 0 to 1."""
        return self.figures.swap_efficiency()

    def get_tier_migration_rate(self) -> float | None:
        """Return pages a second that came from the SSD into memory or left it, since the start."""
        return self.figures.tier_migration_rate()

    def get_tier_effectiveness(self) -> float | None:
        """Return the share of tier migrations (tensors brought back) that were used before they left, 0 to 1.

        `None`: no migration yet, or no tiering. (Weights are prefetched by their schedule, not migrated.)
        """
        return self.figures.tier_effectiveness()

    def get_gc_success_rate(self) -> float | None:
        """Return the share of what the collector collected that was not needed again, 0 to 1."""
        return self.figures.gc_success_rate()

    def get_lifetime_prediction_accuracy(self) -> float | None:
        """Return the share of the collector's predicted lifetimes that came true, 0 to 1."""
        return self.figures.lifetime_accuracy()

    def get_memory_bandwidth_usage(self) -> float | None:
        """Return encoded bytes used a second of decoding / memory bandwidth of this machine, in the last 64 responses.

        The bandwidth is measured at the first call after a response, which takes 0.1 s and 64 MiB.
        """
        return self.figures.bandwidth_utilization()

    def get_cache_improvement_over_baseline(self) -> float | None:
        """Return the share of used bytes found in memory less that of LRU in as much memory, since the start, -1 to 1.

        LRU is run beside, on the same accesses.
        """
        return self.figures.shadow.improvement
