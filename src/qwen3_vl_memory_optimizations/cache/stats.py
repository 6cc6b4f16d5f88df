"""Counters of a cache level, separate from its logic."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class LevelStats:
    """Counters of a level since the start.

    Attributes:
        hits, misses: look-ups that found, or did not find, an entry here. A level is looked up after a miss above it.
        declined: entries found here that would have taken longer to read than to recompute.
        hit_bytes: bytes of the entries found.
        admitted, admitted_bytes: entries stored.
        refused: entries not stored: too large for the level, worth less than existing ones, or no room in the budget.
        reused: stored entries that were found here at least once since.
        evictions, evicted_bytes: entries evicted for others, or because the budget needed the room.
        migrations: entries moved up after a hit in the level below, or down when the level above evicted them.
        corrupt: SSD entries that differ from what was written, or have another owner; each was a miss.
        failures: reads and writes that the system refused.
        saved_s: seconds saved by hits: the predicted compute time less the load time.
    """

    hits: int = 0
    misses: int = 0
    declined: int = 0
    hit_bytes: int = 0
    admitted: int = 0
    admitted_bytes: int = 0
    refused: int = 0
    reused: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    migrations: int = 0
    corrupt: int = 0
    failures: int = 0
    saved_s: float = 0.0

    def as_dict(self, *, entries: int, used_bytes: int, size_bytes: int) -> dict[str, Any]:
        """Return the counters, the bytes held, and derived ratios; a ratio with a zero denominator is `None`."""
        asked = self.hits + self.misses
        return {
            **asdict(self),
            "entries": entries,
            "used_bytes": used_bytes,
            "size_bytes": size_bytes,
            "hit_rate": self.hits / asked if asked else None,
            "prediction_efficiency": self.reused / self.admitted if self.admitted else None,
        }
