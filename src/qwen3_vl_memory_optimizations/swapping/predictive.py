"""`PredictiveSwappingAlgorithm`: what is expected to be used last leaves first, unless a simple rule proves better."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from .base import SwappingAlgorithm
from .recency import ClockSwappingAlgorithm, LRUSwappingAlgorithm

_HALF_LIFE = 12
"""Uses are half forgotten after so many times as many uses as there are keys."""
_MOST_REMEMBERED = 16
"""So many times as many keys as are in memory are remembered."""
_LEAST_REMEMBERED = 1024
_STEADY = 0.25
"""Gaps that differ by less than this share of their mean are a rhythm."""
_LATE = 1.3
"""A use that is later than this many gaps is not awaited any longer."""
_GAP_WEIGHT = 0.4
_FIRST_SPREAD = 0.2
"""Of the first gap: a second use is taken for the beginning of a rhythm until a third one is not in it."""
_ALL_RANKED, _DRAWN, _TAKEN = 128, 64, 4
_FORGET = 0.998
_MARGIN = 0.01


@dataclass(slots=True)
class _History:
    """What is known of a key.

    Attributes:
        first, last: when it was used, counted in uses of all keys.
        weight: its uses, older ones counted less.
        gap, spread: mean of the gaps between uses, and of how far they are from it; 0: only one use so far.
    """

    first: int
    last: int
    weight: float = 1.0
    gap: float = 0.0
    spread: float = 0.0


class NextUse:
    """Foretells when keys are used next, in uses of all keys, from their own history.

    A key with a rhythm is expected one gap after its last use. For others a use is as likely now as at any time: the
    expected wait is one over its rate, of which older uses count less. A key that was used once has the rate of its
    age, which is the shorter the newer it is.
    """

    def __init__(self) -> None:
        self.now = 0
        self._known: OrderedDict[Hashable, _History] = OrderedDict()  # by last use
        self._resident = 1

    def use(self, key: Hashable, resident: int) -> None:
        """Note a use, with so many keys in memory."""
        self.now += 1
        self._resident = max(resident, 1)
        history = self._known.pop(key, None)
        if history is None:
            history = _History(self.now, self.now)
        else:
            gap = self.now - history.last
            if history.gap:
                history.spread += _GAP_WEIGHT * (abs(gap - history.gap) - history.spread)
                history.gap += _GAP_WEIGHT * (gap - history.gap)
            else:
                history.gap, history.spread = float(gap), _FIRST_SPREAD * gap
            history.weight = 1 + history.weight * self._kept(gap)
            history.last = self.now
        self._known[key] = history
        most = max(_LEAST_REMEMBERED, _MOST_REMEMBERED * self._resident)
        while len(self._known) > most:
            self._known.popitem(last=False)

    def forget(self, key: Hashable) -> None:
        """Forget a key."""
        self._known.pop(key, None)

    def wait(self, key: Hashable) -> float:
        """Return in how many uses of all keys this one is expected; infinite: it is not known."""
        history = self._known.get(key)
        if history is None:
            return math.inf
        age = self.now - history.last
        if history.gap and history.spread <= _STEADY * history.gap and age <= _LATE * history.gap:
            return max(history.gap - age, 1.0)
        # Uses over the time they could have come in, both with the same forgetting.
        life = self._half_life() / math.log(2)
        span = life * (1 - self._kept(self.now - history.first + 1)) + 1
        return (span + self._resident) / (history.weight * self._kept(age))

    def _half_life(self) -> float:
        return float(_HALF_LIFE * max(self._resident, 16))

    def _kept(self, age: float) -> float:
        return 0.5 ** (age / self._half_life())


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

    def _inserted(self, key: Hashable, kind: str) -> None:
        for rule in self._rules.values():
            rule.insert(key, self.n_bytes[key], kind)
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

    def _inserted(self, key: Hashable, kind: str) -> None:
        pass

    def _touched(self, key: Hashable) -> None:
        pass

    def _left(self, key: Hashable, *, evicted: bool) -> None:
        pass
