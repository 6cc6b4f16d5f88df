"""`History`: a bounded list of the records of a run, coarser for older ones."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

from .events import ROUTINE
from .run_state import Record, is_sample, merge_samples

_PARTS = 3
"""Thirds of the limit: recent records in full, older records thinned, and room for new ones."""
_EVENTS_SHARE = 6


class History:
    """Numbered records as lines of JSON. Thread-safe.

    Args:
        limit: maximum number of records. Beyond it, the latest third is kept in full and older samples are thinned
            evenly: the whole run stays covered, with less detail for its older part.
    """

    def __init__(self, limit: int = 1200) -> None:
        self._limit = max(limit, 2 * _EVENTS_SHARE)
        self._lock = threading.Lock()
        self._lines: list[tuple[int, str]] = []
        self._last = 0

    @property
    def last(self) -> int:
        """Number of the latest record; 0: none."""
        return self._last

    def append(self, record: Record) -> None:
        """Add a record."""
        line = to_line(record)
        with self._lock:
            self._last += 1
            self._lines.append((self._last, line))
            if len(self._lines) > self._limit:
                recent = self._limit // _PARTS
                self._lines[:-recent] = _thinned(self._lines[:-recent], recent // 2, self._limit // _EVENTS_SHARE)

    def after(self, number: int) -> list[tuple[int, str]]:
        """Return (number, line of JSON) of all records after a number."""
        with self._lock:
            if number >= self._last:
                return []
            return [row for row in self._lines if row[0] > number]


def to_line(record: Record) -> str:
    """Return a record as one line without a newline; non-finite numbers become null (not measured)."""
    try:
        return json.dumps(record, separators=(",", ":"), default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(record), separators=(",", ":"), default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _thinned(lines: list[tuple[int, str]], most_samples: int, most_events: int) -> list[tuple[int, str]]:
    """Return evenly spaced samples, each merged with those dropped before it, and the latest events."""
    rows = [(number, json.loads(line)) for number, line in lines]
    kept_events = _latest_events(rows, most_events // 2)
    samples = [record["t"] for _, record in rows if is_sample(record)]
    least_gap_s = (samples[-1] - samples[0]) / most_samples if samples else 0.0
    result: list[tuple[int, Record]] = []
    waiting: Record | None = None
    kept_s = -least_gap_s
    for number, record in rows:
        if not is_sample(record):
            if number in kept_events:
                result.append((number, record))
            continue
        waiting = record if waiting is None else merge_samples(waiting, record)
        if record["t"] - kept_s >= least_gap_s or record["t"] == samples[-1]:
            result.append((number, waiting))
            waiting, kept_s = None, record["t"]
    return [(number, to_line(record)) for number, record in result]


def _latest_events(rows: list[tuple[int, Record]], most: int) -> set[int]:
    """Return the numbers of the latest events: at most `most` routine ones and `most` others."""
    events = [(number, record["event"] in ROUTINE) for number, record in rows if not is_sample(record)]
    return {
        number
        for routine in (False, True)
        for number in [each for each, is_routine in events if is_routine == routine][-most:]
    }
