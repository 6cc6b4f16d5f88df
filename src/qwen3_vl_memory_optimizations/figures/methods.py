"""`FigureMethods`: the section 7.1 methods of an optimizer; they delegate to its `MemoryFigures`."""

from __future__ import annotations

from .figures import MemoryFigures


class FigureMethods:
    """The metrics of section 7.1; `None`: not measurable, or not measured yet. `docs/metrics.md` lists them in a table.

    Attributes:
        figures: reads the counters of the optimizer.
    """

    figures: MemoryFigures

    def get_pool_utilization(self) -> float | None:
        """Return granted bytes / address space of the four typed pools, 0 to 1, now; `None` without pooling."""
        return self.figures.pool_utilization()

    def get_allocation_speedup(self) -> float | None:
        """Return how many times faster a pool allocates 32 MiB than `torch.empty`, first touch included.

        The first call measures it (0.2 s, 32 MiB); `None`: no pooling, or no room in the budget.
        """
        return self.figures.allocation_speedup()

    def get_cache_hit_rate(self) -> float | None:
        """Return the hit rate of the result cache, all levels, since the start, 0 to 1."""
        return self.figures.cache_hit_rate()

    def get_cache_efficiency(self) -> float | None:
        """Return seconds saved by hits / (seconds saved + seconds spent computing misses), since the start."""
        return self.figures.cache_efficiency()

    def get_average_compression_ratio(self) -> float | None:
        """Return original / encoded bytes over all weights now and all other encodings since the start."""
        return self.figures.compression_ratio()

    def get_compression_quality(self) -> float | None:
        """Return 1 - mean relative error by bytes, over tensors with a known error (sampled or from the plan)."""
        return self.figures.compression_quality()

    def get_swap_count(self) -> int:
        """Return the pages written to and read from the swap file since the start."""
        return self.figures.swap_count()

    def get_swap_efficiency(self) -> float | None:
        """Return 1 - faults / page accesses that needed a read, since the start, 0 to 1."""
        return self.figures.swap_efficiency()

    def get_tier_migration_rate(self) -> float | None:
        """Return pages per second moved between SSD and memory since the start."""
        return self.figures.tier_migration_rate()

    def get_tier_effectiveness(self) -> float | None:
        """Return the share of tier migrations (prefetched tensors) used before they left again, 0 to 1.

        `None`: no migration yet, or no tiering. (Weights are prefetched by their schedule, not migrated.)
        """
        return self.figures.tier_effectiveness()

    def get_gc_success_rate(self) -> float | None:
        """Return the share of collected items not needed again, 0 to 1."""
        return self.figures.gc_success_rate()

    def get_lifetime_prediction_accuracy(self) -> float | None:
        """Return the share of correct lifetime predictions of the collector, 0 to 1."""
        return self.figures.lifetime_accuracy()

    def get_memory_bandwidth_usage(self) -> float | None:
        """Return encoded bytes used per second of decoding / memory bandwidth, over the last 64 responses.

        The first call after a response measures the bandwidth (0.1 s, 64 MiB).
        """
        return self.figures.bandwidth_utilization()

    def get_cache_improvement_over_baseline(self) -> float | None:
        """Return the byte hit rate minus that of LRU with the same memory, since the start, -1 to 1.

        A shadow LRU runs on the same accesses.
        """
        return self.figures.shadow.improvement
