"""`Access`: make a tensor's bytes resident and pinned for the code that uses them, waiting if necessary."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from ...errors import TensorFreedError
from ...interrupts import wait
from ...storage import DEMAND
from ..records.entry import IN_MEMORY, Page, PageState, TensorEntry
from ..records.stats import PagingStats
from .moves import PageMover
from .resident_set import ResidentSet
from .room import Room

_ROW_READ_COST_BYTES = 1 << 16


class Access:
    """Pins pages for code that computes on them. Takes the lock itself, and releases it during the computation.

    Args:
        lock: the Pager's.
        changed: its condition.
        mover: moves the pages.
        room: makes room for them.
        resident_set: notified of each access.
        stats: receives hits, misses, faults and stalls.
        release: called with a freed tensor when one of its pins is removed.
        timer: a monotonic clock in seconds, for the stall counter.

    Attributes:
        recorders: called under the lock at each access, with the tensor's id, encoded bytes and kind.
        listeners: the same, for runtime tensors that are not used in a cycle.
    """

    def __init__(
        self,
        lock: AbstractContextManager[object],
        changed: threading.Condition,
        mover: PageMover,
        room: Room,
        resident_set: ResidentSet,
        stats: PagingStats,
        release: Callable[[TensorEntry], None],
        timer: Callable[[], float],
    ) -> None:
        self._lock = lock  # `with` on the lock is cheaper than on the condition
        self._changed = changed
        self._mover = mover
        self._room = room
        self._resident_set = resident_set
        self._stats = stats
        self._release = release
        self._timer = timer
        self._clock = 0
        self.recorders: tuple[Callable[[str, int, str], None], ...] = ()
        self.listeners: tuple[Callable[[str, int, str], None], ...] = ()

    def record(self, entry: TensorEntry) -> None:
        """Record an access that needs no bytes."""
        with self._lock:
            self._clock += 1
            for page in entry.pages:
                page.last_access = self._clock
            if entry.kind != "weights":
                self._resident_set.mentioned(entry)

    def note_use(self, entry: TensorEntry) -> None:
        """Record a use of a runtime tensor, resident or not. Called under the lock."""
        self._clock += 1
        for page in entry.pages:
            page.last_access = self._clock
        for recorder in (*self.recorders, *self.listeners):
            recorder(entry.tensor_id, entry.n_bytes, entry.kind)
        if any(page.state in IN_MEMORY for page in entry.pages):
            self._resident_set.used(entry)
        else:
            self._resident_set.used_away(entry)

    def row_ranges(self, entry: TensorEntry) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows in order, each resident and pinned until the next is requested."""
        pages = entry.pages
        first, n_pages = 0, len(pages)
        while first < n_pages:
            with self._lock:
                if first == 0:
                    self._begin(entry)
                self._await(pages[first])
                last = first
                while last < n_pages and pages[last].state is PageState.RESIDENT:
                    pages[last].pins += 1
                    last += 1
                self._enter()
            try:
                yield entry.row_range(first, last)
            finally:
                with self._lock:
                    self._leave()
                    self._used(entry, first, last)
            first = last

    def _enter(self) -> None:
        """Record that this thread computes on pinned pages."""
        computing, thread = self._room.computing, threading.get_ident()
        computing[thread] = computing.get(thread, 0) + 1

    def _leave(self) -> None:
        computing, thread = self._room.computing, threading.get_ident()
        computing[thread] -= 1
        if not computing[thread]:
            del computing[thread]
        self._changed.notify_all()

    def _used(self, entry: TensorEntry, first: int, last: int) -> None:
        """Unpin pages of a tensor after computing on them."""
        for page in entry.pages[first:last]:
            if page.unused:
                self._mover.touch(page)
            page.pins -= 1
            if not page.kept:
                self._mover.evict(page)
        if entry.freed:
            self._release(entry)
        self._resident_set.advance(entry, last)

    def hold(self, entries: Sequence[TensorEntry]) -> bool:
        """Pin tensors that are entirely in memory during a computation; counts as an access to each.

        Returns:
            `False`, with nothing done, if any of their pages is missing.
        """
        with self._lock:
            for entry in entries:
                if entry.missing or entry.freed:
                    return False
            if self._mover.closed:
                return False
            for entry in entries:
                for page in entry.pages:
                    page.pins += 1
            self._enter()
            try:
                for entry in entries:
                    self._begin(entry)
            except BaseException:
                self.let_go(entries)
                raise
        return True

    def let_go(self, entries: Sequence[TensorEntry]) -> None:
        """Undo one `hold`."""
        with self._lock:
            self._leave()
            for entry in entries:
                self._used(entry, 0, len(entry.pages))

    def pin(self, entry: TensorEntry) -> None:
        """Make a whole tensor resident and pin it.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what is pinned.
        """
        with self._lock:
            self._begin(entry)
            if entry.missing:
                self._room.check_fits(sum(page.n_bytes for page in entry.pages if not page.pins), entry.kind)
            pinned: list[Page] = []
            try:
                for page in entry.pages:
                    self._await(page)
                    page.pins += 1
                    pinned.append(page)
                    self._mover.touch(page)
            except BaseException:
                for page in pinned:
                    page.pins -= 1
                self._release(entry)
                raise

    def unpin(self, entry: TensorEntry) -> None:
        """Undo one `pin`; never wait."""
        with self._lock:
            for page in entry.pages:
                page.pins -= 1
                if not page.kept and page.pins == 0 and page.state is PageState.RESIDENT:
                    self._mover.evict(page)
            self._release(entry)

    def pin_all(self, entries: Sequence[TensorEntry], read_ahead: Callable[[], None]) -> None:
        """Make runtime tensors resident and pin them.

        Args:
            entries: in order of use.
            read_ahead: starts the reads of missing pages and of what is used next.

        Raises:
            MemoryBudgetExceeded: they do not fit beside what is pinned; nothing is pinned.
        """
        with self._lock:
            pinned: list[Page] = []

            def pin(page: Page) -> None:
                page.pins += 1
                pinned.append(page)
                self._mover.touch(page)

            try:
                for entry in entries:
                    self._begin(entry, in_cycle=True)
                    for page in entry.pages:
                        if page.resident:
                            pin(page)
                read_ahead()
                held = set(map(id, pinned))
                for page in (page for entry in entries for page in entry.pages if id(page) not in held):
                    self._await(page)
                    pin(page)
            except BaseException:
                for page in pinned:
                    page.pins -= 1
                for entry in entries:
                    self._release(entry)
                self._changed.notify_all()
                raise
            self._enter()

    def unpin_all(self, entries: Sequence[TensorEntry], read_ahead: Callable[[], None]) -> None:
        """Undo one `pin_all`, then call `read_ahead`; never wait."""
        with self._lock:
            self._leave()
            for entry in entries:
                for page in entry.pages:
                    page.pins -= 1
                if entry.freed:
                    self._release(entry)
                else:
                    self._resident_set.used_in_cycle(entry)
            read_ahead()

    def mark_dirty(self, entry: TensorEntry) -> None:
        """Record that a pinned tensor was written to and no longer equals its source."""
        with self._lock:
            entry.writes += 1
            for page in entry.pages:
                page.dirty = True
                self._mover.forget_swapped(page)

    def read_rows(self, entry: TensorEntry, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the encoded segments of some rows (int64 `[n]`), from memory or as single rows from the SSD.

        An embedding look-up touches few rows of the largest tensor; loading all of it would be wasteful.
        Precondition: pages hold whole rows.
        """
        assert entry.rows_per_page is not None
        with self._lock:
            if entry.freed or self._mover.closed:
                raise _freed(entry)
        views = entry.encoded(0, entry.rows)
        data_name, data = next(iter(views.items()))
        picked = data.new_empty((len(rows), data.shape[1]))
        # Reading the whole tensor is cheaper than very many single rows.
        few = len(rows) * _ROW_READ_COST_BYTES < entry.n_bytes
        for position, row in enumerate(rows.tolist()):
            page = entry.pages[row // entry.rows_per_page]
            stored: torch.Tensor | None = None
            while True:
                with self._lock:
                    if not (few and _only_in_source(page)):
                        self._await(page)
                        self._mover.touch(page)
                        picked[position] = data[row]
                        break
                    if stored is not None:  # and the row that was read without the lock is still current
                        picked[position] = stored
                        self._stats.row_bytes_read += stored.nbytes
                        break
                stored = self._read_row(entry, row, data.dtype)
        others = {name: segment for name, segment in views.items() if name != data_name}
        return {data_name: picked} | {
            name: segment if name in entry.shared else segment[rows] for name, segment in others.items()
        }

    def _read_row(self, entry: TensorEntry, row: int, dtype: torch.dtype) -> torch.Tensor:
        """Read a row from the source, with the lock released meanwhile."""
        assert entry.source is not None
        n_bytes = entry.n_bytes // entry.rows
        raw = entry.source.file.read_bytes(entry.source.offset_bytes + row * n_bytes, n_bytes)
        return torch.frombuffer(bytearray(raw), dtype=dtype)

    def _begin(self, entry: TensorEntry, *, in_cycle: bool = False) -> None:
        if entry.freed or self._mover.closed:
            raise _freed(entry)
        self._clock += 1
        clock, stats = self._clock, self._stats
        for page in entry.pages:
            page.last_access = clock
            missed = page.unused or page.state is not PageState.RESIDENT
            if missed:
                stats.misses += 1
                stats.miss_bytes += page.n_bytes
            else:
                stats.hits += 1
                stats.hit_bytes += page.n_bytes
        for recorder in self.recorders:
            recorder(entry.tensor_id, entry.n_bytes, entry.kind)
        if entry.kind == "weights":
            self._resident_set.record(entry)
        elif not in_cycle:  # cyclic tensors need no prediction, and each token accesses thousands of them
            for listener in self.listeners:
                listener(entry.tensor_id, entry.n_bytes, entry.kind)
            self._resident_set.used(entry)

    def _await(self, page: Page) -> None:
        """Wait until a page is resident; start its load if no other thread has."""
        if page.state is PageState.RESIDENT:
            return
        self._stats.faults += 1
        start = self._timer()
        page.error = None
        try:
            while not page.resident:
                if page.error is not None:
                    error, page.error = page.error, None
                    raise error
                if self._mover.closed or page.state is PageState.FREED:
                    raise _freed(page.entry)
                if page.state is PageState.SWAPPED:
                    # This may have waited, and another thread may have loaded the page.
                    if not self._room.make(page.n_bytes, page.entry.kind):
                        self._mover.load(page, DEMAND)
                    continue
                self._mover.hurry(page)
                self._wait(page)
        finally:
            self._changed.notify_all()  # for threads that waited for this one to continue
        self._stats.stall_s += self._timer() - start

    def _wait(self, page: Page) -> None:
        """Wait for a change. A loaded page stays for this thread; others that lack room would evict it unused."""
        page.awaited += 1
        self._room.awaiting += 1
        try:
            wait(self._changed)
        finally:
            page.awaited -= 1
            self._room.awaiting -= 1


def _only_in_source(page: Page) -> bool:
    """Return whether a page's bytes are only in its tensor's source, not in memory or the swap file."""
    away = page.state is PageState.SWAPPED or page.state is PageState.LOADING
    return away and page.entry.source is not None and page.swap_offset is None and not page.dirty


def _freed(entry: TensorEntry) -> TensorFreedError:
    return TensorFreedError(f"{entry.tensor_id}: its memory was freed")
