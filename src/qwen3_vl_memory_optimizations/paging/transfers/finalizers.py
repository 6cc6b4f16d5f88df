"""`FinalizerQueue`: run the actions of finalizers when no state is half changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ...interrupts import ShieldedLock


class FinalizerQueue:
    """Actions of finalizers, run under the Pager's lock.

    The collector can run a finalizer in any thread: one that iterates over the tensors, has moved half a page, or holds
    a lock that comes after the Pager's. So a finalizer never waits for the lock, and never acts in a thread that holds
    it. Its queued action runs when a caller next makes room, which is when it matters.

    Args:
        lock: the Pager's.
    """

    def __init__(self, lock: ShieldedLock) -> None:
        self._lock = lock
        self._actions: deque[Callable[[], None]] = deque()

    def add(self, action: Callable[[], None]) -> None:
        """Run an action at once if the lock is free, else later; never wait."""
        self._actions.append(action)
        if not self._lock.is_owned() and self._lock.acquire(blocking=False):
            try:
                self.run()
            finally:
                self._lock.release()

    def run(self) -> bool:
        """Run the queued actions. Precondition: the lock is held, and the caller allows the guarded state to change.

        Returns:
            Whether any action ran.
        """
        found = bool(self._actions)
        while self._actions:
            self._actions.popleft()()
        return found
