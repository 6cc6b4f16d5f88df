"""Worker threads for transfers, most urgent first."""

from __future__ import annotations

import heapq
import logging
import threading
from collections.abc import Callable
from types import TracebackType

from ..errors import ConfigurationError

logger = logging.getLogger(__name__)

DEMAND = 0
"""A thread is waiting for it."""
PREFETCH = 1
"""It will be needed soon."""
BACKGROUND = 2
"""Not urgent; one runs at a time, so that other reads from the same disk do not queue behind it."""


class Ticket:
    """A submitted job; identifies it to `IOQueue.promote`.

    Attributes:
        priority: the current priority of the job.
        queued: whether the job still waits for a worker.
    """

    __slots__ = ("_job", "priority")

    def __init__(self, job: Callable[[], None], priority: int) -> None:
        self._job: Callable[[], None] | None = job
        self.priority = priority

    @property
    def queued(self) -> bool:
        return self._job is not None


class IOQueue:
    """Runs jobs on worker threads: lowest priority number first, in order of submission within a priority.

    Threads start with the first job. Jobs must handle their own failures; an exception is only logged.

    Args:
        n_threads: number of jobs that run at the same time.

    Raises:
        ConfigurationError: fewer than one thread.
    """

    def __init__(self, n_threads: int = 4) -> None:
        if n_threads < 1:
            raise ConfigurationError(f"n_threads: {n_threads} threads cannot run any job; use at least 1")
        self._n_threads = n_threads
        self._threads: list[threading.Thread] = []
        # A promoted ticket is in the heap twice; the entry with its old priority is skipped.
        self._heap: list[tuple[int, int, Ticket]] = []
        self._sequence = 0
        self._pending = 0
        self._closed = False
        self._background = False  # whether one is running
        self._changed = threading.Condition()

    @property
    def pending(self) -> int:
        """Number of jobs that are waiting or running."""
        return self._pending

    def submit(self, job: Callable[[], None], priority: int) -> Ticket:
        """Queue a job and return immediately.

        Args:
            job: function to run.
            priority: `DEMAND`, `PREFETCH` or `BACKGROUND`.

        Raises:
            RuntimeError: the queue is closed.
        """
        ticket = Ticket(job, priority)
        with self._changed:
            if self._closed:
                raise RuntimeError("the I/O queue is closed")
            self._push(ticket)
            self._pending += 1
            if not self._threads:
                self._start_threads()
        return ticket

    def promote(self, ticket: Ticket, priority: int) -> bool:
        """Move a waiting job forward, behind the jobs that already have the new priority.

        Returns:
            Whether the job moved; `False` if it has started or is already as urgent.
        """
        with self._changed:
            if not ticket.queued or priority >= ticket.priority:
                return False
            ticket.priority = priority
            self._push(ticket)
            return True

    def close(self) -> None:
        """Run the queued jobs, then stop and join the workers; closing again does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> IOQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _push(self, ticket: Ticket) -> None:
        heapq.heappush(self._heap, (ticket.priority, self._sequence, ticket))
        self._sequence += 1
        self._changed.notify()

    def _start_threads(self) -> None:
        for number in range(self._n_threads):
            thread = threading.Thread(target=self._work, name=f"io-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while (taken := self._next_job()) is not None:
            job, priority = taken
            try:
                job()
            except BaseException:
                logger.exception("an I/O job raised; jobs are expected to handle their own failures")
            # The job's references must not stay alive while this thread waits for the next job.
            del job, taken
            with self._changed:
                self._pending -= 1
                if priority == BACKGROUND:
                    self._background = False
                    self._changed.notify_all()  # after close, every waiting thread must see that the queue is empty

    def _next_job(self) -> tuple[Callable[[], None], int] | None:
        with self._changed:
            while True:
                while self._heap and not (self._background and self._heap[0][0] == BACKGROUND):
                    priority, _, ticket = heapq.heappop(self._heap)
                    job = ticket._job
                    if job is not None and priority == ticket.priority:
                        ticket._job = None
                        self._background = self._background or priority == BACKGROUND
                        return job, priority
                if self._closed and not self._heap:
                    return None
                self._changed.wait()
