"""`Room`: make room for pages under the ledger's limit, or refuse."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from ...errors import MemoryBudgetExceeded, format_bytes
from ...interrupts import wait
from ...pools import FRAME_BYTES, FramePool
from ..budget.ledger import Ledger
from ..records.entry import PageState, TensorEntry
from .finalizers import FinalizerQueue
from .moves import PageMover
from .resident_set import ResidentSet


class Room:
    """Evicts pages until others fit. Used under the Pager's lock.

    Args:
        changed: the condition of the Pager's lock; waiting on it releases the lock.
        ledger: limits the page frames.
        entries: the tensors, by id; the Pager adds and removes them.
        frames: the memory of the pages.
        mover: moves them.
        resident_set: decides the eviction order.
        finalizers: may have memory to release.

    Attributes:
        computing: thread -> ranges of pages that it computes on.
        awaiting: threads that wait for a page, and continue once it is loaded.
    """

    def __init__(
        self,
        changed: threading.Condition,
        ledger: Ledger,
        entries: Mapping[str, TensorEntry],
        frames: FramePool,
        mover: PageMover,
        resident_set: ResidentSet,
        finalizers: FinalizerQueue,
    ) -> None:
        self.computing: dict[int, int] = {}
        self.awaiting = 0
        self._changed = changed
        self._ledger = ledger
        self._entries = entries
        self._frames = frames
        self._mover = mover
        self._resident_set = resident_set
        self._finalizers = finalizers

    def make(self, n_bytes: int, owner: str) -> bool:
        """Evict until `n_bytes` fit, and announce what they take from the system.

        Returns:
            Whether the lock may have been released meanwhile.

        Raises:
            MemoryBudgetExceeded: pinned pages leave too little room.
            TensorFreedError: the Pager is closed, and no page leaves any more.
        """
        waited = self._evict_until(n_bytes, owner)
        while self._mover.announce(n_bytes):
            self._evict_until(n_bytes, owner)
            waited = True
        return waited

    def _evict_until(self, n_bytes: int, owner: str) -> bool:
        frames, mover = self._frames, self._mover
        waited = False
        mover.write_error = None  # left by an attempt that no thread waited for
        while n_bytes > frames.available_bytes:
            mover.check_open()
            if self._finalizers.run():
                continue
            wanted = n_bytes - frames.available_bytes - mover.leaving_bytes
            victims = self._resident_set.victims(wanted) if wanted > 0 else []
            others_compute = self._others_compute()
            if not victims and not mover.moving and not others_compute:
                raise self._does_not_fit(n_bytes, frames.available_bytes, owner)
            for page in victims:
                if n_bytes <= frames.available_bytes + mover.leaving_bytes:
                    break
                mover.evict(page)
            if n_bytes <= frames.available_bytes:
                break
            if mover.write_error is None and (mover.moving or (others_compute and not victims)):
                wait(self._changed)
                waited = True
            if mover.write_error is not None:
                error, mover.write_error = mover.write_error, None
                raise error
        return waited

    def check_fits(self, n_bytes: int, owner: str) -> None:
        """Raise if evicting everything would not make room, before anything is evicted.

        Raises:
            MemoryBudgetExceeded: pinned pages leave too little room.
        """
        self._finalizers.run()
        if n_bytes <= self._frames.available_bytes or self._others_compute():
            return
        available = self._frames.limit_bytes - self.kept_bytes()
        if n_bytes > available:
            raise self._does_not_fit(n_bytes, available, owner)

    def kept_bytes(self) -> int:
        """Return the frames in use that cannot leave now, because their pages are pinned."""
        away = (PageState.SWAPPED, PageState.FREED)
        pages = (page for entry in self._entries.values() for page in entry.pages)
        return self._frames.used_bytes - sum(page.n_bytes for page in pages if not page.pins and page.state not in away)

    def refit(self) -> None:
        """Bring the frames under the limit that the ledger now leaves.

        Raises:
            MemoryBudgetExceeded: pinned pages leave too little room.
        """
        frames = self._frames
        limit = self._limit_bytes()
        if limit == frames.limit_bytes:
            return
        while limit < frames.used_bytes:
            frames.limit_bytes = limit
            try:
                self._evict_until(0, "budget")
            except BaseException:
                frames.limit_bytes = frames.used_bytes
                raise
            limit = self._limit_bytes()  # the lock may have been released, and other threads refit too
        frames.set_limit(limit)

    def undo_refit(self) -> None:
        """Restore the frames' limit after a failed refit, once the ledger is restored."""
        self._frames.limit_bytes = max(self._limit_bytes(), self._frames.used_bytes)

    def _limit_bytes(self) -> int:
        return self._ledger.frames_limit_bytes() // FRAME_BYTES * FRAME_BYTES

    def _others_compute(self) -> bool:
        """Return whether other threads compute, or soon will, on pages that they unpin without waiting for this one."""
        return self.awaiting > 0 or (bool(self.computing) and threading.get_ident() not in self.computing)

    def _does_not_fit(self, n_bytes: int, available: int, owner: str) -> MemoryBudgetExceeded:
        limit = self._frames.limit_bytes
        return MemoryBudgetExceeded(
            f"{owner}: {format_bytes(n_bytes)} do not fit into the {format_bytes(limit)} for managed "
            f"tensors, of which {format_bytes(limit - available)} cannot leave; raise the budget",
            requested_bytes=n_bytes,
            available_bytes=max(0, available),
            budget_bytes=limit,
            owner=owner,
        )
