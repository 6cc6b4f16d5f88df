"""Content-addressed files on the SSD: one file per entry, bounded, shared by processes, safe from `kill -9`.

    <directory>/            0700, owned by us
      lock                  held during changes; the system releases it when a process dies
      index.json            facts about each entry, such as its worth; replaced atomically
      incoming              the entry that is being written
      objects/ab/abcd...    the entries, 0600; a name is the key, a file never changes

To add an entry, the index is written first, then the file gets its name. A process that dies in between leaves an
index that lists too much, never uncounted bytes. Files are checked when they are read; a file that does not match its
name is not returned. Nothing is synced: after a power failure the checksums detect damage.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ..errors import CorruptDataError, StorageError
from ..interrupts import shield
from .direct_io import DISK_BLOCK_BYTES, AlignedBuffer, DirectFile, round_up

logger = logging.getLogger(__name__)

_MAGIC = b"qwen3vl-mem entry 1\n"
_PREFIX = struct.Struct("<20sIQ")  # magic, bytes of the JSON text, xxh3-64 of it
_KEY = re.compile(r"[0-9a-f]{64}")
_MOST_HEADER_BYTES = 1 << 20
_FIRST_READ_BYTES = 1 << 15
_STAGE_BYTES = 4 << 20
_LOCK_TIMEOUT_S = 5.0

Facts = dict[str, Any]


@dataclass(slots=True)
class StoredEntry:
    """An entry in the index.

    Attributes:
        n_bytes: size of its file.
        facts: notes by the owner of the store; small, JSON.
    """

    n_bytes: int
    facts: Facts


@dataclass(slots=True)
class Index:
    """Contents of `index.json`.

    Attributes:
        entries: by key.
        state: notes by the owner of the store about the whole store.
    """

    entries: dict[str, StoredEntry] = field(default_factory=dict)
    state: Facts = field(default_factory=dict)

    @property
    def used_bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(entry.n_bytes for entry in list(self.entries.values()))  # other threads may change them meanwhile


@dataclass(slots=True)
class LoadedEntry:
    """An entry that was read: `meta`, and the payload in memory that starts on a page boundary."""

    meta: Any
    payload: memoryview
    file_bytes: int


class ContentStore:
    """Keeps entries in a directory.

    Args:
        directory: created with mode 0700 with the first entry.
        clock: the time in seconds, for waiting.

    Attributes:
        directory: as given.
    """

    def __init__(self, directory: str | Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.directory = Path(directory)
        self._objects = self.directory / "objects"
        self._index_path = self.directory / "index.json"
        self._clock = clock
        self._thread_lock = threading.Lock()
        self._index = Index()
        self._index_id: tuple[int, ...] | None = None
        self._reconciled = False
        self._notes: dict[str, list[Callable[[Facts], None]]] = {}

    # --- reading ------------------------------------------------------------------------------------------------------

    def size_of(self, key: str) -> int | None:
        """Return the file size of an entry, or `None` if there is none."""
        try:
            return os.lstat(self._path(key)).st_size
        except OSError:
            return None

    def read(self, key: str) -> LoadedEntry | None:
        """Return an entry, or `None` if there is none.

        Raises:
            CorruptDataError: its file differs from what was written, or has another owner.
            StorageError: it cannot be read at the moment.
        """
        path = self._path(key)
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}", path=path) from error
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise _corrupt(path, "it is not a file of this user")
        size = status.st_size
        if size < DISK_BLOCK_BYTES or size % DISK_BLOCK_BYTES:
            raise _corrupt(path, f"it has {size} bytes")
        try:
            file = DirectFile(path)
        except StorageError:
            if not path.exists():
                return None  # evicted by another process meanwhile
            raise
        with file:
            buffer = AlignedBuffer(size)
            file.read_into(buffer.address, 0, size)
        header, header_bytes = _parse_header(buffer.view, path)
        if header.get("key") != key:
            raise _corrupt(path, f"it holds the entry {str(header.get('key'))[:16]}")
        n_bytes = header.get("payload_bytes", -1)
        if not isinstance(n_bytes, int) or n_bytes < 0 or header_bytes + round_up(n_bytes) != size:
            raise _corrupt(path, f"{n_bytes} bytes were written, but it has {size}")
        payload = buffer.view[header_bytes : header_bytes + n_bytes]
        if xxhash.xxh3_128_hexdigest(payload) != header.get("checksum"):
            raise _corrupt(path, "its checksum does not match")
        return LoadedEntry(header.get("meta"), payload, size)

    def open(self, key: str) -> tuple[DirectFile, Any, int] | None:
        """Return the file of an entry, its `meta` and the payload's offset, or `None` if there is none.

        The payload is neither read nor checked: the caller does both. The file stays readable if the entry is removed.

        Raises:
            CorruptDataError: its header differs from what was written.
            StorageError: it cannot be read at the moment.
        """
        path = self._path(key)
        try:
            status = os.lstat(path)
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise _corrupt(path, "it is not a file of this user")
        file = DirectFile(path)
        try:
            n_bytes = min(status.st_size, _FIRST_READ_BYTES)
            view = memoryview(file.read_bytes(0, n_bytes))
            if n_bytes < _PREFIX.size:
                raise _corrupt(path, f"it has {n_bytes} bytes")
            end = _PREFIX.size + _PREFIX.unpack(view[: _PREFIX.size])[1]
            if n_bytes < end <= min(status.st_size, _MOST_HEADER_BYTES):
                view = memoryview(file.read_bytes(0, end))
            header, offset = _parse_header(view, path)
            if header.get("key") != key or offset + round_up(int(header["payload_bytes"])) != status.st_size:
                raise _corrupt(path, "its header belongs to another entry")
        except BaseException:
            file.close()
            raise
        return file, header.get("meta"), offset

    def index(self) -> Index:
        """Return the current index on the disk."""
        with self._thread_lock:
            self._load_index()
            return self._index

    # --- changing -----------------------------------------------------------------------------------------------------

    def put(
        self,
        key: str,
        meta: Any,
        pieces: Sequence[memoryview],
        facts: Facts,
        make_room: Callable[[Index, int], Sequence[str] | None],
    ) -> bool:
        """Add an entry.

        Args:
            key: 64 hexadecimal digits.
            meta: small, JSON; returned with the entry.
            pieces: the payload.
            facts: for the index.
            make_room: called with the index and the size of the new file; returns the keys to evict for it, or `None`
                to cancel. It may change `state`.

        Returns:
            Whether the entry is stored now; `False` also if another process held the lock for too long.

        Raises:
            StorageError: the directory cannot be written, or the disk is full; no entry was added.
        """
        path = self._path(key)  # reject a bad key before anything is written
        n_bytes = sum(piece.nbytes for piece in pieces)
        digest = xxhash.xxh3_128()
        for piece in pieces:
            digest.update(piece)
        header = _header(
            {"key": key, "payload_bytes": n_bytes, "checksum": digest.hexdigest(), "meta": meta, "facts": facts}
        )
        file_bytes = len(header) + round_up(n_bytes)
        with self._locked() as held:
            if not held:
                return False
            if key in self._index.entries and self.size_of(key) is not None:
                return True
            victims = make_room(self._index, file_bytes)
            if victims is None:
                return False
            for victim in victims:
                self._remove(victim)
            try:
                incoming = self._write_incoming(header, pieces)
            except StorageError:
                os.unlink(self.directory / "incoming")  # it may fill the disk
                raise
            self._index.entries[key] = StoredEntry(file_bytes, facts)
            self._write_index()
            path.parent.mkdir(mode=0o700, exist_ok=True)
            os.replace(incoming, path)
        return True

    def note(self, key: str, change: Callable[[Facts], None]) -> None:
        """Change the facts of an entry; written with the next change, or by `flush`."""
        with self._thread_lock:
            self._notes.setdefault(key, []).append(change)

    def flush(self, state: Callable[[Facts], None] | None = None) -> None:
        """Write pending notes, if the store was ever written to.

        Args:
            state: changes the notes about the whole store.
        """
        if (self._notes or state is not None) and self._index_path.exists():
            with self._locked() as held:
                if held:
                    if state is not None:
                        state(self._index.state)
                    self._write_index()

    def remove(self, key: str) -> None:
        """Remove an entry; unknown keys are ignored."""
        self._path(key)  # reject a bad key before the index changes
        if self.directory.is_dir():
            with self._locked() as held:
                if held:
                    self._remove(key)
                    self._write_index()

    def clear(self) -> int:
        """Remove all entries and return how many there were."""
        if not self.directory.is_dir():
            return 0
        with self._locked() as held:
            if not held:
                raise StorageError(f"{self.directory}: another process is writing; try again", path=self.directory)
            keys = list(self._index.entries)
            for key in keys:
                self._remove(key)
            self._write_index()
            return len(keys)

    def verify(self) -> list[tuple[str, str]]:
        """Read every entry; return the damaged files, as paths relative to the directory, and the reasons."""
        problems = []
        for path in self._files():
            name = str(path.relative_to(self.directory))
            if not _KEY.fullmatch(path.name) or path.parent.name != path.name[:2]:
                problems.append((name, "not a file of this store"))
                continue
            try:
                self.read(path.name)
            except StorageError as error:
                problems.append((name, str(error)))
        return problems

    # --- inside -------------------------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        """Return the file of an entry.

        Raises:
            StorageError: the key is not 64 hexadecimal digits, and might name a file outside the store.
        """
        if not _KEY.fullmatch(key):
            raise StorageError(
                f"{self.directory}: {key[:80]!r} is not a key of this store; a key is 64 lower-case hexadecimal digits",
                path=self.directory,
            )
        return self._objects / key[:2] / key

    def _files(self) -> Iterator[Path]:
        for folder in sorted(self._objects.iterdir()) if self._objects.is_dir() else ():
            if folder.is_dir() and not folder.is_symlink():
                yield from sorted(folder.iterdir())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Lock the store for a change and reload the index; yields `False` if other processes held it too long.

        Raises:
            StorageError: the directory cannot be created or used.
        """
        with shield, self._thread_lock:
            fd = self._open_lock()
            try:
                if not self._acquire(fd):
                    logger.warning("%s: another process has held the lock for %g s", self.directory, _LOCK_TIMEOUT_S)
                    yield False
                    return
                self._load_index()
                if not self._reconciled:
                    self._reconcile()
                    self._reconciled = True
                for key, changes in self._notes.items():
                    if key in self._index.entries:
                        for change in changes:
                            change(self._index.entries[key].facts)
                self._notes.clear()
                yield True
            except BaseException as error:
                self._index_id, self._reconciled = None, False  # the copy in memory may be ahead of the disk
                if not isinstance(error, OSError):
                    raise
                path = error.filename or self.directory
                raise StorageError(f"{path}: {error.strerror or error}", path=path) from error
            finally:
                os.close(fd)

    def _open_lock(self) -> int:
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self.directory.mkdir(mode=0o700, exist_ok=True)
            status = os.lstat(self.directory)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                raise StorageError(
                    f"{self.directory}: belongs to another user, or is not a directory", path=self.directory
                )
            if stat.S_IMODE(status.st_mode) != 0o700:
                os.chmod(self.directory, 0o700)
            self._objects.mkdir(mode=0o700, exist_ok=True)
            return os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            path = error.filename or self.directory
            raise StorageError(f"{path}: cannot be used: {error.strerror}", path=path) from error

    def _acquire(self, fd: int) -> bool:
        deadline, pause_s = self._clock() + _LOCK_TIMEOUT_S, 0.0005
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if self._clock() > deadline:
                    return False
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.05)

    def _load_index(self) -> None:
        try:
            status = os.stat(self._index_path)
            found: tuple[int, ...] = (status.st_ino, status.st_mtime_ns, status.st_size)
            if found == self._index_id:
                return
            stored = json.loads(self._index_path.read_bytes())
            entries = {
                key: StoredEntry(int(n_bytes), dict(facts))
                for key, (n_bytes, facts) in stored["entries"].items()
                if _KEY.fullmatch(key)
            }
            self._index, self._index_id = Index(entries, dict(stored["state"])), found
        except FileNotFoundError:
            self._index, self._index_id, self._reconciled = Index(), None, False
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be used (%s); rebuilding it from the entries", self._index_path, str(error))
            self._index, self._index_id, self._reconciled = Index(), None, False

    def _reconcile(self) -> None:
        """Make the index agree with the files: once after opening, and if the index was lost."""
        found: dict[str, StoredEntry] = {}
        for path in self._files():
            if _KEY.fullmatch(path.name) and path.parent.name == path.name[:2]:
                known = self._index.entries.get(path.name)
                n_bytes = path.lstat().st_size
                facts = known.facts if known is not None else _facts_of(path)
                found[path.name] = StoredEntry(n_bytes, facts)
        self._index.entries = found

    def _write_index(self) -> None:
        content = {
            "version": 1,
            "state": self._index.state,
            "entries": {key: [entry.n_bytes, entry.facts] for key, entry in self._index.entries.items()},
        }
        temporary = self.directory / "index.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(content, file, separators=(",", ":"))
        os.replace(temporary, self._index_path)
        status = os.stat(self._index_path)
        self._index_id = (status.st_ino, status.st_mtime_ns, status.st_size)

    def _write_incoming(self, header: bytes, pieces: Sequence[memoryview]) -> Path:
        path = self.directory / "incoming"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600))
        with DirectFile(path, writable=True) as file, AlignedBuffer(_STAGE_BYTES) as stage:
            offset = filled = 0
            for piece in (memoryview(header), *pieces):
                piece = piece.cast("B")
                while len(piece):
                    part = piece[: _STAGE_BYTES - filled]
                    stage.view[filled : filled + len(part)] = part
                    filled += len(part)
                    piece = piece[len(part) :]
                    if filled == _STAGE_BYTES:
                        file.write_from(stage.address, offset, filled)
                        offset, filled = offset + filled, 0
            if filled:
                whole = round_up(filled)
                stage.view[filled:whole] = bytes(whole - filled)
                file.write_from(stage.address, offset, whole)
        return path

    def _remove(self, key: str) -> None:
        self._index.entries.pop(key, None)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(key))


def _corrupt(path: Path, reason: str) -> CorruptDataError:
    return CorruptDataError(f"{path}: not a usable cache entry: {reason}", path=path)


def _header(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, separators=(",", ":")).encode()
    header = _PREFIX.pack(_MAGIC, len(text), xxhash.xxh3_64_intdigest(text)) + text
    return header.ljust(round_up(len(header)), b"\0")


def _parse_header(view: memoryview, path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a file, and the offset of its payload."""
    magic, n_bytes, checksum = _PREFIX.unpack(view[: _PREFIX.size])
    if magic != _MAGIC:
        raise _corrupt(path, "it does not start with the entry header")
    end = _PREFIX.size + n_bytes
    if n_bytes > _MOST_HEADER_BYTES or end > len(view):
        raise _corrupt(path, f"its header would have {n_bytes} bytes")
    text = bytes(view[_PREFIX.size : end])
    if xxhash.xxh3_64_intdigest(text) != checksum:
        raise _corrupt(path, "the checksum of its header does not match")
    header = json.loads(text)
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not an object")
    return header, round_up(end)


def _facts_of(path: Path) -> Facts:
    """Return the facts that an entry was written with; empty if the file is not an entry."""
    try:
        with open(path, "rb", buffering=0) as file:
            prefix = file.read(_PREFIX.size)
            if len(prefix) < _PREFIX.size:
                return {}
            n_bytes = _PREFIX.unpack(prefix)[1]
            view = memoryview(prefix + file.read(min(n_bytes, _MOST_HEADER_BYTES)))
        facts = _parse_header(view, path)[0].get("facts")
    except (OSError, CorruptDataError, ValueError):
        return {}
    return dict(facts) if isinstance(facts, dict) else {}
