"""Deliver Ctrl-C between changes of state, never during one.

Python runs signal handlers in the main thread between any two of its instructions. An exception they raise (usually
`KeyboardInterrupt`) separates steps that belong together: marking a page as loading and reading it, or a pin and the
`try` that undoes it. Within `shield`, handlers are deferred until the outermost block ends, or until `wait` waits.

Only wrapped handlers can be deferred: `deferrable` wraps them during a block, such as one `generate`. Without it, or
for a handler installed inside it, code is interrupted as usual.
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
"""Higher signals are for real-time programs; each additional one costs time per pass."""

_FINALIZE = weakref.finalize.__call__.__code__

_main = threading.main_thread().ident


class Shield:
    """Defers signal handlers while the main thread is in a block of it. Blocks nest; other threads are unaffected."""

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
        """End a block in a finalizer, which must not raise: the next block that ends runs deferred handlers."""
        if threading.get_ident() == _main:
            self._depth -= 1

    @property
    def up(self) -> bool:
        """Return whether the main thread is in a block."""
        return self._depth > 0

    def hold_back(self, handler: Callable[[int, FrameType | None], Any], signum: int) -> None:
        """Defer a handler."""
        self._waiting.append((handler, signum))

    def let_through(self) -> None:
        """Run deferred handlers at a point where no state is half changed. In the main thread only.

        Raises:
            BaseException: raised by a handler; later handlers stay deferred.
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
"""The shield of this process."""

os.register_at_fork(after_in_child=shield._after_fork)


class _Deferrable:
    """A handler that is deferred while the shield is up."""

    __slots__ = ("handler",)

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler

    def __call__(self, signum: int, frame: FrameType | None) -> Any:
        if shield.up or _in_finalizer(frame):
            return shield.hold_back(self.handler, signum)
        return self.handler(signum, frame)


def _in_finalizer(frame: FrameType | None) -> bool:
    """Return whether a finalizer is running. It must not raise: its action and the signal would be lost."""
    while frame is not None:
        if frame.f_code is _FINALIZE or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


class deferrable:  # noqa: N801  (used as a block)
    """Let `shield` defer, within a block, the signal handlers that are installed when the block begins.

    Blocks nest. Outside the main thread, where no handler runs, it does nothing.
    """

    __slots__ = ("_replaced",)

    def __enter__(self) -> deferrable:
        self._replaced: list[tuple[int, _Deferrable]] = []
        if threading.get_ident() == _main:
            try:
                with shield:  # an already wrapped handler is deferred until all are wrapped
                    for signum in _SIGNALS:
                        handler = signal.getsignal(signum)
                        if callable(handler) and not isinstance(handler, _Deferrable):
                            wrapped = _Deferrable(handler)
                            self._replaced.append((signum, wrapped))
                            signal.signal(signum, wrapped)
            except BaseException:  # Ctrl-C: the block does not begin, so `__exit__` will not run
                self._restore()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._replaced:
            self._restore()
            if not shield.up:
                shield.let_through()  # left by a finalizer

    def _restore(self) -> None:
        """Restore the handlers of all signals, even if one of them interrupts this."""
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
    """Replaces a lock in a forked process, where the lock's holder and the threads that serve it do not exist."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Raise; for a non-blocking call (from a finalizer), report the lock as taken."""
        if not blocking:
            return False
        raise TensorFreedError(
            "this process was forked from the one that loaded the model, which has the threads and files that its "
            "weights need; load the model in this process, or start it with the method 'spawn'"
        )

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        """Do nothing: no lock was taken."""


locks_of_this_process: weakref.WeakSet[Any] = weakref.WeakSet()
"""Objects whose attribute `_lock` is unusable in a forked process."""


def _refuse_in_child() -> None:
    for each in list(locks_of_this_process):
        each._lock = OtherProcess()
    locks_of_this_process.clear()


os.register_at_fork(after_in_child=_refuse_in_child)


class ShieldedLock:
    """A re-entrant lock whose blocks are also shield blocks, so that the state it guards is never half changed."""

    __slots__ = ("__weakref__", "_is_owned", "_lock", "_release_save")

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()
        locks_of_this_process.add(self)
        # required by `threading.Condition` for a re-entrant lock
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
        """Acquire the lock like `threading.RLock`, from a finalizer; return whether it was acquired."""
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
        """Return whether the calling thread holds it."""
        return self._is_owned()


def wait(condition: threading.Condition) -> None:
    """Wait for a change, at most a tenth of a second in the main thread; the caller checks and waits again.

    Precondition: the condition is held, the state it guards is consistent, and exceptions of handlers may propagate.
    """
    if threading.get_ident() != _main:
        condition.wait()
        return
    condition.wait(_POLL_S)
    shield.let_through()


def wait_for(event: threading.Event) -> None:
    """Wait for an event; deferred handlers run meanwhile. Same preconditions as `wait`."""
    if threading.get_ident() != _main:
        event.wait()
        return
    while not event.wait(_POLL_S):
        shield.let_through()
