"""Write keys and values to the SSD in a background thread, one entry at a time (`KVWriter`)."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_IDLE_S = 5.0


class KVWriter:
    """Runs `work` for each job in order, in a thread that exits after an idle period.

    Args:
        work: called with a job; an exception is logged, and the next job follows.

    Attributes:
        failures: number of failed jobs.
    """

    def __init__(self, work: Callable[[Any], None]) -> None:
        self.failures = 0
        self._work = work
        self._jobs: queue.Queue[Any] = queue.Queue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, job: Any) -> None:
        """Queue a job; returns immediately."""
        with self._lock:
            self._jobs.put(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kv-writer", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Wait until all jobs are done."""
        self._jobs.join()

    def close(self) -> None:
        """Finish the queued jobs, and end the thread."""
        self.flush()
        with self._lock:
            thread = self._thread
            if thread is not None:
                self._jobs.put(None)
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._lock:
                    if self._jobs.empty():
                        self._thread = None
                        return
                continue
            try:
                if job is None:
                    with self._lock:
                        self._thread = None
                    return
                self._work(job)
            except Exception as error:  # later jobs may succeed
                self.failures += 1
                logger.warning("keys and values could not be written: %s: %s", type(error).__name__, str(error))
            finally:
                self._jobs.task_done()
                del job
