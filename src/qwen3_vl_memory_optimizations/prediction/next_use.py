"""`NextUse`: when a key is used next, told from its own history."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

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


@dataclass(slots=True)
class UseHistory:
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
    expected wait is one over its rate, of which older uses count less. A key that was used once is
    expected the later the longer ago that was.
    """

    def __init__(self) -> None:
        self.now = 0
        self._known: OrderedDict[Hashable, UseHistory] = OrderedDict()  # by last use
        self._resident = 1

    def use(self, key: Hashable, resident: int) -> None:
        """Note a use, with so many keys in memory."""
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
        """Return what is known of a key; it changes with the next use."""
        return self._known.get(key)

    def forget(self, key: Hashable) -> None:
        """Forget a key."""
        self._known.pop(key, None)

    def wait(self, key: Hashable, now: int | None = None) -> float:
        """Return in how many uses of all keys this one is expected; infinite: it is not known.

        Args:
            key: of what is asked for.
            now: when it is asked, not before its last use; default: now.
        """
        history = self._known.get(key)
        if history is None:
            return math.inf
        now = self.now if now is None else now
        age = now - history.last
        if history.gap and history.spread <= _STEADY * history.gap and age <= _LATE * history.gap:
            return max(history.gap - age, 1.0)
        # Uses over the time they could have come in, both with the same forgetting.
        life = self._half_life() / math.log(2)
        span = life * (1 - self._kept(now - history.first + 1)) + 1
        return (span + self._resident) / (history.weight * self._kept(age))

    def _half_life(self) -> float:
        return float(_HALF_LIFE * max(self._resident, 16))

    def _kept(self, age: float) -> float:
        return 0.5 ** (age / self._half_life())
