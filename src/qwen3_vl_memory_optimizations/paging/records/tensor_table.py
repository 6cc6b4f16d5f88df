"""`TensorTable`: adds tensors, with or without memory, and frees them once no caller holds their pages."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from ...pools import FRAME_BYTES, FramePool, units_of
from ..budget.ledger import Ledger
from ..transfers.moves import PageMover
from ..transfers.resident_set import ResidentSet
from ..transfers.room import Room
from .entry import PageState, TensorEntry


class Lives(Protocol):
    """Observer of runtime tensors' lifetimes. It must neither call the Pager nor wait."""

    def born(self, key: str, kind: str, n_bytes: int, creator: str, *, owned: bool) -> object:
        """Record that a tensor was created."""

    def died(self, key: str) -> None:
        """Record that a tensor was freed."""


class TensorTable:
    """Adds tensors and frees them. Used under the Pager's lock.

    Args:
        changed: the condition of that lock.
        ledger: receives the minimum size of the page frames.
        entries: the tensors, by id; only this class adds and removes them.
        frames: the memory of their pages.
        mover: releases pages.
        resident_set: notified of every tensor added or removed.
        room: makes room for tensors that are added with memory.

    Attributes:
        adding: tensors that have memory and are not in `entries` yet.
        lives: notified when runtime tensors are created and freed; `None`: no observer.
    """

    def __init__(
        self,
        changed: threading.Condition,
        ledger: Ledger,
        entries: dict[str, TensorEntry],
        frames: FramePool,
        mover: PageMover,
        resident_set: ResidentSet,
        room: Room,
    ) -> None:
        self.adding = 0
        self.lives: Lives | None = None
        self._changed = changed
        self._ledger = ledger
        self._entries = entries
        self._frames = frames
        self._mover = mover
        self._resident_set = resident_set
        self._room = room
        self._lingering: dict[TensorEntry, None] = {}  # freed, but their pages are still held or moving

    def all(self) -> Iterator[TensorEntry]:
        """Return all tensors that have memory, including freed ones that callers still hold."""
        return itertools.chain(self._entries.values(), self._lingering)

    def add(self, entry: TensorEntry, *, resident: bool) -> None:
        """Implement `Pager.add`."""
        self._mover.check_open()
        self.adding += 1
        try:
            self._back(entry, resident)
        finally:
            self.adding -= 1
            self._changed.notify_all()
        self._entries[entry.tensor_id] = entry
        if entry.kind == "weights":
            self._resident_set.add(entry)
            if resident:
                self._mover.weights_resident_bytes += sum(page.n_bytes for page in entry.pages)
            self._ledger.frames_floor_bytes = max(self._ledger.frames_floor_bytes, entry.largest_page_bytes)
        elif self.lives is not None:
            self.lives.born(entry.tensor_id, entry.kind, entry.n_bytes, entry.kind, owned=True)

    def _back(self, entry: TensorEntry, resident: bool) -> None:
        """Back an entry's permanent frames with memory, and its pages too if they are `resident`."""
        shared = entry.shared_frames()
        resident_bytes = sum(page.n_bytes for page in entry.pages) if resident else 0
        self._room.check_fits(resident_bytes + len(shared) * FRAME_BYTES, entry.kind)
        units = {unit for page in entry.pages for unit in units_of(page.frames_start, page.n_bytes)}
        self._frames.forget(entry.address, entry.n_bytes, keep=units)  # of the previous tensor at this address
        backed: list[tuple[int, int]] = []
        try:
            for frame in shared:
                self._room.make(FRAME_BYTES, entry.kind)
                self._frames.back(frame, FRAME_BYTES, owner=entry.kind)
                backed.append((frame, FRAME_BYTES))
            if resident:
                for page in entry.pages:
                    self._room.make(page.n_bytes, entry.kind)
                    self._frames.back(page.frames_start, page.n_bytes, owner=entry.kind)
                    backed.append((page.frames_start, page.n_bytes))
                    page.state, page.dirty, page.pins = PageState.RESIDENT, True, 1
                    entry.missing -= 1
            self._mover.check_open()  # this may have waited
        except BaseException:
            for page in entry.pages:
                page.state, page.dirty, page.pins = PageState.SWAPPED, False, 0
            entry.missing = len(entry.pages)
            for address, n_bytes in backed:
                self._frames.release(address, n_bytes)
            raise
        for page in entry.pages:
            page.pins = 0

    def free(self, tensor_id: str, then: Callable[[], None] | None) -> None:
        """Implement `Pager.free`."""
        entry = self._entries.pop(tensor_id, None)
        if entry is None:
            return
        entry.freed = True
        if entry.kind == "weights":
            self._resident_set.remove(entry)
            self._lower_floor(entry.largest_page_bytes)
        else:
            self._resident_set.forget(entry)
            if self.lives is not None:
                self.lives.died(tensor_id)
        entry.on_released = then or entry.on_released
        self._lingering[entry] = None
        self.release(entry)

    def _lower_floor(self, freed_bytes: int) -> None:
        """After a weight is freed, lower the floor to the largest remaining page."""
        if freed_bytes == self._ledger.frames_floor_bytes:
            weights = (entry for entry in self._entries.values() if entry.kind == "weights")
            self._ledger.frames_floor_bytes = max((entry.largest_page_bytes for entry in weights), default=0)

    def release(self, entry: TensorEntry) -> None:
        """Release a freed tensor once its pages are neither held nor moving; never wait."""
        moving = (PageState.LOADING, PageState.WRITING)
        if entry not in self._lingering or any(page.pins or page.state in moving for page in entry.pages):
            return
        del self._lingering[entry]
        for page in entry.pages:
            self._mover.discard(page)
        for frame in entry.shared_frames():
            self._frames.release(frame, FRAME_BYTES)
        if entry.on_released is not None:
            entry.on_released()
        self._changed.notify_all()
