"""A swap file: disk space for tensors that exist nowhere else, gone with the process."""

from __future__ import annotations

import bisect
import threading
from pathlib import Path
from types import TracebackType

from ..errors import InsufficientDiskSpaceError, StorageError, format_bytes
from .direct_io import DirectFile, disk_full_error, free_disk_bytes, round_up


class ExtentAllocator:
    """Hands out ranges of a growing space: best fit, neighbouring gaps joined.

    Sizes are taken as they come; whoever needs aligned extents asks for multiples. Not thread-safe.

    Attributes:
        end_bytes: how far the space has grown.
        used_bytes: the bytes handed out.
    """

    def __init__(self) -> None:
        self.end_bytes = 0
        self.used_bytes = 0
        self._used: dict[int, int] = {}
        self._gaps: list[tuple[int, int]] = []  # (offset, size), sorted, never touching

    def growth_bytes(self, n_bytes: int) -> int:
        """Return by how much the space would grow for `allocate(n_bytes)`."""
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
        """Take back the range that starts at `offset`."""
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
        """Return where the ranges that are handed out start."""
        return list(self._used)

    def check(self) -> None:
        """Assert that ranges and gaps tile the space, and no two gaps touch."""
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

    The file is made with the first extent. Any number of threads may use it; `close` must wait until they
    are done.

    Args:
        directory: where the file lies; made when it is missing.
        max_bytes: how far the file may grow.
    """

    def __init__(self, directory: str | Path, max_bytes: int) -> None:
        self._directory = Path(directory)
        self._max_bytes = max_bytes
        self._extents = ExtentAllocator()
        self._file: DirectFile | None = None
        self._closed = False
        self._lock = threading.RLock()  # a finalizer may free an extent while its thread holds this

    @property
    def used_bytes(self) -> int:
        """The bytes of all extents, rounded up to blocks."""
        return self._extents.used_bytes

    def allocate(self, n_bytes: int) -> int:
        """Reserve an extent of at least `n_bytes`, in whole blocks.

        Returns:
            Its offset in the file.

        Raises:
            InsufficientDiskSpaceError: the file may not grow that far, or the disk has no room; nothing
                changed.
            StorageError: the file cannot be made.
        """
        n_bytes = round_up(n_bytes)
        with self._lock:
            if self._closed:
                raise StorageError(f"{self._directory}: the swap file is closed", path=self._directory)
            growth = self._extents.growth_bytes(n_bytes)
            if self._extents.end_bytes + growth > self._max_bytes:
                raise self._limit_error(n_bytes)
            file = self._open_file()
            if growth:
                available = free_disk_bytes(file.fileno())
                if available < growth:
                    raise disk_full_error(self._directory, growth, available)
                # Writes inside the size of a file do not wait for each other; writes that extend it do.
                file.resize(self._extents.end_bytes + growth)
            return self._extents.allocate(n_bytes)

    def free(self, offset: int) -> None:
        """Give back the extent at `offset`."""
        with self._lock:
            self._extents.free(offset)

    def write(self, offset: int, address: int, n_bytes: int) -> None:
        """Write memory into the extent at `offset`.

        Args:
            offset: what `allocate` returned.
            address: where the bytes are; a multiple of the block size.
            n_bytes: how many; the memory must reach up to the next whole block.

        Raises:
            InsufficientDiskSpaceError: the disk is full.
            StorageError: the device failed.
        """
        self._file_for(offset, n_bytes).write_from(address, offset, round_up(n_bytes))

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
        """Assert that the extents tile the file and the file is as long as they say."""
        with self._lock:
            self._extents.check()
            assert self._extents.end_bytes <= self._max_bytes, (self._extents.end_bytes, self._max_bytes)
            if self._file is not None:
                assert self._file.size_bytes == self._extents.end_bytes, self._file.size_bytes

    def close(self) -> None:
        """Drop the file and all that is in it; closing again does nothing."""
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
        if self._file is None:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(
                    f"{self._directory}: cannot be made: {error.strerror}", path=self._directory
                ) from error
            self._file = DirectFile.temporary(self._directory)
        return self._file

    def _file_for(self, offset: int, n_bytes: int) -> DirectFile:
        with self._lock:
            if self._file is None:
                raise StorageError(
                    f"{self._directory}: nothing was allocated, or the swap file is closed", path=self._directory
                )
            extent_bytes = self._extents.size_of(offset)
            if n_bytes > extent_bytes:  # it would read, or overwrite, the extent of another
                raise StorageError(
                    f"{self._directory}: {n_bytes} bytes do not fit the swap extent of {extent_bytes} bytes at offset "
                    f"{offset}",
                    path=self._directory,
                )
            return self._file

    def _limit_error(self, n_bytes: int) -> InsufficientDiskSpaceError:
        available = self._max_bytes - self._extents.used_bytes
        return InsufficientDiskSpaceError(
            f"{self._directory}: an extent of {format_bytes(n_bytes)} ({n_bytes} bytes) does not fit the "
            "swap file, "
            f"which has {available} of {self._max_bytes} bytes free in pieces; raise its limit or free "
            "tensors",
            path=self._directory,
            required_bytes=n_bytes,
            available_bytes=available,
        )
