"""`PassSchedule`: the order in which weights are accessed, learned from the passes themselves.

A transformer accesses its weights in the same order at each forward. A *pass* is a run of accesses without repetition.
The next one begins with the first access that was already made in the pass, or that is unexpected and known to begin
passes. Passes that begin with the same tensor are of the same sort: an image prefill begins with the vision tower, a
decode step with the first layer. For each sort, the latest order and the sort that followed it are remembered, so the
next use of every tensor is known across the end of a pass.

Two models that alternate (one and its draft) have separate passes: a pass never mixes the items of two groups.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence

_RECENT_PASSES = 32
"""Number of recent passes in which frequency is counted. Even, so that two alternating sorts are equally frequent."""


class PassSchedule:
    """Learns passes and predicts accesses.

    Args:
        hint: the order to expect before any access (the order of the checkpoint).
        group_of: item -> its group; default: all are in one group.

    Attributes:
        passes: number of complete passes.
        revision: increases when `cycles` changes.
    """

    def __init__(
        self, hint: Sequence[Hashable] = (), group_of: Callable[[Hashable], Hashable] = lambda item: None
    ) -> None:
        self._group_of = group_of
        self._hints: dict[Hashable, list[Hashable]] = {}
        for item in hint:
            self._hints.setdefault(group_of(item), []).append(item)
        self._orders: dict[Hashable, list[Hashable]] = {}
        self._groups_known: set[Hashable] = set()
        self._recent: deque[Hashable] = deque(maxlen=_RECENT_PASSES)
        self._successor: dict[Hashable, Hashable] = {}
        self._previous: Hashable | None = None
        self._group: Hashable = None
        self._current: list[Hashable] = []
        self._seen: set[Hashable] = set()
        self._expected: list[Hashable] = []
        self._index: dict[Hashable, int] = {}
        self._position = -1
        self._ranking: list[Hashable] = []
        self.passes = 0
        self.revision = 0

    def record(self, item: Hashable) -> bool:
        """Record an access; return whether it began a new pass."""
        position = self._position + 1
        expected = position < len(self._expected) and self._expected[position] == item
        group = self._group_of(item)
        begins = (
            not self._current or item in self._seen or group != self._group or (item in self._orders and not expected)
        )
        if begins:
            self._finish_pass()
            self._group = group
            self._expect(self._order_beginning_with(item))
            if group not in self._groups_known:
                self.revision += 1  # `cycles` now guesses better
            position = 0
        elif not expected:
            position = self._index.get(item, self._position)
        self._position = position
        self._current.append(item)
        self._seen.add(item)
        return begins

    def expect(self, order: Sequence[Hashable]) -> None:
        """Predict a pass in this order, before any access. Its items are in one group."""
        if not self._current and not self._orders and order:
            self._group = self._group_of(order[0])
            self._expect(list(order))
            self.revision += 1

    def upcoming(self) -> Iterator[Hashable]:
        """Yield the items expected after the last access, nearest first, across one end of a pass."""
        yield from self._expected[self._position + 1 :]
        yield from self._following()

    def distances(self) -> dict[Hashable, int]:
        """Return the number of accesses until each expected item; items that are not expected are absent."""
        distances: dict[Hashable, int] = {}
        for distance, item in enumerate(self.upcoming(), start=1):
            distances.setdefault(item, distance)
        return distances

    def cycles(self) -> list[list[Hashable]]:
        """Return the known orders, most frequent recent sort of pass first, then guesses for groups without one."""
        guesses = {self._group: self._expected} if self._expected else {}
        for group, hint in self._hints.items():
            guesses.setdefault(group, hint)
        known = [self._orders[first] for first in self._ranking]
        return known + [order for group, order in guesses.items() if group not in self._groups_known]

    def _following(self) -> list[Hashable]:
        first = self._current[0] if self._current else None
        return self._orders.get(self._successor.get(first, first), [])

    def _finish_pass(self) -> None:
        if not self._current:
            return
        first = self._current[0]
        changed = self._orders.get(first) != self._current
        self._orders[first] = self._current
        self._groups_known.add(self._group)
        self._recent.append(first)
        counts = Counter(self._recent)
        before = dict.fromkeys((*self._ranking, first))  # keeps the order of equally frequent sorts
        ranking = sorted(before, key=lambda first: -counts[first])
        if changed or ranking != self._ranking:
            self._ranking = ranking
            self.revision += 1
        if self._previous is not None:
            self._successor[self._previous] = first
        self._previous = first
        self._current, self._seen = [], set()
        self.passes += 1

    def _order_beginning_with(self, item: Hashable) -> list[Hashable]:
        known = self._orders.get(item)
        if known is not None:
            return known
        if self._previous is None and self._expected[:1] == [item]:
            return self._expected  # as predicted by `expect`
        # A new sort of pass: most likely the rest of a known order from here on.
        hint = self._hints.get(self._group, [])
        for order in ([self._orders[self._previous]] if self._previous is not None else []) + [hint]:
            if item in order:
                return order[order.index(item) :]
        return [item]

    def _expect(self, order: list[Hashable]) -> None:
        self._expected = order
        self._index = {item: position for position, item in enumerate(order)}
        self._position = -1
