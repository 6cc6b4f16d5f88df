"""An operating system whose SSD fails now and then: stands in for `os` in the modules that read and write files."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qwen3_vl_memory_optimizations.storage import content_store, direct_io

DISK_BLOCK_BYTES = direct_io.DISK_BLOCK_BYTES


class FaultyOS:
    """`os`, with faults in the calls that move bytes; which call meets which fault follows from the seed.

    Args:
        seed: of what is drawn.
        rate: the share of the calls that meet a fault.

    Attributes:
        met: how often each fault was met, by name.
    """

    def __init__(self, seed: int, rate: float = 0.04) -> None:
        self.rate = rate
        self.met: dict[str, int] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Take the place of `os` for a block."""
        for module in (direct_io, content_store):
            module.os = self  # type: ignore[assignment]
        try:
            yield
        finally:
            for module in (direct_io, content_store):
                module.os = os

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def _draw(self, *faults: str) -> str | None:
        with self._lock:
            if self._random.random() >= self.rate:
                return None
            fault = self._random.choice(faults)
            self.met[fault] = self.met.get(fault, 0) + 1
            return fault

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        """Read, or fail, or stop early: on a block as a device may, or before one as at the end of a file."""
        fault = self._draw("slow read", "EIO on read", "short read", "read cut off")
        (buffer,) = buffers
        if fault == "slow read":
            time.sleep(0.005)
        elif fault == "EIO on read":
            os.preadv(fd, [buffer[: len(buffer) // 2 // DISK_BLOCK_BYTES * DISK_BLOCK_BYTES]], offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        elif fault == "short read" and len(buffer) > DISK_BLOCK_BYTES:
            return os.preadv(
                fd, [buffer[: len(buffer) // 2 // DISK_BLOCK_BYTES * DISK_BLOCK_BYTES or DISK_BLOCK_BYTES]], offset
            )
        elif fault == "read cut off":
            return 0
        return os.preadv(fd, buffers, offset)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """Write, or fail with half of it written, or stop early."""
        fault = self._draw("ENOSPC on write", "EIO on write", "short write", "write cut off")
        half = len(data) // 2 // DISK_BLOCK_BYTES * DISK_BLOCK_BYTES
        if fault in ("ENOSPC on write", "EIO on write"):
            if half:
                os.pwrite(fd, data[:half], offset)
            number = errno.ENOSPC if fault.startswith("ENOSPC") else errno.EIO
            raise OSError(number, os.strerror(number))
        if fault == "short write" and half:
            return os.pwrite(fd, data[:half], offset)
        if fault == "write cut off":
            return 0
        return os.pwrite(fd, data, offset)

    def open(self, path: object, flags: int, *more: object, **named: object) -> int:
        """Open, or refuse to make a file."""
        if flags & os.O_CREAT and not str(path).endswith("lock") and self._draw("ENOSPC on open"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return os.open(path, flags, *more, **named)  # type: ignore[arg-type]

    def replace(self, source: object, target: object) -> None:
        """Rename, or refuse."""
        if self._draw("EIO on rename"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), source)
        os.replace(source, target)  # type: ignore[type-var]

    def ftruncate(self, fd: int, n_bytes: int) -> None:
        """Resize, or refuse."""
        if self._draw("EIO on resize"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.ftruncate(fd, n_bytes)
