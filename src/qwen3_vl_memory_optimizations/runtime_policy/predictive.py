"""`PredictiveSwappingAlgorithm`: what is expected to be used last leaves first, unless a simple rule proves better."""

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
    """Yield keys, those first that are expected last.

    Of very many keys some are drawn, and the first of those are yielded: to rank all would take longer than it gives.
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
    """What is expected to be used last leaves first.

    Beside it, LRU, the clock and the prediction itself each keep a pretended memory of the same size (keys alone).
    Where the prediction finds clearly less there than a simple rule, the simple rule decides until that changes.
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
        """Which rule decides now: `predictive`, or the simple one that finds more."""
        best = max(self._rules, key=lambda name: self._found[name])
        total = (1 - _FORGET) * (self._found[best] - self._found["predictive"])
        return best if total > _MARGIN else "predictive"

    def order(self) -> Iterator[Hashable]:
        """Yield all keys in memory, first to leave first."""
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
    """The order of the prediction, over a pretended memory."""

    def __init__(self, of: PredictiveSwappingAlgorithm) -> None:
        super().__init__()
        self._of = of
        self._random = random.Random(0)

    def order(self) -> Iterator[Hashable]:
        """Yield all keys in memory, first to leave first."""
        yield from farthest_first(list(self.n_bytes), self._of.next_use, self._random)

    def _inserted(self, key: Hashable) -> None:
        pass

    def _touched(self, key: Hashable) -> None:
        pass

    def _left(self, key: Hashable, *, evicted: bool) -> None:
        pass
