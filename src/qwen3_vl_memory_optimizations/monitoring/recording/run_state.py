"""The records of a run, and `RunState`, which is rebuilt from them.

A run is a header followed by records, each one JSON object:

- header: `format`, `version`, `started_s` (seconds since 1970), `period_s`, and a description of the run;
- sample: `t` (seconds since the start), `set` (the parts of the snapshot that changed, see `take_snapshot`), and the
  parts `tensors` and `map` of the memory map that changed;
- event: `t`, `event` (its type) and `text`. A run that ended normally has a last event of type `end`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from ...errors import ConfigurationError
from ..rendering.memory_map import MemoryMap, merge_changes
from .events import ROUTINE

FORMAT = "qwen3vl-mem run"
VERSION = 1

END = "end"
_MOST_EVENTS = 1000

Record = dict[str, Any]


def check_header(header: object) -> Record:
    """Return the header of a run.

    Raises:
        ConfigurationError: not a run header, or an unknown version.
    """
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ConfigurationError("not a recorded run: the first line is not a run header")
    if header.get("version") != VERSION:
        raise ConfigurationError(f"recorded with format {header.get('version')}; this version reads format {VERSION}")
    return header


def is_sample(record: Record) -> bool:
    """Return whether a record is a sample, not an event."""
    return "set" in record


def merge_samples(first: Record, second: Record) -> Record:
    """Merge two consecutive samples into one at the time of the second."""
    return {"t": second["t"], "set": {**first["set"], **second["set"]}, **merge_changes(first, second)}


class RunState:
    """The state of a run as of its latest record.

    Args:
        keep_samples: keep all samples, not only the latest.

    Attributes:
        t: seconds since the start.
        snapshot: the latest snapshot (`take_snapshot`), with `phases`.
        first: the first sample, (`t`, snapshot); `None`: no sample yet.
        samples: all samples; unchanged parts are shared.
        memory_map: location of each page.
        ended: whether the run ended normally.
    """

    def __init__(self, *, keep_samples: bool = False) -> None:
        self.t = 0.0
        self.snapshot: dict[str, Any] = {}
        self.first: tuple[float, dict[str, Any]] | None = None
        self.samples: list[tuple[float, dict[str, Any]]] = []
        self.memory_map = MemoryMap()
        self._events: dict[bool, deque[Record]] = {routine: deque(maxlen=_MOST_EVENTS) for routine in (False, True)}
        self.ended = False
        self._keep_samples = keep_samples

    def apply(self, record: Record) -> None:
        """Apply the next record."""
        self.t = record["t"]
        if is_sample(record):
            self.snapshot = {**self.snapshot, **record["set"]}
            self.memory_map = self.memory_map.after(record)
            self.first = self.first or (self.t, self.snapshot)
            if self._keep_samples:
                self.samples.append((self.t, self.snapshot))
        elif record["event"] == END:
            self.ended = True
        if not is_sample(record):
            self._events[record["event"] in ROUTINE].append(record)

    @property
    def events(self) -> list[Record]:
        """The latest events by time; routine events and others are capped separately."""
        return sorted((*self._events[False], *self._events[True]), key=lambda record: record["t"])
