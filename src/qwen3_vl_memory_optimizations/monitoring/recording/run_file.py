"""Runs on the disk: one file a run, a record a line, so that what was written before a crash can be read."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ...config import MemoryConfig
from ...errors import ConfigurationError, StorageError
from .history import History, to_line
from .run_state import Record, RunState, check_header, is_sample, merge_samples

SUFFIX = ".jsonl"
KEPT_RUNS = 20
"""So many runs stay in the directory; the oldest go."""

_SAMPLES_A_STAGE = 7200
_READ_BYTES = 1 << 20

_numbers = itertools.count()


def runs_dir(config: MemoryConfig | None = None) -> Path:
    """Return where runs are recorded."""
    return (config or MemoryConfig()).base_dir / "runs"


def new_run_path(directory: Path) -> Path:
    """Return the path for a run that begins now, in a directory that is made; runs that are too many are removed."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in recorded_runs(directory)[KEPT_RUNS - 1 :]:
        if not is_running(path):
            path.unlink(missing_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return directory / f"{stamp}-{os.getpid()}-{next(_numbers)}{SUFFIX}"


def recorded_runs(directory: Path) -> list[Path]:
    """Return the runs in a directory, the newest first."""
    dated = []
    for path in directory.glob(f"*{SUFFIX}") if directory.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
            dated.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(dated, reverse=True)]


def is_running(path: Path) -> bool:
    """Whether a process still writes a run: it holds the lock of the file, and a process that died holds none."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def find_run(given: Path | None, directory: Path) -> Path:
    """Return the run that is meant: a given one, else the newest that still runs, else the newest.

    Raises:
        ConfigurationError: there is none.
    """
    if given is not None:
        if not given.is_file():
            raise ConfigurationError(f"{given}: no such file; recorded runs lie in {directory}")
        return given
    runs = recorded_runs(directory)
    if not runs:
        raise ConfigurationError(
            f"no run is recorded in {directory}; `qwen3vl-mem generate` and `demo` record theirs, unless --no-record"
        )
    return next((path for path in runs if is_running(path)), runs[0])


class RunWriter:
    """Appends records to a new file that only its owner may read.

    The file grows ever more slowly: after two hours of samples at half a second each it takes every second one, then
    every fourth. What is left out is merged into the next.

    Args:
        path: of the file; it must not exist.
        header: its first line.

    Raises:
        StorageError: it cannot be written.
    """

    def __init__(self, path: Path, header: Record) -> None:
        self.path = path
        self._written = 0
        self._waiting: Record | None = None
        self._n_waiting = 0
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{path}: the run cannot be recorded: {error.strerror}", path=path) from error
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._write(header)

    def append(self, record: Record) -> None:
        """Write a record.

        Raises:
            StorageError: it cannot be written.
        """
        if not is_sample(record):
            self._write(record)
            return
        self._waiting = record if self._waiting is None else merge_samples(self._waiting, record)
        self._n_waiting += 1
        if self._n_waiting >= 1 << (self._written // _SAMPLES_A_STAGE):
            self._flush()

    def _flush(self) -> None:
        if self._waiting is not None:
            waiting, self._waiting, self._n_waiting = self._waiting, None, 0
            self._write(waiting)
            self._written += 1

    def _write(self, record: Record) -> None:
        data = (to_line(record) + "\n").encode()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise StorageError(f"{self.path}: the run cannot be recorded: {error.strerror}", path=self.path) from error

    def close(self) -> None:
        """Write what waits, and end the file."""
        try:
            self._flush()
        finally:
            os.close(self._descriptor)


class RunFile:
    """A recorded run, which may still be written.

    Args:
        path: of the file.
        limit: the most records that are kept.
        keep_samples: see `RunState`.

    Attributes:
        header: its first line.
        state: as of the latest record that was read.
        history: the records that were read.

    Raises:
        ConfigurationError: no file, or not a recorded run.
    """

    def __init__(self, path: Path, *, limit: int = 4 * _SAMPLES_A_STAGE, keep_samples: bool = False) -> None:
        self.path = path
        self.history = History(limit)
        self.state = RunState(keep_samples=keep_samples)
        self._offset = 0
        self._lock = threading.Lock()
        try:
            lines = self._new_lines()
            self.header = check_header(_parsed(next(lines, b"")))
        except OSError as error:
            raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: {error}") from None
        for line in lines:
            self._take(line)

    @property
    def running(self) -> bool:
        """Whether it is still written."""
        return not self.state.ended and is_running(self.path)

    def poll(self) -> None:
        """Read what was written since; a line that is not whole waits for its end."""
        with self._lock, contextlib.suppress(FileNotFoundError):  # removed meanwhile: there is no more
            for line in self._new_lines():
                self._take(line)

    def _take(self, line: bytes) -> None:
        record = _parsed(line)
        if isinstance(record, dict) and "t" in record:
            self.state.apply(record)
            self.history.append(record)

    def _new_lines(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            rest = b""
            while chunk := file.read(_READ_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._offset += len(line) + 1
                    yield line


def _parsed(line: bytes) -> object:
    """Return a line as JSON; `None`: it is not, as the last one of a process that was killed."""
    try:
        return json.loads(line)
    except ValueError:
        return None
