"""Ctrl-C comes between two changes of state, never in the midst of one.

Python runs signal handlers in the main thread between any two of its instructions, and what they raise (most often
`KeyboardInterrupt`) tears apart what belongs together: a page that is marked as loading and its read, a pin and the
`try` that undoes it. Within `shield` handlers wait; they run when the outermost block ends, or where `wait` waits.

Handlers can only be made to wait while they are wrapped: `deferrable` does that for a block, such as one `generate`. A
block without, or a handler that is installed inside it, is interrupted as any other code is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from .errors import TensorFreedError

_POLL_S = 0.1
_SIGNALS = tuple(sorted(signum for signum in signal.valid_signals() if signum < 32))
"""Those above are for real-time programs; each one more takes time in each pass."""

_FINALIZE = weakref.finalize.__call__.__code__

_main = threading.main_thread().ident


class Shield:
    """Signal handlers wait while the main thread is in a block of it. Blocks nest; in other threads they do nothing."""

    __slots__ = ("_depth", "_waiting")

    def __init__(self) -> None:
        self._depth = 0
        self._waiting: deque[tuple[Callable[[int, FrameType | None], Any], int]] = deque()

    def __enter__(self) -> Shield:
        if threading.get_ident() == _main:
            self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.get_ident() == _main:
            self._depth -= 1
            if self._waiting and not self._depth:
                self.let_through()

    def leave_quietly(self) -> None:
        """End a block of a finalizer, which may raise nothing: what waits is run by the next block that ends."""
        if threading.get_ident() == _main:
            self._depth -= 1

    @property
    def up(self) -> bool:
        """Whether the main thread is in a block."""
        return self._depth > 0

    def hold_back(self, handler: Callable[[int, FrameType | None], Any], signum: int) -> None:
        """Have a handler wait."""
        self._waiting.append((handler, signum))

    def let_through(self) -> None:
        """Run handlers that wait, as at a place where nothing is half changed. In the main thread only.

        Raises:
            BaseException: what a handler raises; later ones wait on.
        """
        if threading.get_ident() == _main:
            while self._waiting:
                handler, signum = self._waiting.popleft()
                handler(signum, sys._getframe(1))

    def _after_fork(self) -> None:
        global _main
        _main = threading.get_ident()
        self._depth = 0
        self._waiting.clear()


shield = Shield()
"""The one of this process."""

os.register_at_fork(after_in_child=shield._after_fork)


class _Deferrable:
    """A handler that waits while the shield is up."""

    __slots__ = ("handler",)

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler

    def __call__(self, signum: int, frame: FrameType | None) -> Any:
        if shield.up or _in_finalizer(frame):
            return shield.hold_back(self.handler, signum)
        return self.handler(signum, frame)


def _in_finalizer(frame: FrameType | None) -> bool:
    """Whether a finalizer runs. It may raise nothing: what it was to do would be lost, and the signal too."""
    while frame is not None:
        if frame.f_code is _FINALIZE or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


class deferrable:  # noqa: N801  (used as a block)
    """Let `shield` hold back, within a block, the signal handlers that are installed when it begins.

    Blocks nest. In other threads than the main one, where no handler runs, it does nothing.
    """

    __slots__ = ("_replaced",)

    def __enter__(self) -> deferrable:
        self._replaced: list[tuple[int, _Deferrable]] = []
        if threading.get_ident() == _main:
            try:
                with shield:  # a handler that is wrapped already waits until all are
                    for signum in _SIGNALS:
                        handler = signal.getsignal(signum)
                        if callable(handler) and not isinstance(handler, _Deferrable):
                            wrapped = _Deferrable(handler)
                            self._replaced.append((signum, wrapped))
                            signal.signal(signum, wrapped)
            except BaseException:  # Ctrl-C: the block does not begin, and will not end
                self._restore()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._replaced:
            self._restore()
            if not shield.up:
                shield.let_through()  # what a finalizer left

    def _restore(self) -> None:
        """Give signals their handlers back, all of them, also where one of these interrupts it."""
        interrupt: BaseException | None = None
        while self._replaced:
            try:
                signum, wrapped = self._replaced[-1]
                if signal.getsignal(signum) is wrapped:
                    signal.signal(signum, wrapped.handler)
                self._replaced.pop()
            except BaseException as raised:
                interrupt = raised
        if interrupt is not None:
            raise interrupt


class OtherProcess:
    """Takes the place of a lock in a forked process, where whoever had it, and the threads that serve it, are not."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Refuse; a finalizer, which does not block, is told that somebody else has it."""
        if not blocking:
            return False
        raise TensorFreedError(
            "this process was forked from the one that loaded the model, which has the threads and files that its "
            "weights need; load the model in this process, or start it with the method 'spawn'"
        )

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        """Nothing was taken."""


locks_of_this_process: weakref.WeakSet[Any] = weakref.WeakSet()
"""What has an attribute `_lock` that is of no use in a forked process."""


def _refuse_in_child() -> None:
    for each in list(locks_of_this_process):
        each._lock = OtherProcess()
    locks_of_this_process.clear()


os.register_at_fork(after_in_child=_refuse_in_child)


class ShieldedLock:
    """A re-entrant lock whose blocks are blocks of the shield, so that what it guards is never half changed."""

    __slots__ = ("__weakref__", "_is_owned", "_lock", "_release_save")

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()
        locks_of_this_process.add(self)
        # what `threading.Condition` asks of a lock that may be held several times
        self._is_owned: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined]
        self._release_save: Callable[[], Any] = self._lock._release_save  # type: ignore[attr-defined]

    @property
    def _acquire_restore(self) -> Callable[[Any], None]:
        return self._lock._acquire_restore

    def __enter__(self) -> bool:
        shield.__enter__()
        try:
            return self._lock.acquire()
        except BaseException:  # `OtherProcess`
            shield.leave_quietly()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        shield.__exit__(kind, error, trace)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock as `threading.RLock` does, for a finalizer; return whether it was taken."""
        shield.__enter__()
        taken = self._lock.acquire(blocking, timeout)
        if not taken:
            shield.leave_quietly()
        return taken

    def release(self) -> None:
        """Undo one `acquire`."""
        self._lock.release()
        shield.leave_quietly()

    def is_owned(self) -> bool:
        """Whether the calling thread has it."""
        return self._is_owned()


def wait(condition: threading.Condition) -> None:
    """Wait for a change, a tenth of a second in the main thread: whoever calls looks anew, and waits again.

    Precondition: the condition is held, what it guards is whole, and what a handler raises may leave here.
    """
    if threading.get_ident() != _main:
        condition.wait()
        return
    condition.wait(_POLL_S)
    shield.let_through()


def wait_for(event: threading.Event) -> None:
    """Wait for an event; handlers that the shield holds back run meanwhile. Preconditions as those of `wait`."""
    if threading.get_ident() != _main:
        event.wait()
        return
    while not event.wait(_POLL_S):
        shield.let_through()
