"""Rank cache entries by frequency, savings and age.

An entry is worth `uses * saved_s / n_bytes` above the clock of its cache. The clock is the worth of the last evicted
entry, so an unused entry ages as the cache turns over (greedy dual, size and frequency: Cherkasova 1998). Uses of keys
that are not cached are counted too, and all counts are halved periodically (as in TinyLFU: Einziger et al. 2017), so
recurring keys are recognized.
"""

from __future__ import annotations

from collections.abc import Mapping

_PERIOD = 4096
_MOST_USES = 15


class UseCounts:
    """Recent requests per key, cached or not; all counts are halved once per period.

    Args:
        period: requests per period; about as many keys are remembered.
    """

    def __init__(self, period: int = _PERIOD) -> None:
        self._period = period
        self._counts: dict[str, int] = {}
        self._requests = 0

    def record(self, key: str) -> None:
        """Record a request."""
        self._counts[key] = min(_MOST_USES, self._counts.get(key, 0) + 1)
        self._requests += 1
        if self._requests >= self._period:
            self._requests = 0
            self._counts = {each: count // 2 for each, count in self._counts.items() if count > 1}

    def of(self, key: str) -> int:
        """Return the count of a key, at least 1."""
        return max(1, self._counts.get(key, 0))


def worth(clock: float, uses: int, saved_s: float, n_bytes: int) -> float:
    """Return the worth of an entry to a cache, in seconds saved per byte, above the cache's clock.

    Args:
        clock: of the cache: the worth of the last evicted entry.
        uses: number of requests for it.
        saved_s: seconds saved per hit.
        n_bytes: its size.
    """
    return clock + uses * max(saved_s, 0.0) / max(n_bytes, 1)


def choose_victims(
    entries: Mapping[str, tuple[float, int]], needed_bytes: int, candidate_worth: float | None
) -> list[str] | None:
    """Return the eviction victims for a new entry: the least valuable first, ties in the given order.

    Args:
        entries: key -> (worth, bytes), least recently used first.
        needed_bytes: bytes to free.
        candidate_worth: worth of the new entry; `None`: the room is needed for another purpose, at any cost.

    Returns:
        `None` if an entry worth more than the new one would have to go; then nothing is evicted. If the room is needed
        for another purpose and all entries are not enough, all keys.
    """
    victims: list[str] = []
    if needed_bytes <= 0:
        return victims
    for key, (value, n_bytes) in sorted(entries.items(), key=lambda item: item[1][0]):
        if candidate_worth is not None and value > candidate_worth:
            return None
        victims.append(key)
        needed_bytes -= n_bytes
        if needed_bytes <= 0:
            return victims
    return victims if candidate_worth is None else None
