"""`PredictiveSwappingAlgorithm`: evicts the farthest predicted use first, unless a simple rule proves better."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator

from ..prediction import NextUse
from .algorithm import SwappingAlgorithm
from .recency import ClockSwappingAlgorithm, LRUSwappingAlgorithm

_ALL_RANKED, _DRAWN, _TAKEN = 128, 64, 4
_FORGET = 0.998
_MARGIN = 0.01


def farthest_first(keys: list[Hashable], next_use: NextUse, draw: random.Random) -> Iterator[Hashable]:
    """Yield keys by predicted next use, farthest first.

    Large sets are ranked by sampling: a full ranking would cost more than it gains.
    """
    while len(keys) > _ALL_RANKED:
        for number in range(_DRAWN):
            other = draw.randrange(number, len(keys))
            keys[number], keys[other] = keys[other], keys[number]
        ranked = sorted(keys[:_DRAWN], key=next_use.wait, reverse=True)
        yield from ranked[:_TAKEN]
        keys[:_DRAWN] = ranked[_TAKEN:]
    yield from sorted(keys, key=next_use.wait, reverse=True)


class PredictiveSwappingAlgorithm(SwappingAlgorithm):
    """Evicts the tensor with the farthest predicted use first.

    LRU, clock and the prediction each run a shadow memory of the same size (keys only). While the prediction has a
    clearly lower hit rate there than a simple rule, the simple rule decides.
    """

    name = "predictive"

    def __init__(self) -> None:
        super().__init__()
        self.next_use = NextUse()
        self._rules: dict[str, SwappingAlgorithm] = {
            "lru": LRUSwappingAlgorithm(),
            "clock": ClockSwappingAlgorithm(),
        }
        self._pretended = {"lru": LRUSwappingAlgorithm(), "clock": ClockSwappingAlgorithm(), "predictive": _Waits(self)}
        self._found = dict.fromkeys(self._pretended, 0.0)
        self._capacity_bytes = 0
        self._random = random.Random(0)

    @property
    def decides(self) -> str:
        """The rule that decides now: `predictive`, or the simple rule with the higher hit rate."""
        best = max(self._rules, key=lambda name: self._found[name])
        total = (1 - _FORGET) * (self._found[best] - self._found["predictive"])
        return best if total > _MARGIN else "predictive"

    def order(self) -> Iterator[Hashable]:
        """Yield all keys in memory in eviction order."""
        rule = self.decides
        if rule != "predictive":
            yield from self._rules[rule].order()
            return
        yield from farthest_first(list(self.n_bytes), self.next_use, self._random)

    def _inserted(self, key: Hashable) -> None:
        for rule in self._rules.values():
            rule.insert(key, self.n_bytes[key])
        self._use(key)

    def _touched(self, key: Hashable) -> None:
        for rule in self._rules.values():
            rule.touch(key)
        self._use(key)

    def _use(self, key: Hashable) -> None:
        self.next_use.use(key, len(self.n_bytes))
        self._capacity_bytes = max(self._capacity_bytes, self.resident_bytes)
        for name, pretended in self._pretended.items():
            found = key in pretended.n_bytes
            self._found[name] = _FORGET * self._found[name] + found
            if found:
                pretended.touch(key)
                continue
            n_bytes = self.n_bytes[key]
            pretended.evict(pretended.resident_bytes + n_bytes - self._capacity_bytes)
            pretended.insert(key, n_bytes)

    def _left(self, key: Hashable, *, evicted: bool) -> None:
        for rule in self._rules.values():
            if evicted:
                rule.left(key)
            else:
                rule.remove(key)

    def _removed(self, key: Hashable) -> None:
        self.next_use.forget(key)
        for pretended in self._pretended.values():
            pretended.remove(key)


class _Waits(SwappingAlgorithm):
    """The predicted order over a shadow memory."""

    def __init__(self, of: PredictiveSwappingAlgorithm) -> None:
        super().__init__()
        self._of = of
        self._random = random.Random(0)

    def order(self) -> Iterator[Hashable]:
        """Yield all keys in memory in eviction order."""
        yield from farthest_first(list(self.n_bytes), self._of.next_use, self._random)

    def _inserted(self, key: Hashable) -> None:
        pass

    def _touched(self, key: Hashable) -> None:
        pass

    def _left(self, key: Hashable, *, evicted: bool) -> None:
        pass
