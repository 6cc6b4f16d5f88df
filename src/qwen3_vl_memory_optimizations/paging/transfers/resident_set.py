"""`ResidentSet`: which pages of the weights stay, which are prefetched, and which are evicted first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from ...errors import MemoryBudgetExceeded
from ...pools import FramePool
from ...prediction import PassSchedule, choose_kept
from ...storage import BACKGROUND, PREFETCH
from ..records.entry import PAGE_BYTES, Page, PageState, TensorEntry, model_of
from .moves import PageMover

READ_AHEAD_BYTES = 5 * PAGE_BYTES
_READ_AHEAD_SHARE = 8
_MOST_READ_AHEAD_SHARE = 2
"""An explicitly set read-ahead window takes at most 1/2 of the memory for weights."""
_LOOK_AHEAD_TENSORS = 64


class EvictionPolicy(Protocol):
    """Chooses which runtime tensors leave memory (implemented by `runtime_policy.SwappingAlgorithm`)."""

    n_bytes: dict[Hashable, int]
    """Key -> bytes of each tensor that the policy counts as being in memory."""

    def insert(self, key: Hashable, n_bytes: int) -> None:
        """Record that a tensor was loaded because it is used."""

    def touch(self, key: Hashable) -> None:
        """Record a use."""

    def left(self, key: Hashable) -> None:
        """Record that a tensor left memory."""

    def remove(self, key: Hashable) -> None:
        """Forget a tensor."""

    def evict(self, n_bytes: int, protected: Container[Hashable] = ()) -> list[Hashable] | None:
        """Choose victims that free `n_bytes`, and record that they left; `None`: all are too few, nothing changed."""


class ResidentSet:
    """Follows the accesses to weights, and prefetches and evicts pages by their expected next use.

    Its methods and attributes are used under the Pager's lock.

    Args:
        entries: the tensors, by id; the Pager adds and removes them.
        frames: the memory of the pages.
        mover: moves them.
        policy: chooses which runtime tensors outside cycles leave; `None`: least recently used first.

    Attributes:
        schedule: the learned order of accesses.
        on_pass: called when an access begins a pass.
        read_ahead_bytes: maximum size of prefetched pages that leave after use, in memory or being read.
    """

    def __init__(
        self,
        entries: Mapping[str, TensorEntry],
        frames: FramePool,
        mover: PageMover,
        policy: EvictionPolicy | None = None,
    ) -> None:
        self.schedule = PassSchedule()
        self.on_pass: Callable[[], None] | None = None
        self._entries = entries
        self._frames = frames
        self._mover = mover
        self._order: list[str] = []
        self._policy = policy
        mover.on_left = self._left
        self._order_changed = False
        self._expected_bytes = 0
        self.read_ahead_bytes = READ_AHEAD_BYTES
        self._chosen_read_ahead_bytes: int | None = None
        self._least_streamed_bytes = 0
        self._plan_state: tuple[object, ...] = ()
        self._current: TensorEntry | None = None
        self._next_page = 0
        self._cycle: dict[Page, None] = {}  # pages of tensors that are used in a cycle, by last use

    def add(self, entry: TensorEntry) -> None:
        """Add a weight to the expected order, after those added before."""
        self._order.append(entry.tensor_id)
        self._order_changed = True

    def remove(self, entry: TensorEntry) -> None:
        """Remove a weight and its prefetched pages from the bookkeeping."""
        self._order.remove(entry.tensor_id)
        for page in entry.pages:
            if page.unused and not page.kept:
                self._mover.ahead_bytes -= page.n_bytes
            page.kept = True

    def start(self, order: Sequence[str], priority: int) -> None:
        """Prefetch for a first pass in this order: all pages that will stay, and the first of the others."""
        self._follow_order()
        self.schedule.expect(order)
        self._replan()
        for page in (page for name in order for page in self._entries[name].pages):
            if page.state is PageState.SWAPPED and page.error is None and self._has_place(page):
                if not self._make_room_ahead(page):
                    return
                self._mover.load(page, priority)
            else:
                self._mover.hurry(page, priority)

    def _follow_order(self) -> None:
        """Restart learning if weights were added."""
        if self._order_changed:
            self.schedule = PassSchedule(self._order, lambda name: model_of(str(name)))
            self._order_changed, self._plan_state = False, ()

    def record(self, entry: TensorEntry) -> None:
        """Record the start of an access to a weight, and prefetch: its own pages first, then the next weights."""
        self._follow_order()
        began = self.schedule.record(entry.tensor_id)
        self._current, self._next_page = entry, 0
        if began and self.on_pass is not None:
            self.on_pass()
        self._replan()
        if began:
            self._drop_unexpected()
        self.prefetch()

    def advance(self, entry: TensorEntry, next_page: int) -> None:
        """Record that the pages of a tensor before `next_page` were used; prefetch into the room they leave."""
        if entry is self._current:
            self._next_page = next_page
        self.prefetch()

    # --- what stays -------------------------------------------------------------------------------------------------

    def _replan(self) -> None:
        """Choose the pages to keep after the known passes or the memory for them changed."""
        weights_limit = self._frames.limit_bytes - (self._frames.used_bytes - self._mover.weights_resident_bytes)
        state = (self.schedule.revision, weights_limit, len(self._order))
        if state == self._plan_state:
            return
        self._plan_state = state
        known = {name for cycle in self.schedule.cycles() for name in cycle}
        self._expected_bytes = sum(
            page.n_bytes for name in self._order if name in known for page in self._entries[name].pages
        )
        pages = [page for name in self._order for page in self._entries[name].pages]
        total = sum(page.n_bytes for page in pages)
        largest = max((page.n_bytes for page in pages), default=0)
        if total <= weights_limit:
            self._set_kept(pages, set(pages))
            return
        chosen = self._chosen_read_ahead_bytes
        share = _READ_AHEAD_SHARE if chosen is None else _MOST_READ_AHEAD_SHARE
        self.read_ahead_bytes = max(largest, min(chosen or READ_AHEAD_BYTES, weights_limit // share))
        capacity = weights_limit - self.read_ahead_bytes
        kept: set[Page] = set()
        planned: set[Page] = set()
        for cycle in self.schedule.cycles():
            cycle_pages = [
                page
                for name in cycle
                if name in self._entries
                for page in self._entries[str(name)].pages
                if page not in planned
            ]
            flags = choose_kept([page.n_bytes for page in cycle_pages], capacity)
            planned.update(cycle_pages)
            for page, keep in zip(cycle_pages, flags, strict=True):
                if keep:
                    kept.add(page)
                    capacity -= page.n_bytes
        self._least_streamed_bytes = min(page.n_bytes for page in pages if page not in kept)
        self._set_kept(pages, kept)

    def _set_kept(self, pages: Iterable[Page], kept: set[Page]) -> None:
        self._mover.ahead_bytes = 0
        for page in pages:
            page.kept = page in kept
            waiting = page.unused or page.state is PageState.LOADING
            if waiting and not page.kept:
                self._mover.ahead_bytes += page.n_bytes

    def set_read_ahead(self, n_bytes: int | None) -> None:
        """Set the read-ahead window in bytes; `None`: chosen from the available memory."""
        self._chosen_read_ahead_bytes = n_bytes
        self.read_ahead_bytes = n_bytes or READ_AHEAD_BYTES  # until there are weights that do not fit
        self._plan_state = ()
        self._replan()

    # --- what comes -------------------------------------------------------------------------------------------------

    def prefetch(self) -> None:
        """Start reads for what is needed next, within the frames and the read-ahead window."""
        if self._mover.weights_resident_bytes >= self._expected_bytes:
            return  # everything is loaded or being read
        if self._mover.ahead_bytes + self._least_streamed_bytes > self.read_ahead_bytes:
            return
        for page in self._expected_pages():
            if page.state is not PageState.SWAPPED or page.error is not None:
                continue
            if not self._has_place(page):
                return
            if not self._make_room_ahead(page):
                return
            self._mover.load(page, PREFETCH)

    def _has_place(self, page: Page) -> bool:
        """Return whether a page is kept, or the read-ahead window has room for it."""
        return page.kept or self._mover.ahead_bytes + page.n_bytes <= self.read_ahead_bytes

    def _expected_pages(self) -> Iterator[Page]:
        """Yield pages by next use: the rest of this tensor, then tensors with missing pages."""
        if self._current is not None and self._current.missing:
            yield from self._current.pages[self._next_page :]
        for name in itertools.islice(self.schedule.upcoming(), _LOOK_AHEAD_TENSORS):
            entry = self._entries.get(str(name))
            if entry is not None and entry.missing:
                yield from entry.pages

    def _make_room_ahead(self, page: Page) -> bool:
        """Return whether a page can be prefetched, after making room for it."""
        if self._mover.closed:
            return False
        if page.n_bytes > self._frames.available_bytes and not self._evict_for_prefetch(page):
            return False
        try:
            if not self._mover.announce(page.n_bytes):
                return True
        except MemoryBudgetExceeded:
            return False  # the caller that needs the page gets the error
        return self._still_fits(page)

    def _still_fits(self, page: Page) -> bool:
        """Return whether a page can be loaded now. Making room may have released the lock."""
        away = page.state is PageState.SWAPPED and not self._mover.closed
        return away and page.n_bytes <= self._frames.available_bytes

    def _evict_for_prefetch(self, wanted: Page) -> bool:
        """Make room by dropping pages that are not kept, or not expected again."""
        idle = [
            page
            for name in self._order
            for page in self._entries[name].pages
            if page.state is PageState.RESIDENT and not page.pins and not page.unused and not page.kept
        ]
        for page in idle:
            if wanted.n_bytes <= self._frames.available_bytes:
                break
            self._mover.evict(page)
        return wanted.n_bytes <= self._frames.available_bytes

    def _drop_unexpected(self) -> None:
        """Drop pages prefetched for a pass that did not come; they would block the read-ahead window forever."""
        soon = {self._current.tensor_id} if self._current is not None else set()
        soon.update(str(name) for name in itertools.islice(self.schedule.upcoming(), _LOOK_AHEAD_TENSORS))
        for name in self._order:
            if name not in soon:
                for page in self._entries[name].pages:
                    if page.unused and not page.kept:
                        self._mover.evict(page)

    def read_cycle_ahead(self, upcoming: Sequence[TensorEntry], ahead_bytes: int) -> None:
        """Prefetch runtime tensors that are used in a cycle, in order of use.

        Args:
            upcoming: tensors used next.
            ahead_bytes: how much of it may be in memory before use, or being read.
        """
        for page in (page for entry in upcoming for page in entry.pages):
            away = page.state is PageState.SWAPPED
            if away or page.unused or page.state is PageState.LOADING:
                ahead_bytes -= page.n_bytes
            if away and page.error is None:
                if ahead_bytes < 0 or not self._make_room_in_cycle(page):
                    return
                self._mover.load(page, PREFETCH)

    def used_in_cycle(self, entry: TensorEntry) -> None:
        """Record a use of a runtime tensor whose next use is after all others of its cycle."""
        for page in entry.pages:
            self._cycle.pop(page, None)
            self._cycle[page] = None

    def used(self, entry: TensorEntry) -> None:
        """Record a use of a runtime tensor."""
        if self._policy is not None:
            if entry.tensor_id in self._policy.n_bytes:
                self._policy.touch(entry.tensor_id)
            else:
                self._policy.insert(entry.tensor_id, entry.n_bytes)

    def rested(self, entry: TensorEntry) -> None:
        """Record that a runtime tensor left its cycle."""
        for page in entry.pages:
            self._cycle.pop(page, None)

    def used_away(self, entry: TensorEntry) -> None:
        """Record a use of a runtime tensor that does not load it yet."""
        self.used(entry)
        self._left(entry)

    def mentioned(self, entry: TensorEntry) -> None:
        """Record a use of a runtime tensor for which it need not be in memory."""
        if entry.missing < len(entry.pages):
            self.used(entry)

    def _left(self, entry: TensorEntry) -> None:
        """Record that a page left memory."""
        if self._policy is not None and entry.missing == len(entry.pages) and entry.tensor_id in self._policy.n_bytes:
            self._policy.left(entry.tensor_id)

    def forget(self, entry: TensorEntry) -> None:
        """Stop expecting a runtime tensor."""
        if self._policy is not None:
            self._policy.remove(entry.tensor_id)
        for page in entry.pages:
            self._cycle.pop(page, None)

    def _make_room_in_cycle(self, wanted: Page) -> bool:
        """Make room by dropping the most recently used pages: in a cycle they are needed last."""
        if self._mover.closed:
            return False
        while wanted.n_bytes > self._frames.available_bytes + self._mover.leaving_bytes:
            page = next((page for page in reversed(self._cycle) if not (page.pins or page.awaited)), None)
            if page is None:
                return False
            del self._cycle[page]
            self._mover.evict(page)
        if wanted.n_bytes > self._frames.available_bytes:
            return False
        try:
            self._mover.announce(wanted.n_bytes)
        except MemoryBudgetExceeded:
            return False  # the caller that needs the page gets the error
        return self._still_fits(wanted)

    # --- what leaves ------------------------------------------------------------------------------------------------

    def victims(self, n_bytes: int) -> list[Page]:
        """Choose eviction candidates of at least `n_bytes`, or all there are; best victim first.

        Streamed pages, then the runtime tensors that the policy chooses, then tensors used in a cycle and weights by
        farthest next use.
        """
        distances = self.schedule.distances()
        never = len(self._order) * 4

        def farthest_first(pages: Iterable[Page]) -> list[Page]:
            return sorted(pages, key=lambda page: -distances.get(page.entry.tensor_id, never))

        idle = self._idle()
        weights = [page for page in idle if page.entry.kind == "weights"]
        found = farthest_first(page for page in weights if not page.kept and not page.unused)
        if _size(found) < n_bytes:
            found += self._runtime_victims(idle, n_bytes - _size(found))
        if _size(found) < n_bytes:
            cycle = (page for page in idle if page in self._cycle)
            found += sorted(cycle, key=lambda page: page.last_access, reverse=True)
        if _size(found) < n_bytes:
            found += farthest_first(page for page in weights if page.kept or page.unused)
        return found

    def _idle(self) -> list[Page]:
        pages = (page for entry in self._entries.values() for page in entry.pages)
        return [page for page in pages if page.state is PageState.RESIDENT and not (page.pins or page.awaited)]

    def _runtime_victims(self, idle: Iterable[Page], n_bytes: int) -> list[Page]:
        """Choose idle pages of runtime tensors outside cycles.

        What the policy gave up before comes first: it chooses whole tensors, of which some pages may have stayed. Last
        come tensors that have not been used since they were brought, or of which other pages are in use.
        """
        pages = [page for page in idle if page.entry.kind != "weights" and page not in self._cycle]
        pages.sort(key=lambda page: page.last_access)
        if self._policy is None:
            return pages
        counted = self._policy.n_bytes
        found = [page for page in pages if page.entry.tensor_id not in counted and not page.unused]
        if _size(found) < n_bytes:
            of_tensor: dict[Hashable, list[Page]] = {}
            for page in pages:
                if page.entry.tensor_id in counted and not any(each.pins or each.awaited for each in page.entry.pages):
                    of_tensor.setdefault(page.entry.tensor_id, []).append(page)
            protected = counted.keys() - of_tensor.keys()
            chosen = self._policy.evict(n_bytes - _size(found), protected)
            if chosen is None:
                chosen = self._policy.evict(sum(counted[key] for key in of_tensor), protected) or []
            found += [page for key in chosen for page in of_tensor[key]]
        if _size(found) < n_bytes:
            taken = set(found)
            found += [page for page in pages if page not in taken]
        return found

    def bring(self, entry: TensorEntry) -> bool:
        """Start reading a runtime tensor into free memory; return whether all of it is loaded or being read."""
        away = [page for page in entry.pages if page.state is PageState.SWAPPED and page.error is None]
        needed = sum(page.n_bytes for page in away)
        if not away or self._mover.closed or self._mover.weights_resident_bytes < self._expected_bytes:
            return False
        if needed > self._frames.available_bytes:
            return False
        try:
            self._mover.announce(needed)
        except MemoryBudgetExceeded:
            return False
        for page in away:
            if not self._still_fits(page):
                return False
            self._mover.load(page, BACKGROUND)
        return True

    def swap_ahead(self, share: float) -> int:
        """Swap runtime tensors out until they fill at most a share of the memory; return the bytes that leave."""
        in_memory = (PageState.RESIDENT, PageState.LOADING)
        runtime = (page for entry in self._entries.values() if entry.kind != "weights" for page in entry.pages)
        over = sum(page.n_bytes for page in runtime if page.state in in_memory) - int(share * self._frames.limit_bytes)
        leaving = 0
        for page in self._runtime_victims(self._idle(), over) if over > 0 else ():
            if leaving >= over:
                break
            self._mover.evict(page)
            leaving += 0 if page.resident else page.n_bytes  # it stays if the SSD is full
        return leaving


def _size(pages: Iterable[Page]) -> int:
    return sum(page.n_bytes for page in pages)
