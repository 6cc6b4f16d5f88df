"""Run files: one file per run and one record per line, readable even after a crash."""

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
"""Number of runs kept in the directory; older ones are removed."""

_SAMPLES_A_STAGE = 7200
_READ_BYTES = 1 << 20

_numbers = itertools.count()


def runs_dir(config: MemoryConfig | None = None) -> Path:
    """Return the directory of recorded runs."""
    return (config or MemoryConfig()).base_dir / "runs"


def new_run_path(directory: Path) -> Path:
    """Return the path for a new run; create the directory and remove excess old runs."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in recorded_runs(directory)[KEPT_RUNS - 1 :]:
        if not is_running(path):
            path.unlink(missing_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return directory / f"{stamp}-{os.getpid()}-{next(_numbers)}{SUFFIX}"


def recorded_runs(directory: Path) -> list[Path]:
    """Return the runs in a directory, newest first."""
    dated = []
    for path in directory.glob(f"*{SUFFIX}") if directory.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
            dated.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(dated, reverse=True)]


def is_running(path: Path) -> bool:
    """Return whether a live process is writing a run: it holds the file lock, which ends with the process."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def find_run(given: Path | None, directory: Path) -> Path:
    """Return the given run, else the newest live run, else the newest.

    Raises:
        ConfigurationError: no such run.
    """
    if given is not None:
        if not given.is_file():
            raise ConfigurationError(f"{given}: no such file; recorded runs are in {directory}")
        return given
    runs = recorded_runs(directory)
    if not runs:
        raise ConfigurationError(
            f"no run is recorded in {directory}; record one with `qwen3vl-mem generate` or `demo`, without --no-record"
        )
    return next((path for path in runs if is_running(path)), runs[0])


class RunWriter:
    """Appends records to a new file that only its owner may read.

    The file grows more and more slowly: after two hours at two samples per second, it keeps every second sample, then
    every fourth. Dropped samples are merged into the next.

    Args:
        path: path of the file, which must not exist.
        header: first line of the file.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(self, path: Path, header: Record) -> None:
        self.path = path
        self._written = 0
        self._waiting: Record | None = None
        self._n_waiting = 0
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{path}: this run cannot be recorded: {error.strerror}", path=path) from error
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._write(header)

    def append(self, record: Record) -> None:
        """Write a record.

        Raises:
            StorageError: the file cannot be written.
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
            raise StorageError(f"{self.path}: this run cannot be recorded: {error.strerror}", path=self.path) from error

    def close(self) -> None:
        """Write the pending sample and close the file."""
        try:
            self._flush()
        finally:
            os.close(self._descriptor)


class RunFile:
    """A recorded run, live or ended.

    Args:
        path: path of the file.
        limit: maximum number of records to keep.
        keep_samples: see `RunState`.

    Attributes:
        header: first line of the file.
        state: state as of the latest record read.
        history: the records read.

    Raises:
        ConfigurationError: no such file, or not a recorded run.
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
        """Whether the run is still being written."""
        return not self.state.ended and is_running(self.path)

    def poll(self) -> None:
        """Read new records; an incomplete last line is read later."""
        with self._lock, contextlib.suppress(FileNotFoundError):  # file removed meanwhile: no more records
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
    """Parse a line of JSON; `None` if incomplete, such as the last line of a killed process."""
    try:
        return json.loads(line)
    except ValueError:
        return None
