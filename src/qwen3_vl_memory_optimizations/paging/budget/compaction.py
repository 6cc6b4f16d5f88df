"""`Compactor`: return idle page frames to the system."""

from __future__ import annotations

import weakref

from ...periodic import Periodic
from ..pager import Pager


class Compactor:
    """A thread that returns frames to the system after they have been free for a whole interval.

    Frames can move between addresses, so free memory is never fragmented; a pool's surplus is free frames. The most
    recently freed frames are reused first, which leaves the surplus untouched.

    Args:
        pager: owner of the frames; when it is collected, the thread ends.
        interval_s: the idle time, and the pause between two checks, in seconds.

    Raises:
        ConfigurationError: the interval is not above zero.
    """

    def __init__(self, pager: Pager, interval_s: float) -> None:
        reference = weakref.ref(pager)

        def work() -> bool:
            pager = reference()
            if pager is not None:
                pager.compact(self._periodic.interval_s)
            return pager is not None

        self._periodic = Periodic(work, interval_s, "pool-compaction")

    @property
    def interval_s(self) -> float:
        """The idle time in seconds."""
        return self._periodic.interval_s

    @interval_s.setter
    def interval_s(self, interval_s: float) -> None:
        self._periodic.interval_s = interval_s

    def start(self) -> None:
        """Begin."""
        self._periodic.start()

    def close(self) -> None:
        """Stop the thread."""
        self._periodic.close()
