"""Close the parts of an optimizer: on request, when nothing refers to it any more, or at interpreter exit."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from typing import Any

from .paging import Pager
from .pools import AdvancedMemoryPool

logger = logging.getLogger(__name__)

_CLOSING_S = 10.0


class Parts:
    """The parts of an optimizer to close; holds no reference to the optimizer.

    Attributes:
        kv_store: keys and values of idle sequences; `None`: none are kept.
        closed: whether everything is closed.
    """

    def __init__(self, systems: list[Any], pager: Pager, pool: AdvancedMemoryPool) -> None:
        self.kv_store: Any = None
        self.closed = False
        self._systems = [system for system in systems if system is not None]
        self._pager, self._pool = pager, pool

    def close(self) -> None:
        """Close everything, users before the parts they use."""
        _open.discard(self)
        for system in ([] if self.kv_store is None else [self.kv_store]) + self._systems:
            system.close()
        self._pager.close()
        with self._pager.exclusive():
            self._pool.close()
        self.closed = True

    def close_after(self, owner: Any) -> None:
        """Close once nothing refers to `owner` any more, or at interpreter exit."""
        weakref.finalize(owner, _close_in_thread, self).atexit = False
        _open.add(self)


_open: set[Parts] = set()
_closing: set[threading.Thread] = set()


def _close_in_thread(parts: Parts) -> None:
    """Close in a new thread: the collector may call this in a thread that must end, or with a lock held."""

    def close() -> None:
        try:
            parts.close()
        finally:
            _closing.discard(threading.current_thread())

    if parts.closed:
        return
    thread = threading.Thread(target=close, name="close-dropped", daemon=True)
    _closing.add(thread)
    thread.start()


def _close_open() -> None:
    """Close what is still open: a thread that is inside torch at interpreter exit would abort the process."""
    for thread in list(_closing):
        thread.join(_CLOSING_S)
    for parts in list(_open):
        try:
            parts.close()
        except Exception as error:  # the process exits anyway
            logger.warning("could not close the optimizer: %s: %s", type(error).__name__, str(error))


def _forget_open() -> None:
    for parts in _open:
        parts.closed = True
    _open.clear()
    _closing.clear()


atexit.register(_close_open)
os.register_at_fork(after_in_child=_forget_open)  # the threads and the swap file belong to the parent
