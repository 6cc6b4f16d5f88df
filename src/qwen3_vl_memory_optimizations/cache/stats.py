"""Counters of a cache level, apart from its logic."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class LevelStats:
    """What happened at a level since the start.

    Attributes:
        hits, misses: look-ups that found, or did not find, an entry here. A level is asked after those above it missed.
        declined: entries that were here, and would have taken longer to read than to compute again.
        hit_bytes: bytes of the entries found.
        admitted, admitted_bytes: entries taken in.
        refused: entries not taken in: too large for the level, worth less than what is there, or no room in the budget.
        reused: entries taken in that were found here at least once since.
        evictions, evicted_bytes: entries that left for others, or because the budget needed the room.
        migrations: entries that came from the level below after a hit there, or from the level above when they left it.
        corrupt: entries on the SSD that were not what was written there, or not ours: each was a miss.
        failures: reads and writes that the system refused.
        saved_s: seconds that hits saved: the predicted time to compute, less the time to load.
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
        """Return the counters, what is held, and the ratios that follow; a ratio of nothing is `None`."""
        asked = self.hits + self.misses
        return {
            **asdict(self),
            "entries": entries,
            "used_bytes": used_bytes,
            "size_bytes": size_bytes,
            "hit_rate": self.hits / asked if asked else None,
            "prediction_efficiency": self.reused / self.admitted if self.admitted else None,
        }
