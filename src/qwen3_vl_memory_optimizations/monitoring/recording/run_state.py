"""The records that a run leaves, and `RunState`, which is rebuilt from them.

A run is a header and then records, each one JSON object:

- header: `format`, `version`, `started_s` (seconds since 1970), `period_s`, and what the run was of;
- sample: `t` (seconds since the start), `set` (the parts of the snapshot that changed, see `take_snapshot`), and of the
  memory map `tensors` and `map`, where they changed;
- event: `t`, `event` (its sort) and `text`. The last one of a run that ended by itself is of the sort `end`.
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
        ConfigurationError: it is none, or of a version that this one does not know.
    """
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ConfigurationError("not a recorded run: its first line is not the header of one")
    if header.get("version") != VERSION:
        raise ConfigurationError(f"recorded with format {header.get('version')}; this version reads format {VERSION}")
    return header


def is_sample(record: Record) -> bool:
    """Whether a record is a sample and not an event."""
    return "set" in record


def merge_samples(first: Record, second: Record) -> Record:
    """Return one sample that has the effect of two, at the time of the second."""
    return {"t": second["t"], "set": {**first["set"], **second["set"]}, **merge_changes(first, second)}


class RunState:
    """What is known of a run at its latest record.

    Args:
        keep_samples: keep all samples, and not the latest alone.

    Attributes:
        t: seconds since the start.
        snapshot: as of `take_snapshot`, and `phases`.
        first: the first sample, (`t`, snapshot); `None`: there is none.
        samples: all of them; unchanged parts are shared.
        memory_map: where the pages are.
        ended: the run ended by itself.
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
        """Take the next record."""
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
        """The latest events, by time: so many of those that are routine, and so many others."""
        return sorted((*self._events[False], *self._events[True]), key=lambda record: record["t"])
