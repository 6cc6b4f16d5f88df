"""`KVWriter`: a thread that writes keys and values to the SSD, one entry at a time, behind everything else."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_IDLE_S = 5.0


class KVWriter:
    """Does `work` for each job in order, in a thread that ends when there was none for a while.

    Args:
        work: called with a job; what it raises is logged, and the next job comes.

    Attributes:
        failures: jobs that raised.
    """

    def __init__(self, work: Callable[[Any], None]) -> None:
        self.failures = 0
        self._work = work
        self._jobs: queue.Queue[Any] = queue.Queue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, job: Any) -> None:
        """Have a job done; returns at once."""
        with self._lock:
            self._jobs.put(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kv-writer", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Return once all jobs are done."""
        self._jobs.join()

    def close(self) -> None:
        """Do the jobs that there are, and end the thread."""
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
            except Exception as error:  # the next may do better
                self.failures += 1
                logger.warning("keys and values could not be written: %s: %s", type(error).__name__, str(error))
            finally:
                self._jobs.task_done()
                del job
