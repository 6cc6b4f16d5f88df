"""`History`: the records of a run in memory, bounded; what is long ago is kept more coarsely."""

from __future__ import annotations

import json
import threading

from .run_record import Record, is_sample, merge_samples

_EVENTS_SHARE = 4


class History:
    """Records by number, as lines of JSON. Any thread may use it.

    Args:
        limit: the most records. Where there are more, each two samples of the older half become one: the whole run
            stays, and its beginning loses detail.
    """

    def __init__(self, limit: int = 1200) -> None:
        self._limit = max(limit, 4)
        self._lock = threading.Lock()
        self._lines: list[tuple[int, str]] = []
        self._last = 0

    @property
    def last(self) -> int:
        """The number of the latest record; 0: there is none."""
        return self._last

    def append(self, record: Record) -> None:
        """Add a record."""
        line = to_line(record)
        with self._lock:
            self._last += 1
            self._lines.append((self._last, line))
            if len(self._lines) > self._limit:
                half = len(self._lines) // 2
                self._lines[:half] = _thinned(self._lines[:half], self._limit // _EVENTS_SHARE)

    def after(self, number: int) -> list[tuple[int, str]]:
        """Return the records with higher numbers, with these; each is one line of JSON."""
        with self._lock:
            if number >= self._last:
                return []
            return [row for row in self._lines if row[0] > number]


def to_line(record: Record) -> str:
    """Return a record as one line, without the end of it."""
    return json.dumps(record, separators=(",", ":"), default=str)


def _thinned(lines: list[tuple[int, str]], most_events: int) -> list[tuple[int, str]]:
    """Return half of the samples, each of which stands for two, and the latest events."""
    rows = [(number, json.loads(line)) for number, line in lines]
    n_events = sum(not is_sample(record) for _, record in rows)
    result: list[tuple[int, Record]] = []
    waiting: Record | None = None
    for number, record in rows:
        if not is_sample(record):
            n_events -= 1
            if n_events < most_events:
                result.append((number, record))
        elif waiting is None:
            waiting = record
        else:
            result.append((number, merge_samples(waiting, record)))
            waiting = None
    if waiting is not None:
        result.append((rows[-1][0], waiting))
    return [(number, to_line(record)) for number, record in result]
