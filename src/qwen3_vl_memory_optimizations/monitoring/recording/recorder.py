"""`Recorder`: a thread that records the state of an optimizer twice per second, in memory and to a file."""

from __future__ import annotations

import logging
import os
import platform
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...config import jsonable
from ...errors import ConfigurationError, MemoryOptimizationError, StorageError
from ...optimizer import MemoryOptimizer
from ..alerts import AlertMonitor, alert_rows
from ..rendering.memory_map import MapWriter
from ..snapshot import take_snapshot
from .events import events_between
from .history import History
from .run_file import RunWriter
from .run_state import END, FORMAT, VERSION, Record, RunState

logger = logging.getLogger(__name__)

PERIOD_S = 0.5


class PhaseTimes:
    """Seconds spent in each phase. Updated by the computing thread, read by another.

    Args:
        phase: the current phase.
        clock: monotonic, in seconds.
    """

    def __init__(self, phase: str, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._phase, self._since_s = phase, clock()
        self._seconds = dict.fromkeys(("vision", "prefill", "decode", phase), 0.0)

    def begin(self, phase: str) -> None:
        """Start a phase."""
        with self._lock:
            self._count()
            self._phase = phase

    def _count(self) -> None:
        now_s = self._clock()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now_s - self._since_s
        self._since_s = now_s

    def as_dict(self) -> dict[str, Any]:
        """Return the current phase and the seconds per phase."""
        with self._lock:
            self._count()
            return {"now": self._phase, "seconds": dict(self._seconds)}


class Recorder:
    """Records snapshots, the memory map, alerts and events of an optimizer until it is closed or `close` is called.

    A separate thread takes the samples. Computing threads wait only for the Pager's lock, which a snapshot and the map
    hold for about a millisecond.

    Args:
        optimizer: an open optimizer; held by a weak reference.
        path: new file for the run; `None` records in memory only.
        period_s: seconds between samples.
        history: maximum number of records in memory; 0 for a file only.
        monitor: evaluates alerts; default: one with the default limits.
        about: extra header entries, such as the command.
        clock: monotonic, in seconds.

    Attributes:
        header: description of the run.
        state: state as of the latest sample.
        history: the records.

    Raises:
        ConfigurationError: `period_s` is not positive.
        StorageError: the file cannot be created.
    """

    def __init__(
        self,
        optimizer: MemoryOptimizer,
        *,
        path: Path | None = None,
        period_s: float = PERIOD_S,
        history: int = 1200,
        monitor: AlertMonitor | None = None,
        about: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not period_s > 0:
            raise ConfigurationError(f"period_s: {period_s} s must be above zero")
        self.header = _header(optimizer, period_s, about or {})
        self.state = RunState()
        self.history = History(history) if history else None
        self._optimizer = weakref.ref(optimizer)
        self._monitor = monitor or AlertMonitor()
        self._clock = clock
        self._start_s = clock()
        self._period_s = period_s
        self._map = MapWriter()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._phases = PhaseTimes(optimizer.lifecycle.phase, clock)
        self._writer = None if path is None else RunWriter(path, self.header)
        try:
            self._look(optimizer)
        except BaseException:
            self._stop_writing()
            raise
        self._end_listening = optimizer.lifecycle.listen(self._phases.begin)
        self._thread = threading.Thread(target=self._record, name="memory-recorder", daemon=True)
        self._thread.start()

    @property
    def path(self) -> Path | None:
        """The file of the run; `None`: no file, or writing it failed."""
        return None if self._writer is None else self._writer.path

    @property
    def running(self) -> bool:
        """Whether more records will follow."""
        return not self.state.ended

    def poll(self) -> None:
        """Do nothing: the recorder thread adds records."""

    def note(self, event: str, text: str) -> None:
        """Add an event.

        Args:
            event: its type, one word.
            text: readable text.
        """
        with self._lock:
            if not self.state.ended:
                self._append({"t": self._now_s(), "event": event, "text": text})

    def look(self) -> None:
        """Take an extra sample now."""
        optimizer = self._optimizer()
        if optimizer is not None and not optimizer.pager.closed:
            self._look(optimizer)

    def _now_s(self) -> float:
        return round(self._clock() - self._start_s, 4)

    def _record(self) -> None:
        while not self._ended.wait(self._period_s):
            optimizer = self._optimizer()
            if optimizer is None or optimizer.pager.closed:
                self._end("the optimizer was closed")
                return
            try:
                self._look(optimizer)
            except MemoryOptimizationError as error:  # closed meanwhile
                self._end(str(error))
                return
            except Exception as error:  # the file must record that the run has ended
                logger.exception("recording failed and stops")
                self._end(f"recording failed: {error!r}")
                return
            del optimizer

    def _look(self, optimizer: MemoryOptimizer) -> None:
        snapshot = take_snapshot(optimizer)
        pages = optimizer.pager.page_map()
        snapshot["alerts"] = alert_rows(self._monitor.evaluate(snapshot))
        snapshot["phases"] = self._phases.as_dict()
        with self._lock:
            if self.state.ended:
                return
            before = self.state.snapshot
            changed = {key: part for key, part in snapshot.items() if key not in before or before[key] != part}
            now_s = self._now_s()
            for event, text in events_between(before, snapshot):
                self._append({"t": now_s, "event": event, "text": text})
            self._append({"t": now_s, "set": changed, **self._map.changes(pages)})

    def _append(self, record: Record) -> None:
        self.state.apply(record)
        if self.history is not None:
            self.history.append(record)
        if self._writer is not None:
            try:
                self._writer.append(record)
            except StorageError as error:
                logger.warning("%s", str(error))
                self._stop_writing()

    def _stop_writing(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except StorageError as error:
                logger.warning("%s", str(error))

    def _end(self, reason: str) -> None:
        self._end_listening()
        with self._lock:
            if not self.state.ended:
                self._append({"t": self._now_s(), "event": END, "text": reason})
            self._stop_writing()

    def close(self) -> None:
        """Take a last sample and stop. Further calls do nothing."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        try:
            self.look()
        except MemoryOptimizationError as error:
            logger.debug("no last sample: %s", str(error))
        self._end("recording ended")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _header(optimizer: MemoryOptimizer, period_s: float, about: Mapping[str, Any]) -> Record:
    return {
        "format": FORMAT,
        "version": VERSION,
        "started_s": time.time(),
        "period_s": period_s,
        "pid": os.getpid(),
        "library": __version__,
        "python": platform.python_version(),
        "torch": getattr(sys.modules.get("torch"), "__version__", None),
        "settings": jsonable(optimizer.config),
        "machine": optimizer.hardware.to_dict(),
        **about,
    }
