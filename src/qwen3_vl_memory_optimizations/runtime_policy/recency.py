"""The two algorithms of operating systems: least recently used, and the clock, which comes near it for less."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator

from .algorithm import SwappingAlgorithm


class LRUSwappingAlgorithm(SwappingAlgorithm):
    """What was used longest ago leaves first."""

    name = "lru"

    def __init__(self) -> None:
        super().__init__()
        self._last_used_first: OrderedDict[Hashable, None] = OrderedDict()

    def order(self) -> Iterator[Hashable]:
        """Yield all keys in memory, first to leave first."""
        yield from list(self._last_used_first)

    def _inserted(self, key: Hashable) -> None:
        self._last_used_first[key] = None

    def _touched(self, key: Hashable) -> None:
        self._last_used_first.move_to_end(key)

    def _left(self, key: Hashable, *, evicted: bool) -> None:
        del self._last_used_first[key]


class ClockSwappingAlgorithm(SwappingAlgorithm):
    """A hand goes round: what was used since it passed last gets a second chance, the next one without leaves."""

    name = "clock"

    def __init__(self) -> None:
        super().__init__()
        self._used: OrderedDict[Hashable, bool] = OrderedDict()  # from the hand on, round

    def order(self) -> Iterator[Hashable]:
        """Yield all keys in memory, first to leave first."""
        ring = list(self._used.items())
        yield from [key for key, used in ring if not used]
        yield from [key for key, used in ring if used]

    def _inserted(self, key: Hashable) -> None:
        self._used[key] = False

    def _touched(self, key: Hashable) -> None:
        self._used[key] = True

    def _left(self, key: Hashable, *, evicted: bool) -> None:
        if evicted and self._used[key]:  # the hand went round once and took every chance back
            self._used = OrderedDict.fromkeys(self._used, False)
        while evicted and next(iter(self._used)) != key:
            passed, _ = self._used.popitem(last=False)
            self._used[passed] = False
        del self._used[key]
