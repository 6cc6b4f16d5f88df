"""The classic operating-system algorithms: least recently used, and clock, its cheaper approximation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator

from .algorithm import SwappingAlgorithm


class LRUSwappingAlgorithm(SwappingAlgorithm):
    """Evicts the least recently used tensor first."""

    name = "lru"

    def __init__(self) -> None:
        super().__init__()
        self._last_used_first: OrderedDict[Hashable, None] = OrderedDict()

    def order(self) -> Iterator[Hashable]:
        """Yield all keys in memory in eviction order."""
        yield from list(self._last_used_first)

    def _inserted(self, key: Hashable) -> None:
        self._last_used_first[key] = None

    def _touched(self, key: Hashable) -> None:
        self._last_used_first.move_to_end(key)

    def _left(self, key: Hashable, *, evicted: bool) -> None:
        del self._last_used_first[key]


class ClockSwappingAlgorithm(SwappingAlgorithm):
    """Second-chance clock: evicts the next tensor not used since the hand last passed it."""

    name = "clock"

    def __init__(self) -> None:
        super().__init__()
        self._used: OrderedDict[Hashable, bool] = OrderedDict()  # in ring order, starting at the hand

    def order(self) -> Iterator[Hashable]:
        """Yield all keys in memory in eviction order."""
        ring = list(self._used.items())
        yield from [key for key, used in ring if not used]
        yield from [key for key, used in ring if used]

    def _inserted(self, key: Hashable) -> None:
        self._used[key] = False

    def _touched(self, key: Hashable) -> None:
        self._used[key] = True

    def _left(self, key: Hashable, *, evicted: bool) -> None:
        if evicted and self._used[key]:  # the hand went round once and cleared every use bit
            self._used = OrderedDict.fromkeys(self._used, False)
        while evicted and next(iter(self._used)) != key:
            passed, _ = self._used.popitem(last=False)
            self._used[passed] = False
        del self._used[key]
