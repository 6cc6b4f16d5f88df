"""Which entries of a cache are worth their bytes: by how often they were asked for, what they save, and when.

An entry is worth `uses * saved_s / n_bytes` above the clock of its cache. The clock is the worth of what left last, so
an entry that is not used again ages as the cache turns over (greedy dual, size and frequency: Cherkasova 1998). Uses
are counted for what is not kept as well, and halved now and then (as TinyLFU does: Einziger et al. 2017), so what
comes back is known when it does.
"""

from __future__ import annotations

from collections.abc import Mapping

_PERIOD = 4096
_MOST_USES = 15


class UseCounts:
    """How often each key was asked for lately, kept or not; all counts are halved once a period.

    Args:
        period: requests in a period; about as many keys are remembered.
    """

    def __init__(self, period: int = _PERIOD) -> None:
        self._period = period
        self._counts: dict[str, int] = {}
        self._requests = 0

    def record(self, key: str) -> None:
        """Note a request."""
        self._counts[key] = min(_MOST_USES, self._counts.get(key, 0) + 1)
        self._requests += 1
        if self._requests >= self._period:
            self._requests = 0
            self._counts = {each: count // 2 for each, count in self._counts.items() if count > 1}

    def of(self, key: str) -> int:
        """Return the count of a key, at least 1."""
        return max(1, self._counts.get(key, 0))


def worth(clock: float, uses: int, saved_s: float, n_bytes: int) -> float:
    """Return what an entry is worth to a cache, in seconds saved a byte above its clock.

    Args:
        clock: of the cache: the worth of what left last.
        uses: how often it was asked for.
        saved_s: what one hit saves.
        n_bytes: what it takes.
    """
    return clock + uses * max(saved_s, 0.0) / max(n_bytes, 1)


def choose_victims(
    entries: Mapping[str, tuple[float, int]], needed_bytes: int, candidate_worth: float | None
) -> list[str] | None:
    """Return the keys that leave for a new entry: the least worth, and of equals the first in order.

    Args:
        entries: key -> (worth, bytes), the least recently used first.
        needed_bytes: how much must become free.
        candidate_worth: of the new entry; `None`: the room is needed for something else, whatever it costs.

    Returns:
        `None` where something worth more than the new entry would have to go: then nothing goes. (All that there is,
        where even that is not enough and the room is needed for something else.)
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
