"""`Compactor`: free page frames that nobody takes go back to the system."""

from __future__ import annotations

import weakref

from ...periodic import Periodic
from ..pager import Pager


class Compactor:
    """A thread that gives each free frame a residence time: after a whole interval without an owner it goes back.

    Frames move between addresses, so memory is never free in the wrong place; what a pool holds too much of is free
    frames. The frames freed last are taken first, which leaves those beyond what is needed untouched.

    Args:
        pager: whose frames; when it is collected, the thread ends.
        interval_s: the residence time, and the pause between two looks, in seconds.

    Raises:
        ConfigurationError: an interval that is not above zero.
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
        """The residence time in seconds."""
        return self._periodic.interval_s

    @interval_s.setter
    def interval_s(self, interval_s: float) -> None:
        self._periodic.interval_s = interval_s

    def start(self) -> None:
        """Begin."""
        self._periodic.start()

    def close(self) -> None:
        """End the thread."""
        self._periodic.close()
