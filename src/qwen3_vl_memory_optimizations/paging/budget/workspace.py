"""`Workspaces`: scratch memory per computing thread, debited as it grows."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from ...compression import Scratch
from ...pools import FramePool
from ..records.entry import PAGE_BYTES

_OWNER = "workspace"
_LEAST_SLOT_BYTES = 1 << 16


class Account(Protocol):
    """The account that is debited: a Pager."""

    frames: FramePool

    def debit(self, owner: str, n_bytes: int) -> None:
        """Add to what an owner holds, before the memory is taken."""

    def debit_later(self, owner: str, n_bytes: int) -> None:
        """Subtract from what an owner holds; safe to call from a finalizer."""


class Workspaces:
    """Gives each thread one workspace; its memory is credited back when the thread ends.

    Args:
        pager: debited through its account `workspace`.
    """

    def __init__(self, pager: Account) -> None:
        self._pager = weakref.ref(pager)
        self._local = threading.local()

    def of_this_thread(self) -> Scratch:
        """Return the workspace of the calling thread. Precondition: the Pager is alive."""
        scratch = getattr(self._local, "scratch", None)
        return self._make() if scratch is None else scratch

    def _make(self) -> Scratch:
        reference, held = self._pager, [0]
        pager = reference()
        assert pager is not None

        def grow(n_bytes: int) -> None:
            alive = reference()
            assert alive is not None
            alive.debit(_OWNER, n_bytes)
            held[0] += n_bytes

        slot_bytes = max(_LEAST_SLOT_BYTES, min(4 * PAGE_BYTES, pager.frames.limit_bytes // 16))
        scratch = self._local.scratch = Scratch(grow, slot_bytes)
        weakref.finalize(scratch, _give_back, reference, held).atexit = False
        return scratch


def _give_back(pager: weakref.ref[Account], held: list[int]) -> None:
    """Credit a workspace back after its thread ended."""
    alive = pager()
    if alive is not None and held[0]:
        alive.debit_later(_OWNER, -held[0])
