"""A swap file: disk space for tensors without another copy, removed with the process."""

from __future__ import annotations

import bisect
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ..errors import InsufficientDiskSpaceError, StorageError, format_bytes
from .direct_io import DirectFile, disk_full_error, free_disk_bytes, round_up
from .disks import can_hold_files, memory_file_system, nearest_existing

logger = logging.getLogger(__name__)

DEFAULT_SHARE = 0.8
"""Maximum share of the free disk space for a swap file without an explicit limit."""

_DISK_REMEDY = "free some disk space, or set swap_dir to a directory on another disk"


class ExtentAllocator:
    """Allocates ranges of a growing space: best fit, adjacent gaps merged.

    Sizes are not rounded; callers that need aligned extents request multiples. Not thread-safe.

    Attributes:
        end_bytes: current size of the space.
        used_bytes: allocated bytes.
    """

    def __init__(self) -> None:
        self.end_bytes = 0
        self.used_bytes = 0
        self._used: dict[int, int] = {}
        self._gaps: list[tuple[int, int]] = []  # (offset, size), sorted, never touching

    def growth_bytes(self, n_bytes: int) -> int:
        """Return by how much `allocate(n_bytes)` would grow the space."""
        if self._best_gap(n_bytes) is not None:
            return 0
        return n_bytes - self._tail_gap_bytes()

    def allocate(self, n_bytes: int) -> int:
        """Return the offset of a free range of `n_bytes`."""
        assert n_bytes > 0, n_bytes
        index = self._best_gap(n_bytes)
        if index is None:
            tail_bytes = self._tail_gap_bytes()
            if tail_bytes:
                self._gaps.pop()
            offset = self.end_bytes - tail_bytes
            self.end_bytes = offset + n_bytes
        else:
            offset, size = self._gaps[index]
            self._gaps[index : index + 1] = [(offset + n_bytes, size - n_bytes)] if size > n_bytes else []
        self._used[offset] = n_bytes
        self.used_bytes += n_bytes
        return offset

    def free(self, offset: int) -> None:
        """Free the range that starts at `offset`."""
        n_bytes = self._used.pop(offset)
        self.used_bytes -= n_bytes
        end = offset + n_bytes
        first = last = bisect.bisect_left(self._gaps, (offset, 0))
        if first > 0 and sum(self._gaps[first - 1]) == offset:
            first -= 1
            offset = self._gaps[first][0]
        if last < len(self._gaps) and self._gaps[last][0] == end:
            end = sum(self._gaps[last])
            last += 1
        self._gaps[first:last] = [(offset, end - offset)]

    def size_of(self, offset: int) -> int:
        """Return the size of the range that starts at `offset`."""
        return self._used[offset]

    def offsets(self) -> list[int]:
        """Return the offsets of the allocated ranges."""
        return list(self._used)

    def check(self) -> None:
        """Assert that ranges and gaps tile the space, and no two gaps are adjacent."""
        position, was_gap = 0, False
        pieces = [(offset, size, False) for offset, size in self._used.items()]
        pieces += [(offset, size, True) for offset, size in self._gaps]
        for offset, size, is_gap in sorted(pieces):
            assert offset == position and size > 0, (offset, position, size)
            assert not (was_gap and is_gap), offset
            position, was_gap = offset + size, is_gap
        assert position == self.end_bytes, (position, self.end_bytes)
        assert self.used_bytes == sum(self._used.values()), self.used_bytes

    def _best_gap(self, n_bytes: int) -> int | None:
        fitting = ((size, index) for index, (_, size) in enumerate(self._gaps) if size >= n_bytes)
        return min(fitting, default=(0, None))[1]

    def _tail_gap_bytes(self) -> int:
        if self._gaps and sum(self._gaps[-1]) == self.end_bytes:
            return self._gaps[-1][1]
        return 0


class SwapFile:
    """Extents in an unnamed file, mode 0600, that the system removes with the process.

    The file is created with the first extent. The class is thread-safe, except that `close` must wait until all other
    calls are done.

    Args:
        directory: directory of the file, created with mode 0700 if missing; of several, the first that accepts a file
            is used.
        max_bytes: maximum size of the file; `None`: 80 % of the free space on its disk, measured when the file is
            created, and again when that is used up.
    """

    def __init__(self, directory: str | Path | Sequence[str | Path], max_bytes: int | None = None) -> None:
        directories = [directory] if isinstance(directory, str | Path) else directory
        assert directories
        self._directories = [Path(each) for each in directories]
        self._directory = self._directories[0]
        self._refused: set[Path] = set()
        self._max_bytes = max_bytes
        self._default_max_bytes = 0
        self._extents = ExtentAllocator()
        self._file: DirectFile | None = None
        self._closed = False
        self._lock = threading.RLock()  # a finalizer may free an extent while its thread holds this lock

    @property
    def used_bytes(self) -> int:
        """Size of all extents, rounded up to blocks."""
        return self._extents.used_bytes

    @property
    def directory(self) -> Path:
        """Directory of the file or, until it exists, its expected directory."""
        with self._lock:
            return self._directory if self._file is not None else self._likely_directory() or self._directory

    @property
    def free_bytes(self) -> int:
        """Return how many more bytes extents may take now, by the limit and by the free space on the disk.

        Takes two system calls, or about ten before the file exists. Gaps between extents count, so one large extent may
        not fit in the reported space.
        """
        with self._lock:
            if self._closed:
                return 0
            try:
                disk_bytes = self._disk_bytes()
            except OSError:
                return 0
            return max(0, min(self._limit_bytes(disk_bytes), disk_bytes) - self._extents.used_bytes)

    def allocate(self, n_bytes: int) -> int:
        """Reserve an extent of at least `n_bytes`, in whole blocks.

        Returns:
            Its offset in the file.

        Raises:
            InsufficientDiskSpaceError: the limit or the free disk space is too small; nothing changed.
            StorageError: the file cannot be created in any of the directories.
        """
        n_bytes = round_up(n_bytes)
        with self._lock:
            if self._closed:
                raise StorageError(f"{self._directory}: the swap file is closed", path=self._directory)
            file = self._open_file()
            growth = self._extents.growth_bytes(n_bytes)
            if growth:
                available = free_disk_bytes(file.fileno())
                if available < growth:
                    raise disk_full_error(self._directory, growth, available, remedy=_DISK_REMEDY)
                limit = self._limit_bytes(available + _disk_bytes_of(file))
                if self._extents.end_bytes + growth > limit:
                    raise self._limit_error(n_bytes, limit)
                # Writes within the file's size run concurrently; writes that extend it do not.
                file.resize(self._extents.end_bytes + growth)
            return self._extents.allocate(n_bytes)

    def free(self, offset: int) -> None:
        """Free the extent at `offset`."""
        with self._lock:
            self._extents.free(offset)

    def write(self, offset: int, address: int, n_bytes: int) -> None:
        """Write memory into the extent at `offset`.

        Args:
            offset: the result of `allocate`.
            address: address of the bytes; a multiple of the block size.
            n_bytes: number of bytes; the memory must extend to the next whole block.

        Raises:
            InsufficientDiskSpaceError: the disk is full.
            StorageError: the device failed.
        """
        try:
            self._file_for(offset, n_bytes).write_from(address, offset, round_up(n_bytes))
        except InsufficientDiskSpaceError as error:
            raise disk_full_error(
                self._directory, error.required_bytes, error.available_bytes, remedy=_DISK_REMEDY
            ) from error

    def read(self, offset: int, address: int, n_bytes: int) -> int:
        """Read the extent at `offset` into memory; the arguments are those of `write`.

        Returns:
            The bytes read from the device.

        Raises:
            ShortIOError: the file is shorter than its extents.
            StorageError: the device failed.
        """
        return self._file_for(offset, n_bytes).read_into(address, offset, n_bytes)

    def extents(self) -> list[int]:
        """Return the offsets of all extents."""
        with self._lock:
            return self._extents.offsets()

    def check(self) -> None:
        """Assert that the extents tile the file and that its size matches."""
        with self._lock:
            self._extents.check()
            limit = self._default_max_bytes if self._max_bytes is None else self._max_bytes
            assert self._extents.end_bytes <= limit, (self._extents.end_bytes, limit)
            if self._file is not None:
                assert self._file.size_bytes == self._extents.end_bytes, self._file.size_bytes

    def close(self) -> None:
        """Delete the file and its contents; closing again does nothing."""
        with self._lock:
            self._closed = True
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> SwapFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_file(self) -> DirectFile:
        if self._file is not None:
            return self._file
        failures = []
        for directory in self._directories:
            try:
                self._file = _made_in(directory)
            except StorageError as error:
                failures.append(str(error))
                if directory not in self._refused and len(self._directories) > 1:
                    logger.warning("%s; trying the next directory for the swap file", error)
                self._refused.add(directory)
                continue
            self._directory = directory
            name = memory_file_system(directory)
            if name is not None:
                logger.warning(
                    "%s: the swap file is on %s, which keeps it in memory, so swapping saves none; set swap_dir to a "
                    "directory on a disk",
                    directory,
                    name,
                )
            return self._file
        raise StorageError(
            f"no swap file can be created ({'; '.join(failures)}); set swap_dir to a directory on a disk where files "
            "can be created",
            path=self._directories[0],
        )

    def _likely_directory(self) -> Path | None:
        return next((each for each in self._directories if each not in self._refused and can_hold_files(each)), None)

    def _disk_bytes(self) -> int:
        """Return the disk space available to the file: the free space plus the file's own size."""
        if self._file is not None:
            return free_disk_bytes(self._file.fileno()) + _disk_bytes_of(self._file)
        directory = self._likely_directory()
        return 0 if directory is None else free_disk_bytes(nearest_existing(directory))

    def _limit_bytes(self, disk_bytes: int) -> int:
        if self._max_bytes is not None:
            return self._max_bytes
        limit = int(DEFAULT_SHARE * disk_bytes)
        if self._file is None:
            return limit
        self._default_max_bytes = max(self._default_max_bytes, limit)  # never lower an earlier limit
        return self._default_max_bytes

    def _file_for(self, offset: int, n_bytes: int) -> DirectFile:
        with self._lock:
            if self._file is None:
                raise StorageError(
                    f"{self._directory}: nothing was allocated, or the swap file is closed", path=self._directory
                )
            extent_bytes = self._extents.size_of(offset)
            if n_bytes > extent_bytes:  # the transfer would reach into the next extent
                raise StorageError(
                    f"{self._directory}: {n_bytes} bytes do not fit the swap extent of {extent_bytes} bytes at offset "
                    f"{offset}",
                    path=self._directory,
                )
            return self._file

    def _limit_error(self, n_bytes: int, limit: int) -> InsufficientDiskSpaceError:
        available = max(0, limit - self._extents.used_bytes)
        remedy = "raise swap_size, or free tensors"
        if self._max_bytes is None:
            remedy = f"the limit is {DEFAULT_SHARE:.0%} of what was free on disk: set swap_size, or {_DISK_REMEDY}"
        return InsufficientDiskSpaceError(
            f"{self._directory}: an extent of {format_bytes(n_bytes)} ({n_bytes} bytes) does not fit the swap file, "
            f"which has {available} of {limit} bytes ({format_bytes(limit)}) free, in pieces; {remedy}",
            path=self._directory,
            required_bytes=n_bytes,
            available_bytes=available,
        )


def _disk_bytes_of(file: DirectFile) -> int:
    return os.fstat(file.fileno()).st_blocks * 512


def _made_in(directory: Path) -> DirectFile:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{directory}: cannot be created: {error.strerror}", path=directory) from error
    return DirectFile.temporary(directory)
