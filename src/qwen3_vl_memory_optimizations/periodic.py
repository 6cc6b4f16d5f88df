"""`Periodic`: a thread that runs a function repeatedly, with an adjustable pause."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable

from .errors import ConfigurationError

logger = logging.getLogger(__name__)


class Periodic:
    """Calls `work` after each pause, until it returns `False` or `close` is called.

    An exception in `work` is logged, counted and stored; the next call follows after the pause.

    Args:
        work: returns whether to continue. It should refer weakly to the owner of this thread.
        interval_s: the pause in seconds.
        name: name of the thread.

    Attributes:
        failures: number of exceptions raised by the work.
        last_error: the latest exception; `None`: none so far.

    Raises:
        ConfigurationError: the pause is not above zero.
    """

    def __init__(self, work: Callable[[], bool], interval_s: float, name: str) -> None:
        self.failures = 0
        self.last_error: Exception | None = None
        self._work = work
        self._ended = False
        self._due = False
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.interval_s = interval_s

    @property
    def interval_s(self) -> float:
        """The pause in seconds; a new value takes effect at once."""
        return self._interval_s

    @interval_s.setter
    def interval_s(self, interval_s: float) -> None:
        if not (math.isfinite(interval_s) and interval_s > 0):
            raise ConfigurationError(f"{self._thread.name}: an interval of {interval_s!r} s is not above zero")
        self._interval_s = float(interval_s)
        self._changed.set()

    def start(self) -> None:
        """Start, with a pause first."""
        self._thread.start()

    def wake(self) -> None:
        """Run the work now, or once more if it is running; never wait."""
        self._due = True
        self._changed.set()

    def is_alive(self) -> bool:
        """Return whether the thread is running."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop the thread after the current call of the work."""
        self._ended = True
        self._changed.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            changed = self._changed.wait(self._interval_s)
            self._changed.clear()
            if self._ended:
                return
            due, self._due = self._due or not changed, False
            if due and not self._go_on():
                return

    def _go_on(self) -> bool:
        try:
            return self._work()
        except Exception as error:
            self.failures += 1
            self.last_error = error.with_traceback(None)  # its frames would keep the work's objects alive
            logger.exception("%s: failed (%d times so far); retrying after the pause", self._thread.name, self.failures)
            return True
