"""Read and write files past the page cache, directly to and from raw memory.

The page cache would hold every streamed weight a second time, evict the user's own files, and count against the
process's control group. If a file system has no direct I/O, the cached pages are dropped after each transfer.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import stat
import tempfile
import threading
import weakref
from pathlib import Path
from types import TracebackType

from ..errors import InsufficientDiskSpaceError, ShortIOError, StorageError, format_bytes

logger = logging.getLogger(__name__)

DISK_BLOCK_BYTES = 4096
"""Alignment required by direct I/O for file offsets, sizes and addresses."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error codes for a full disk or an exhausted user quota."""
# One array type over the whole address space, sliced: ctypes never frees the array types it creates.
_AddressSpace = ctypes.c_ubyte * (1 << 47)

_direct_by_device: dict[int, bool] = {}
_probe_lock = threading.Lock()


def round_down(n_bytes: int) -> int:
    """Return `n_bytes` rounded down to whole blocks."""
    return n_bytes - n_bytes % DISK_BLOCK_BYTES


def round_up(n_bytes: int) -> int:
    """Return `n_bytes` rounded up to whole blocks."""
    return -(-n_bytes // DISK_BLOCK_BYTES) * DISK_BLOCK_BYTES


def free_disk_bytes(path: str | Path | int) -> int:
    """Return the bytes that can still be written to the file system of a path or an open file."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


class AlignedBuffer:
    """Anonymous private memory that starts on a page boundary.

    Args:
        n_bytes: the usable size; rounded up to whole blocks.

    Attributes:
        address: start of the memory.
        view: the memory, writable.
    """

    def __init__(self, n_bytes: int) -> None:
        self._map = mmap.mmap(-1, max(round_up(n_bytes), DISK_BLOCK_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_ubyte.from_buffer(self._map))
        self.view = memoryview(self._map)

    def close(self) -> None:
        """Return the memory to the system; `view` becomes unusable."""
        self.view.release()
        self._map.close()

    def __enter__(self) -> AlignedBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DirectFile:
    """A file whose transfers bypass the page cache if the file system allows it.

    Every transfer takes an explicit offset, so any number of threads may share one `DirectFile`; only `close` must wait
    until they are done.

    Args:
        path: the file.
        writable: open for reading and writing, and create the file if it is missing.

    Attributes:
        path: the file, as given.
        direct: whether transfers actually bypass the page cache.

    Raises:
        StorageError: the file cannot be opened, or is not a regular file.
    """

    def __init__(self, path: str | Path, *, writable: bool = False) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY, 0o666)
        except OSError as error:
            raise StorageError(f"{path}: cannot be opened: {error.strerror}", path=path) from error
        self._close_later()
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise StorageError(f"{path}: not a regular file", path=path)
            self.direct = _enable_direct(self._fd, self.path)
        except BaseException:
            self.close()
            raise

    @classmethod
    def temporary(cls, directory: str | Path) -> DirectFile:
        """Return a new unnamed file in `directory`: mode 0600, deleted when closed, even after a crash.

        Raises:
            StorageError: the directory cannot be written.
        """
        file = cls.__new__(cls)
        file.path = Path(directory)
        try:
            file._fd = _open_unnamed(file.path)
        except OSError as error:
            message = f"{directory}: a temporary file cannot be created: {error.strerror}"
            raise StorageError(message, path=directory) from error
        file._close_later()
        try:
            file.direct = _enable_direct(file._fd, file.path)
        except BaseException:
            file.close()
            raise
        return file

    def _close_later(self) -> None:
        """Close the file when this object is collected, unless `close` did."""
        self._closes = weakref.finalize(self, os.close, self._fd)
        self._closes.atexit = False

    @property
    def size_bytes(self) -> int:
        """The current size of the file."""
        return os.fstat(self._fd).st_size

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._fd

    def read_into(self, address: int, offset_bytes: int, n_bytes: int) -> int:
        """Read a range of the file into memory, without holding the interpreter lock.

        Whole blocks are read: the memory from the block boundary at or below `address` up to the block boundary at or
        above `address + n_bytes` must belong to the caller, and is overwritten.

        Args:
            address: of the first byte in memory; must equal `offset_bytes` modulo `DISK_BLOCK_BYTES`.
            offset_bytes: start of the range in the file.
            n_bytes: the size of the range.

        Returns:
            The bytes read from the device, including the rounding.

        Raises:
            ShortIOError: the file ends inside the range.
            StorageError: the device failed.
        """
        lead = offset_bytes % DISK_BLOCK_BYTES
        if address % DISK_BLOCK_BYTES != lead:
            raise self._misaligned("read", address, offset_bytes, n_bytes)
        start, needed = offset_bytes - lead, lead + n_bytes
        if n_bytes == 0:
            return 0
        memory = memoryview(_AddressSpace.from_address(address - lead))[: round_up(needed)]
        done = 0
        while True:
            try:
                count = os.preadv(self._fd, [memory[done:]], start + done)
            except OSError as error:
                raise self._failure(error, "reading", n_bytes, offset_bytes) from error
            if done + count >= needed:
                break
            if count < DISK_BLOCK_BYTES:
                raise ShortIOError(
                    f"{self.path}: {max(done + count - lead, 0)} of {n_bytes} bytes could be read at offset "
                    f"{offset_bytes}; the file has {self.size_bytes}",
                    path=self.path,
                )
            # A direct read must continue at a block boundary, whatever the last one returned.
            done = round_down(done + count)
        if not self.direct:
            os.posix_fadvise(self._fd, start, done + count, os.POSIX_FADV_DONTNEED)
        return done + count

    def read_bytes(self, offset_bytes: int, n_bytes: int) -> bytes:
        """Return a small range of the file; it is copied once.

        Raises:
            ShortIOError: the file ends inside the range.
            StorageError: the device failed.
        """
        lead = offset_bytes % DISK_BLOCK_BYTES
        with AlignedBuffer(lead + n_bytes) as buffer:
            self.read_into(buffer.address + lead, offset_bytes, n_bytes)
            return bytes(buffer.view[lead : lead + n_bytes])

    def write_from(self, address: int, offset_bytes: int, n_bytes: int) -> None:
        """Write memory to the file. All three arguments must be multiples of `DISK_BLOCK_BYTES`.

        Raises:
            InsufficientDiskSpaceError: the disk is full or the user's quota is exhausted.
            ShortIOError: the device wrote less than requested, without an error.
            StorageError: the device failed.
        """
        if address % DISK_BLOCK_BYTES or offset_bytes % DISK_BLOCK_BYTES or n_bytes % DISK_BLOCK_BYTES:
            raise self._misaligned("write", address, offset_bytes, n_bytes)
        memory = memoryview(_AddressSpace.from_address(address))[:n_bytes]
        done = 0
        while done < n_bytes:
            try:
                count = os.pwrite(self._fd, memory[done:], offset_bytes + done)
            except OSError as error:
                raise self._failure(error, "writing", n_bytes - done, offset_bytes + done) from error
            if count < DISK_BLOCK_BYTES:
                raise ShortIOError(
                    f"{self.path}: only {done + count} of {n_bytes} bytes were written at offset {offset_bytes}",
                    path=self.path,
                )
            done = round_down(done + count)
        if not self.direct:
            # Only clean pages can be dropped.
            self.sync()
            os.posix_fadvise(self._fd, offset_bytes, n_bytes, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Wait until the written data and the file size would survive a power failure.

        Raises:
            InsufficientDiskSpaceError: the disk is full.
            StorageError: the device failed.
        """
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._failure(error, "syncing", self.size_bytes, 0) from error

    def resize(self, size_bytes: int) -> None:
        """Set the size of the file; an added part takes no disk space until it is written.

        Raises:
            StorageError: the file system refuses the size.
        """
        try:
            os.ftruncate(self._fd, size_bytes)
        except OSError as error:
            raise self._failure(error, "resizing", size_bytes, 0) from error

    def close(self) -> None:
        """Close the file; closing again does nothing."""
        if self._fd >= 0:
            self._closes()
            self._fd = -1

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _misaligned(self, action: str, address: int, offset_bytes: int, n_bytes: int) -> StorageError:
        return StorageError(
            f"{self.path}: cannot {action} {n_bytes} bytes at offset {offset_bytes} at address {address:#x}: they are "
            f"not aligned to blocks of {DISK_BLOCK_BYTES} bytes",
            path=self.path,
        )

    def _failure(self, error: OSError, action: str, n_bytes: int, offset_bytes: int) -> StorageError:
        if error.errno in DISK_FULL:
            return disk_full_error(self.path, n_bytes, free_disk_bytes(self._fd))
        return StorageError(
            f"{self.path}: {action} {n_bytes} bytes at offset {offset_bytes} failed: {error.strerror}",
            path=self.path,
        )


def disk_full_error(
    path: str | Path,
    required_bytes: int,
    available_bytes: int,
    *,
    remedy: str = "free some disk space and try again",
) -> InsufficientDiskSpaceError:
    """Return the error for a disk that cannot hold `required_bytes` more."""
    return InsufficientDiskSpaceError(
        f"{path}: {format_bytes(required_bytes)} ({required_bytes} bytes) must be written, "
        f"{format_bytes(available_bytes)} ({available_bytes} bytes) are available; {remedy}",
        path=path,
        required_bytes=required_bytes,
        available_bytes=available_bytes,
    )


def _open_unnamed(directory: Path) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        # A kernel or file system without O_TMPFILE reports EISDIR.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    fd, name = tempfile.mkstemp(dir=directory)
    os.unlink(name)
    return fd


def _enable_direct(fd: int, path: Path) -> bool:
    status = os.fstat(fd)
    with _probe_lock:
        known = _direct_by_device.get(status.st_dev)
        if known is False or not _set_direct(fd, True):
            works = False
        elif known:
            return True
        else:
            works = _direct_read_works(fd)
        if not works:
            _set_direct(fd, False)
        # An empty file accepts reads of any kind, so it proves nothing about other files.
        if known is None and (status.st_size > 0 or not works):
            _direct_by_device[status.st_dev] = works
            if not works:
                logger.info("%s: no direct I/O on this file system; transfers go through the page cache", path)
        return works


def _set_direct(fd: int, on: bool) -> bool:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return True


def _direct_read_works(fd: int) -> bool:
    with AlignedBuffer(DISK_BLOCK_BYTES) as buffer:
        try:
            os.preadv(fd, [buffer.view], 0)
        except OSError as error:
            # Any other failure belongs to the file itself, and will recur when it is read.
            return error.errno not in (errno.EINVAL, errno.EOPNOTSUPP)
    return True
