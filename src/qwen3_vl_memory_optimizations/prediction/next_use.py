"""`NextUse`: predict a key's next use from its own history."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

_HALF_LIFE = 12
"""Half-life of a use, as a multiple of the number of keys, in uses."""
_MOST_REMEMBERED = 16
"""Number of keys remembered, as a multiple of the keys in memory."""
_LEAST_REMEMBERED = 1024
_STEADY = 0.25
"""Gaps that vary by less than this share of their mean are periodic."""
_LATE = 1.3
"""A use that has not come after this many gaps is no longer expected."""
_GAP_WEIGHT = 0.4
_FIRST_SPREAD = 0.2
"""Initial spread, as a share of the first gap: a second use counts as periodic until a third breaks the period."""


@dataclass(slots=True)
class UseHistory:
    """History of a key.

    Attributes:
        first, last: times of its uses, counted in uses of all keys.
        weight: its uses, older ones weighted less.
        gap, spread: mean gap between uses, and mean deviation from it; 0: only one use so far.
    """

    first: int
    last: int
    weight: float = 1.0
    gap: float = 0.0
    spread: float = 0.0


class NextUse:
    """Predicts the next use of keys, in uses of all keys, from their own history.

    A periodic key is expected one gap after its last use. For other keys a use is equally likely at any time: the
    expected wait is one over the rate, in which older uses count less. The expected wait of a key used once grows with
    the time since that use.
    """

    def __init__(self) -> None:
        self.now = 0
        self._known: OrderedDict[Hashable, UseHistory] = OrderedDict()  # by last use
        self._resident = 1

    def use(self, key: Hashable, resident: int) -> None:
        """Record a use, with `resident` keys in memory."""
        self.now += 1
        self._resident = max(resident, 1)
        history = self._known.pop(key, None)
        if history is None:
            history = UseHistory(self.now, self.now)
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

    def history(self, key: Hashable) -> UseHistory | None:
        """Return the history of a key; it changes with the next use."""
        return self._known.get(key)

    def forget(self, key: Hashable) -> None:
        """Forget a key."""
        self._known.pop(key, None)

    def wait(self, key: Hashable, now: int | None = None) -> float:
        """Return the expected wait until the key's next use, in uses of all keys; infinite: unknown.

        Args:
            key: the key.
            now: time of the prediction, not before the key's last use; default: the current time.
        """
        history = self._known.get(key)
        if history is None:
            return math.inf
        now = self.now if now is None else now
        age = now - history.last
        if history.gap and history.spread <= _STEADY * history.gap and age <= _LATE * history.gap:
            return max(history.gap - age, 1.0)
        # Uses divided by the time in which they could have occurred, both with the same decay.
        life = self._half_life() / math.log(2)
        span = life * (1 - self._kept(now - history.first + 1)) + 1
        return (span + self._resident) / (history.weight * self._kept(age))

    def _half_life(self) -> float:
        return float(_HALF_LIFE * max(self._resident, 16))

    def _kept(self, age: float) -> float:
        return 0.5 ** (age / self._half_life())
