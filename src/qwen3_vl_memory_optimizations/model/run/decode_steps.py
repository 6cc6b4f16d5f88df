"""Measure what recent decode steps took: time, tokens, and the reads they waited for."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import astuple, dataclass

from ...paging import PagingStats

_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class DecodeUse:
    """Sums over decode steps.

    Attributes:
        seconds: wall time of the steps; `stall_s`: time spent waiting for page reads in it.
        reading_s: time in which at least one page read was in progress.
        steps: forward passes; `tokens`: new tokens per sequence, more than `steps` if a draft is used.
        read_bytes: read from the SSD meanwhile; `used_bytes`: encoded bytes of managed tensors used.
    """

    seconds: float = 0.0
    stall_s: float = 0.0
    reading_s: float = 0.0
    steps: int = 0
    tokens: int = 0
    read_bytes: int = 0
    used_bytes: int = 0


class DecodeSteps:
    """The last 64 decode steps, across answers. Updated by computing threads, one answer at a time; read by others.

    Args:
        stats: counters of the Pager.
    """

    def __init__(self, stats: PagingStats) -> None:
        self._stats = stats
        self._lock = threading.Lock()
        self._recent: deque[DecodeUse] = deque(maxlen=_REMEMBERED)
        self._steps = 0
        self._last: DecodeUse | None = None  # sums, not a difference

    def begin(self, now_s: float, tokens: int) -> None:
        """Record that the first token of an answer was generated; the next pass is a decode step.

        Args:
            now_s: time on a monotonic clock.
            tokens: new tokens per sequence so far.
        """
        self._last = self._now(now_s, tokens)

    def end_step(self, now_s: float, tokens: int) -> None:
        """Record that a decode step ended."""
        self._steps += 1
        last, self._last = self._last, self._now(now_s, tokens)
        if last is not None:
            step = DecodeUse(*(now - before for now, before in zip(astuple(self._last), astuple(last), strict=True)))
            with self._lock:
                self._recent.append(step)

    def recent(self) -> DecodeUse | None:
        """Return the sums over the last 64 steps, or `None` before the first."""
        with self._lock:
            steps = list(self._recent)
        if not steps:
            return None
        return DecodeUse(*map(sum, zip(*map(astuple, steps), strict=True)))

    def _now(self, now_s: float, tokens: int) -> DecodeUse:
        stats = self._stats
        used_bytes = stats.hit_bytes + stats.miss_bytes
        return DecodeUse(now_s, stats.stall_s, stats.reading_s, self._steps, tokens, stats.bytes_read, used_bytes)
