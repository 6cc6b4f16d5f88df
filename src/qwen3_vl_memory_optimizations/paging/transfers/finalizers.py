"""`FinalizerQueue`: what finalizers ask for is done when no state is half changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ...interrupts import ShieldedLock


class FinalizerQueue:
    """Actions of finalizers, done under the Pager's lock.

    The collector runs finalizers anywhere: in a thread that walks the tensors, that has moved half a page, or that
    holds a lock which comes after the Pager's. So a finalizer neither waits for the lock nor acts in a thread that has
    it. What it leaves is done by whoever makes room next, which is when it matters.

    Args:
        lock: the Pager's.
    """

    def __init__(self, lock: ShieldedLock) -> None:
        self._lock = lock
        self._actions: deque[Callable[[], None]] = deque()

    def add(self, action: Callable[[], None]) -> None:
        """Do something at once if the lock is free, else later. Never waits."""
        self._actions.append(action)
        if not self._lock.is_owned() and self._lock.acquire(blocking=False):
            try:
                self.run()
            finally:
                self._lock.release()

    def run(self) -> bool:
        """Do what was left. Precondition: the lock is held, and nothing relies on what it guards to stay the same.

        Returns:
            Whether there was something.
        """
        found = bool(self._actions)
        while self._actions:
            self._actions.popleft()()
        return found
