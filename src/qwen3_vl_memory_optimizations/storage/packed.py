"""Write a packed checkpoint: resumable, and never mistaken for complete before it is.

It is a safetensors file laid out for direct reads. Each tensor starts on a block boundary, and padding tensors fill
the gaps, because safetensors allows none. The metadata holds a checksum for each page. The header is written last:
until then the file starts with zeros, which no reader accepts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from ..errors import InsufficientDiskSpaceError, ShortIOError, StorageError
from .checkpoint import SINGLE_FILE
from .checksums import PageChecksums
from .direct_io import (
    DISK_BLOCK_BYTES,
    DISK_FULL,
    AlignedBuffer,
    DirectFile,
    disk_full_error,
    free_disk_bytes,
    round_up,
)
from .packed_layout import PackedEntry, PackedLayout, compact_json

__all__ = ["PackedEntry", "PackedLayout", "PackedWriter", "pack_lock"]

JOURNAL_FILE = "journal.jsonl"
_BOUNCE_BYTES = 16 << 20


class PackedWriter:
    """Writes one packed checkpoint in `<final_dir>.partial`, and renames it when it is complete.

    To resume an interrupted run, create the writer again with the same layout and metadata. Put a fingerprint of the
    source into the metadata, so that another source starts over. Only one process may write at a time: hold
    `pack_lock`.

    Args:
        final_dir: the directory to create; it must not exist, or be empty, unless `replace` is set.
        layout: the position of each entry.
        metadata: texts to store in the file.
        replace: replace an existing final directory at the end; processes with its files open can continue reading.
    """

    def __init__(
        self, final_dir: Path, layout: PackedLayout, metadata: Mapping[str, str], *, replace: bool = False
    ) -> None:
        self._replace = replace
        self.final_dir = Path(final_dir)
        self.partial_dir = self.final_dir.with_name(self.final_dir.name + ".partial")
        self._layout = layout
        self._metadata = dict(metadata)
        self._fingerprint = layout.fingerprint(metadata)
        self._data_start = len(layout.header(metadata))
        self._checksums: dict[str, tuple[int, ...]] = {}
        self._file: DirectFile | None = None
        self._journal = -1

    def open(self) -> set[str]:
        """Create or resume the partial directory.

        Returns:
            The names of the entries that are already written.

        Raises:
            InsufficientDiskSpaceError: the disk cannot hold what remains to be written; nothing was changed.
            StorageError: the final directory already exists, or the directory cannot be written.
        """
        model = self.partial_dir / SINGLE_FILE
        journal = self.partial_dir / JOURNAL_FILE
        with self._disk_errors():
            if not self._replace and self.final_dir.exists() and any(self.final_dir.iterdir()):
                raise StorageError(
                    f"{self.final_dir}: exists already; delete it to pack the checkpoint again",
                    path=self.final_dir,
                )
            self._checksums, journal_bytes = self._read_journal()
        self._require_free_space()
        with self._disk_errors():
            self.partial_dir.mkdir(parents=True, exist_ok=True)
            if not journal_bytes:
                # In this order: a journal must never outlive the data it vouches for.
                journal.unlink(missing_ok=True)
                model.unlink(missing_ok=True)
            self._file = DirectFile(model, writable=True)
            self._file.resize(self._data_start + self._layout.data_bytes)
            self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            if not journal_bytes:
                self._log({"layout": self._fingerprint})
            else:
                # A truncated line must not run into the next one.
                os.ftruncate(self._journal, journal_bytes)
        return set(self._checksums)

    def _not_open(self) -> StorageError:
        return StorageError(f"{self.partial_dir}: not open for writing; call open() first", path=self.partial_dir)

    def append(self, name: str, chunks: Iterable[memoryview | bytes]) -> None:
        """Write the bytes of one entry; entries may come in any order. At most 16 MiB are held.

        Raises:
            ShortIOError: the chunks do not have the size given by the layout.
            InsufficientDiskSpaceError: the disk is full; data written so far is kept, and the next run resumes from it.
            StorageError: the device failed.
        """
        if self._file is None or self._journal < 0:
            raise self._not_open()
        entry = self._layout.entries[name]
        with self._disk_errors():
            checksums = self._write_entry(self._file, entry, chunks)
            self._file.sync()
            self._log({"name": name, "checksums": [f"{value:016x}" for value in checksums]})
        self._checksums[name] = checksums

    def read(self, name: str) -> bytes:
        """Return the bytes of an entry that is written.

        Raises:
            StorageError: the file cannot be read.
        """
        if self._file is None:
            raise self._not_open()
        entry = self._layout.entries[name]
        return self._file.read_bytes(self._data_start + self._layout.offsets[name], entry.n_bytes)

    def finish(self, copy_files: Iterable[Path] = (), texts: Mapping[str, str] | None = None) -> None:
        """Write the header, copy small files beside it, and give the directory its final name.

        Args:
            copy_files: `config.json`, the tokenizer and so on; links are followed.
            texts: name -> content of additional files to write.

        Raises:
            InsufficientDiskSpaceError: the disk is full; data written so far is kept, and the next run resumes from it.
            StorageError: a file cannot be copied, or the final directory was created meanwhile.
        """
        if self._file is None:
            raise self._not_open()
        missing = sorted(self._layout.entries.keys() - self._checksums.keys())
        if missing:
            raise StorageError(
                f"{self.partial_dir}: {len(missing)} of {len(self._layout.entries)} tensors were not written, such as "
                f"{missing[0]!r}; append them before finish()",
                path=self.partial_dir,
            )
        sources = [Path(source) for source in copy_files]
        for source in sources:
            if source.name in (SINGLE_FILE, JOURNAL_FILE):
                raise StorageError(f"{source}: the packed checkpoint already has a file of this name", path=source)
        header = self._layout.header(self._metadata, self._checksums)
        with self._disk_errors():
            with AlignedBuffer(len(header)) as buffer:
                buffer.view[: len(header)] = header
                self._file.write_from(buffer.address, 0, len(header))
            self._file.sync()
            for source in sources:
                target = self.partial_dir / source.name
                shutil.copyfile(source, target)
                _sync_path(target)
            for name, text in (texts or {}).items():
                target = self.partial_dir / name
                target.write_text(text)
                _sync_path(target)
            _sync_path(self.partial_dir)
            self.close()
            old = self.final_dir.with_name(self.final_dir.name + ".old")
            if self._replace and self.final_dir.is_dir():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(self.final_dir, old)
            os.replace(self.partial_dir, self.final_dir)
            shutil.rmtree(old, ignore_errors=True)
            _sync_path(self.final_dir.parent)
            # Not earlier: without its journal a partial directory is started over.
            (self.final_dir / JOURNAL_FILE).unlink()

    def close(self) -> None:
        """Close the files; what is written is kept and can be resumed. Closing again does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_entry(
        self, file: DirectFile, entry: PackedEntry, chunks: Iterable[memoryview | bytes]
    ) -> tuple[int, ...]:
        offset = self._data_start + self._layout.offsets[entry.name]
        pages = PageChecksums(entry.n_bytes, entry.page_bytes)
        with AlignedBuffer(min(_BOUNCE_BYTES, entry.n_bytes)) as bounce:
            filled = 0
            for piece in _pieces(chunks, len(bounce.view)):
                if pages.done_bytes + len(piece) > entry.n_bytes:
                    raise self._size_error(entry, f"at least {pages.done_bytes + len(piece)}")
                pages.update(piece)
                head = piece[: len(bounce.view) - filled]
                bounce.view[filled : filled + len(head)] = head
                filled += len(head)
                if filled == len(bounce.view):
                    file.write_from(bounce.address, offset, filled)
                    offset += filled
                    tail = piece[len(head) :]
                    filled = len(tail)
                    bounce.view[:filled] = tail
            if pages.done_bytes != entry.n_bytes:
                raise self._size_error(entry, str(pages.done_bytes))
            end = round_up(filled)
            bounce.view[filled:end] = bytes(end - filled)
            file.write_from(bounce.address, offset, end)
        return pages.result()

    def _size_error(self, entry: PackedEntry, given: str) -> ShortIOError:
        return ShortIOError(
            f"{self.partial_dir}: {given} bytes were given for {entry.name!r}, but its layout says {entry.n_bytes}",
            path=self.partial_dir,
        )

    def _log(self, line: dict[str, object]) -> None:
        text = compact_json(line).encode() + b"\n"
        before_bytes = os.fstat(self._journal).st_size
        if os.write(self._journal, text) < len(text):
            os.ftruncate(self._journal, before_bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _read_journal(self) -> tuple[dict[str, tuple[int, ...]], int]:
        """Return the checksums of the complete entries, and the length of the valid journal; 0: start over."""
        try:
            text = (self.partial_dir / JOURNAL_FILE).read_bytes()
            present_bytes = (self.partial_dir / SINGLE_FILE).stat().st_size
        except FileNotFoundError:
            return {}, 0
        if present_bytes != self._data_start + self._layout.data_bytes:
            return {}, 0
        complete: dict[str, tuple[int, ...]] = {}
        valid_bytes = 0
        for number, line in enumerate(text.splitlines(keepends=True)):
            try:
                fields = json.loads(line) if line.endswith(b"\n") else None
                if number == 0:
                    if fields is None or fields["layout"] != self._fingerprint:
                        return {}, 0
                elif fields is None:
                    break
                else:
                    complete[fields["name"]] = tuple(int(value, 16) for value in fields["checksums"])
            except (ValueError, KeyError, TypeError):
                # A power failure can leave a line of the right length with wrong bytes.
                break
            valid_bytes += len(line)
        return complete, valid_bytes

    def _require_free_space(self) -> None:
        """Raise unless the disk can hold the file, counting the space that the file already occupies."""
        required = self._data_start + self._layout.data_bytes
        with contextlib.suppress(FileNotFoundError):
            # Resumed or started over, these bytes are reused.
            required -= (self.partial_dir / SINGLE_FILE).stat().st_blocks * 512
        available = self._free_bytes()
        if available < required:
            raise disk_full_error(
                self.final_dir,
                required,
                available,
                remedy="free some disk space, or choose a directory on another disk",
            )

    def _free_bytes(self) -> int:
        parent = self.final_dir.absolute().parent
        while not parent.exists():
            parent = parent.parent
        return free_disk_bytes(parent)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Convert disk failures into errors that say what is kept and what to do."""
        remedy = f"free some disk space and run it again: it resumes from what is in {self.partial_dir}"
        try:
            yield
        except InsufficientDiskSpaceError as error:
            raise disk_full_error(
                self.partial_dir, error.required_bytes, error.available_bytes, remedy=remedy
            ) from error
        except OSError as error:
            if error.errno in DISK_FULL:
                raise disk_full_error(self.partial_dir, DISK_BLOCK_BYTES, self._free_bytes(), remedy=remedy) from error
            path = error.filename or self.partial_dir
            raise StorageError(f"{path}: {error.strerror or error}", path=path) from error


@contextlib.contextmanager
def pack_lock(final_dir: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep other processes from packing into `final_dir`; check whether it exists only inside.

    The lock is the file `<final_dir>.lock`, which is not removed; the system releases it when a process dies.

    Args:
        final_dir: the directory to be created.
        on_wait: called once, if another process holds the lock.

    Raises:
        StorageError: the lock file cannot be created or locked.
    """
    path = Path(final_dir).with_name(Path(final_dir).name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StorageError(f"{path}: cannot be opened: {error.strerror}", path=path) from error
    try:
        _lock(fd, path, on_wait)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, path: Path, on_wait: Callable[[], None] | None) -> None:
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        raise StorageError(f"{path}: cannot be locked: {error.strerror}", path=path) from error


def _pieces(chunks: Iterable[memoryview | bytes], max_bytes: int) -> Iterator[memoryview]:
    for chunk in chunks:
        view = memoryview(chunk)
        if view.nbytes:
            view = view.cast("B")
            for start in range(0, len(view), max_bytes):
                yield view[start : start + max_bytes]


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
