"""Serialize threads that share a model, in order of arrival (`Turns`)."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType
from typing import Any

from ...interrupts import locks_of_this_process, shield, wait_for


class Turns:
    """A fair, reentrant lock, used as a context manager.

    A model has one access order, one account of transient memory and one M-RoPE offset, which two simultaneous passes
    would overwrite.
    """

    def __init__(self) -> None:
        self._lock: Any = threading.Lock()
        locks_of_this_process.add(self)
        self._waiting: deque[threading.Event] = deque()
        self._owner: int | None = None
        self._depth = 0

    @property
    def waiting(self) -> int:
        """Number of waiting threads."""
        return len(self._waiting)

    @property
    def depth(self) -> int:
        """How many times the calling thread holds it."""
        return self._depth if self._owner == threading.get_ident() else 0

    def give_back(self, depth: int) -> None:
        """Release the lock down to an earlier depth: blocks torn apart by an interrupt never exited."""
        with shield, self._lock:
            if self._owner == threading.get_ident() and self._depth > depth:
                self._depth = depth
                if not depth:
                    self._pass_on()

    def __enter__(self) -> Turns:
        depth = self.depth
        try:
            with shield:
                self._take()
        except BaseException:
            self.give_back(depth)
            raise
        return self

    def _take(self) -> None:
        me = threading.get_ident()
        with self._lock:
            if self._owner == me:
                self._depth += 1
                return
            if self._owner is None and not self._waiting:
                self._owner, self._depth = me, 1
                return
            turn = threading.Event()
            self._waiting.append(turn)
        try:
            wait_for(turn)
        except BaseException:  # Ctrl-C
            with self._lock:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                elif turn.is_set():
                    self._pass_on()
            raise
        with self._lock:
            self._owner, self._depth = me, 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with shield, self._lock:
            self._depth -= 1
            if not self._depth:
                self._pass_on()

    def _pass_on(self) -> None:
        if self._waiting:
            self._owner = -1  # reserved for the next waiter until it wakes
            self._waiting.popleft().set()
        else:
            self._owner = None
