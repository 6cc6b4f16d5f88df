"""Counters of the Pager, separate from its logic."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class PagingStats:
    """Counters since the Pager started.

    Attributes:
        hits: page accesses whose bytes were still in memory from an earlier access.
        misses: page accesses whose bytes were read from the SSD since the previous access.
        faults: misses that had to wait.
        stall_s: seconds spent waiting.
        reading_s: seconds during which at least one page read was in progress.
        hit_bytes, miss_bytes: the same accesses, by size.
        prefetches: pages read before they were needed; `prefetches_used`: those that were accessed afterwards.
        bytes_read, bytes_written: SSD traffic (checkpoint and swap file).
        row_bytes_read: bytes of single rows read for embedding look-ups.
        page_reads: pages loaded from the SSD.
        evictions: clean pages dropped; swap_writes, swap_reads: pages moved through the swap file.
    """

    hits: int = 0
    misses: int = 0
    faults: int = 0
    stall_s: float = 0.0
    reading_s: float = 0.0
    hit_bytes: int = 0
    miss_bytes: int = 0
    prefetches: int = 0
    prefetches_used: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    row_bytes_read: int = 0
    page_reads: int = 0
    evictions: int = 0
    swap_writes: int = 0
    swap_reads: int = 0

    def as_dict(self, passes: int) -> dict[str, float | int | None]:
        """Return the counters and the ratios derived from them; a ratio with a zero denominator is `None`."""
        accesses = self.hit_bytes + self.miss_bytes
        return {
            **asdict(self),
            "passes": passes,
            "hit_rate": self.hit_bytes / accesses if accesses else None,
            "prefetch_accuracy": self.prefetches_used / self.prefetches if self.prefetches else None,
            "bytes_read_per_pass": self.bytes_read / passes if passes else None,
        }
