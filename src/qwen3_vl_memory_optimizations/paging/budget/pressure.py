"""`PressureMonitor`: give memory up when other code takes it, and take it back when it is free again.

The memory of a forward pass is reserved before it runs (`accounts.py`). Memory taken by the application between
forwards (to decode a photo, say) and by other processes is not announced. When a control group is full of memory that
cannot be dropped, the kernel repeatedly drops the code that is running: one second of computing takes a minute.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable

from ...errors import MemoryOptimizationError, format_bytes
from ...process import MemoryStalls, limiting_groups, major_faults, memory_stalls, usable_memory
from ..pager import Pager

logger = logging.getLogger(__name__)

OWNER = "pressure"
"""The ledger account that holds the memory given up."""

_PERIOD_S = 0.1
_CLOSE_LOOKS = 10
"""After memory was short, this many checks run at five times the rate."""
_MOST_FACTOR = 4
"""If memory is still short at the next check, twice as much is given up, then four times."""
_CALM_S = 1.0
_LEAST_ROOM_BYTES = 40 << 20
"""For library code that runs (about 35 MB), and the kernel's readahead around it."""
_LEAST_AVAILABLE_BYTES = 256 << 20
"""Of the machine: with less, systems begin to swap out other processes."""
_ROOM_SHARE = 32
"""In small groups, and on small machines, the minimum room is 1/32 of the memory."""
_MORE_SHARE = 2
"""Half as much again is given up, to avoid an immediate second request."""
_FULL_BYTES = 16 << 20
"""A group with less than this left is full: the kernel drops one file page for each that it reads."""
_MANY_FAULTS_A_S = 100
_LONG_STALL_SHARE = 0.1
"""Share of time stalled on memory above which memory is short, whatever the other figures say."""
_SETTLE_S = 0.5
_MOST_ROOM_SHARE = 8
"""Faults raise the required room: by 32 MiB each time, up to 1/8 of the group."""
_LEARNT_STEP_BYTES = 32 << 20
_LEFT_BYTES = 64 << 20
"""Weights always keep this much, however little room there is."""


class _Rate:
    """Growth rate of a counter; `is_fast` is true after two consecutive fast half-seconds.

    One fast half-second is not enough: after the first pass, for example, code is released on purpose and read again.

    Args:
        read: returns the count; `None`: not available.
        most_a_s: the rate per second above which growth is fast.
        timer: a monotonic clock in seconds.
    """

    def __init__(self, read: Callable[[], float | None], most_a_s: float, timer: Callable[[], float]) -> None:
        self._read, self._most_a_s, self._timer = read, most_a_s, timer
        self._before = (timer(), read())
        self._was_fast = False

    def is_fast(self) -> bool:
        """Return whether growth is fast; sample again if half a second has passed."""
        now_s, (before_s, before) = self._timer(), self._before
        if now_s - before_s < _SETTLE_S:
            return False
        count = self._read()
        self._before = (now_s, count)
        fast = count is not None and before is not None and count - before > self._most_a_s * (now_s - before_s)
        was_fast, self._was_fast = self._was_fast, fast
        return was_fast and fast


class PressureMonitor:
    """A thread that checks ten times per second how much room is left for files, and reserves what is missing.

    Args:
        pager: evicts pages; when it is collected, the thread ends.
        budget_bytes: budget of the process.
        also: called with the Pager at each check.
        period_s: time between two checks.
        timer: a monotonic clock in seconds.
        major_faults: returns how often this process has waited for a file page so far.
        stalls: returns how long its group and the machine have waited for memory so far; default: as reported by the
            system.
        root: root of the system's files.

    Attributes:
        reliefs: number of times memory was given up.
        given_up_bytes: the most that was given up at any time.
        failures: number of checks that raised an unexpected error; it is logged, and checks continue.
        last_error: the latest such error; `None`: none so far.
    """

    def __init__(
        self,
        pager: Pager,
        budget_bytes: int,
        *,
        also: Callable[[Pager], None] | None = None,
        period_s: float = _PERIOD_S,
        timer: Callable[[], float] = time.monotonic,
        major_faults: Callable[[], int] = major_faults,
        stalls: Callable[[], MemoryStalls] | None = None,
        root: str = "/",
    ) -> None:
        self.reliefs = 0
        self.given_up_bytes = 0
        self.failures = 0
        self.last_error: Exception | None = None
        self._pager = weakref.ref(pager)
        self._budget_bytes = budget_bytes
        self._also = also
        self._period_s = period_s
        self._timer = timer
        self._root = root
        self._learnt_bytes = 0
        self._faults = _Rate(major_faults, _MANY_FAULTS_A_S, timer)
        stalls = stalls or functools.partial(memory_stalls, root=root)
        self._group_stalls = _Rate(lambda: stalls().group_s, _LONG_STALL_SHARE, timer)
        self._system_stalls = _Rate(lambda: stalls().system_s, _LONG_STALL_SHARE, timer)
        self._streak = 0
        self._close_looks = 0
        self._calm_since_s: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-pressure", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching; memory already given up stays in the Pager's account."""
        self._ended.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._period_s / (5 if self._close_looks else 1)):
            try:
                if not self.look():
                    return
            except Exception as error:
                self.failures += 1
                self.last_error = error.with_traceback(None)
                logger.exception("memory-pressure: check failed (%d times so far); checks continue", self.failures)

    def look(self) -> bool:
        """Check once, and give memory up or take it back.

        Returns:
            Whether there is still a Pager to watch.
        """
        pager = self._pager()
        if pager is None:
            return False
        short, spare = self._room()
        self._streak = self._streak + 1 if short > 0 else 0
        self._close_looks = _CLOSE_LOOKS if short > 0 else max(0, self._close_looks - 1)
        try:
            if self._also is not None:
                self._also(pager)
            if short > 0:
                self._calm_since_s = None
                self._give_up(pager, short * min(_MOST_FACTOR, 1 << (self._streak - 1)))
            elif pager.ledger.held_bytes(OWNER):
                self._take_back(pager, spare)
        except MemoryOptimizationError as error:  # pinned, or closed meanwhile; the next check is soon
            logger.debug("no memory could be given up: %s", str(error))
        return True

    def _room(self) -> tuple[int, int]:
        """Return how many bytes of room are missing, and how many are left beyond a comfortable margin."""
        short, spare = 0, self._budget_bytes
        starved = any([self._faults.is_fast(), self._group_stalls.is_fast()])  # a list, so that both are sampled
        for group in limiting_groups(root=self._root):
            least = max(self._learnt_bytes, min(_LEAST_ROOM_BYTES, group.limit_bytes // _ROOM_SHARE))
            room = group.limit_bytes - group.used_bytes + group.files_bytes
            if starved and group.limit_bytes - group.used_bytes < _FULL_BYTES:
                least = min(max(least, room + _LEARNT_STEP_BYTES), group.limit_bytes // _MOST_ROOM_SHARE)
                self._learnt_bytes = least
            short, spare = _worse(short, spare, room, least)
        total, available = usable_memory(root=self._root, groups=False)
        least = min(_LEAST_AVAILABLE_BYTES, total // _ROOM_SHARE)
        # Available memory is an estimate; it is too high if other processes stall on memory. Processes in other full
        # groups stall too, however much is available; that is not our shortage.
        least *= 2 if self._system_stalls.is_fast() else 1
        return _worse(short, spare, available, least)

    def _give_up(self, pager: Pager, n_bytes: int) -> None:
        held = pager.ledger.held_bytes(OWNER)
        wanted = min(held + n_bytes, pager.ledger.most_bytes(OWNER) - _LEFT_BYTES)
        if wanted > held:
            pager.reserve(OWNER, wanted)
            self.reliefs += 1
            self.given_up_bytes = max(self.given_up_bytes, wanted)
            logger.info("memory is short: %s given up, %s in all", format_bytes(wanted - held), format_bytes(wanted))

    def _take_back(self, pager: Pager, spare: int) -> None:
        """Take back spare memory after a while without shortage; the learned room is lowered then too."""
        now_s = self._timer()
        if self._calm_since_s is None:
            self._calm_since_s = now_s
        if now_s - self._calm_since_s >= _CALM_S:
            self._calm_since_s = now_s
            self._learnt_bytes //= 2
            held = pager.ledger.held_bytes(OWNER)
            if spare > 0:
                pager.reserve(OWNER, max(0, held - spare))


def _worse(short: int, spare: int, room: int, least: int) -> tuple[int, int]:
    enough = least + least // _MORE_SHARE
    if room < least:
        short = max(short, enough - room)
    return short, min(spare, max(0, room - enough - _FULL_BYTES))
