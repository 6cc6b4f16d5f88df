"""Measure SSD bandwidth with the same transfers that the pager makes."""

from __future__ import annotations

import os
import queue
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import StorageError
from .direct_io import DISK_BLOCK_BYTES, AlignedBuffer, DirectFile, disk_full_error, free_disk_bytes, round_up

Clock = Callable[[], float]


def measure_read_bandwidth(
    path: str | Path,
    *,
    request_bytes: int = 4 << 20,
    n_threads: int = 4,
    total_bytes: int = 512 << 20,
    clock: Clock = time.perf_counter,
) -> float:
    """Return the read bandwidth of an existing file, in bytes/s.

    Args:
        path: the file; if it is larger than `total_bytes`, random parts are read, none twice.
        request_bytes: the size of one read.
        n_threads: reads in flight.
        total_bytes: maximum bytes to read.
        clock: the time in seconds.

    Raises:
        StorageError: the file cannot be read, or is empty.
    """
    with DirectFile(path) as file:
        return _read_bandwidth(file, request_bytes, n_threads, total_bytes, clock)


def measure_scratch_bandwidth(
    directory: str | Path,
    *,
    request_bytes: int = 4 << 20,
    n_threads: int = 4,
    total_bytes: int = 256 << 20,
    clock: Clock = time.perf_counter,
) -> float:
    """Return the read bandwidth of a file just written to `directory`, in bytes/s; see `scratch_bandwidths`."""
    (bandwidth,) = scratch_bandwidths(
        directory, request_bytes=request_bytes, n_threads=n_threads, total_bytes=total_bytes, clock=clock
    )
    return bandwidth


def scratch_bandwidths(
    directory: str | Path,
    *,
    readings: int = 1,
    request_bytes: int = 4 << 20,
    n_threads: int = 4,
    total_bytes: int = 256 << 20,
    clock: Clock = time.perf_counter,
) -> list[float]:
    """Read a file just written to `directory` and return the bandwidths in bytes/s. The file is unnamed and temporary.

    Args:
        directory: where to measure.
        readings: how often the file is read.
        request_bytes: the size of one read and write.
        n_threads: reads in flight.
        total_bytes: the size of the file.
        clock: the time in seconds.

    Raises:
        InsufficientDiskSpaceError: the disk has no room for the file.
        StorageError: the directory cannot be written.
    """
    request_bytes, total_bytes = round_up(request_bytes), round_up(total_bytes)
    with DirectFile.temporary(directory) as file, AlignedBuffer(request_bytes) as buffer:
        available = free_disk_bytes(file.fileno())
        if available < total_bytes:
            raise disk_full_error(directory, total_bytes, available)
        # Not zeros: some devices do not physically store those.
        buffer.view[:request_bytes] = os.urandom(request_bytes)
        for offset in range(0, total_bytes, request_bytes):
            file.write_from(buffer.address, offset, min(request_bytes, total_bytes - offset))
        file.sync()
        return [_read_bandwidth(file, request_bytes, n_threads, total_bytes, clock) for _ in range(readings)]


def _read_bandwidth(file: DirectFile, request_bytes: int, n_threads: int, total_bytes: int, clock: Clock) -> float:
    file_bytes = file.size_bytes
    if file_bytes == 0:
        raise StorageError(f"{file.path}: is empty, there is nothing to measure", path=file.path)
    request_bytes = min(round_up(request_bytes), round_up(file_bytes))
    offsets = list(range(0, file_bytes, request_bytes))
    random.Random(0).shuffle(offsets)
    del offsets[max(1, total_bytes // request_bytes) :]
    if not file.direct:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    buffers: queue.SimpleQueue[AlignedBuffer] = queue.SimpleQueue()
    for _ in range(n_threads):
        buffer = AlignedBuffer(request_bytes)
        # Touch the pages, so that no page fault is measured.
        buffer.view[::DISK_BLOCK_BYTES] = bytes(len(buffer.view[::DISK_BLOCK_BYTES]))
        buffers.put(buffer)

    def read(offset: int) -> int:
        buffer = buffers.get()
        try:
            n_bytes = min(request_bytes, file_bytes - offset)
            file.read_into(buffer.address, offset, n_bytes)
            return n_bytes
        finally:
            buffers.put(buffer)

    with ThreadPoolExecutor(n_threads, thread_name_prefix="io-probe") as threads:
        list(threads.map(len, [b""] * n_threads))  # start the threads outside the measurement
        start_s = clock()
        done_bytes = sum(threads.map(read, offsets))
        return done_bytes / (clock() - start_s)
