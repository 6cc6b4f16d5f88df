"""Separate address space from page frames: reserve, back, move and discard memory (mmap(2), mremap(2), madvise(2)).

A tensor keeps one contiguous address for life; the physical memory behind it changes. Moving frames between addresses
costs a page-table update (about 20 us per MiB). Returning them to the kernel and faulting in zeroed new ones costs ten
to fifty times as much.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from functools import lru_cache
from pathlib import Path

from ..errors import MemoryOptimizationError, format_bytes
from ..process import read_int, read_lines

FRAME_BYTES = mmap.PAGESIZE
"""Page size of the kernel: 4 kB on x86, 16 or 64 kB on some ARM machines."""

_PROT_READ_WRITE = 0x3
_MAP_PRIVATE_ANONYMOUS_NORESERVE = 0x2 | 0x20 | 0x4000
_MREMAP_MAYMOVE_FIXED_DONTUNMAP = 0x1 | 0x2 | 0x4
_MADV_DONTNEED = 4
_MADV_NOHUGEPAGE = 15
_MAP_FAILED = ctypes.c_void_p(-1).value


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, address, integer = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    libc.mmap.restype = address
    libc.mmap.argtypes = [address, size, integer, integer, integer, ctypes.c_long]
    libc.munmap.argtypes = [address, size]
    libc.mremap.restype = address
    libc.mremap.argtypes = [address, size, size, integer, address]
    libc.madvise.argtypes = [address, size, integer]
    return libc


def _fail(call: str, n_bytes: int) -> MemoryOptimizationError:
    code = ctypes.get_errno()
    text = f"{call} of {format_bytes(n_bytes)} ({n_bytes} bytes) of address space failed: {os.strerror(code)}"
    return MemoryOptimizationError(f"{text}; {_limits()}" if code == errno.ENOMEM else text)


def _limits(root: Path = Path("/")) -> str:
    """Return the limit that may block address space, with its current value and a remedy."""
    reasons = []
    if read_int(root / "proc/sys/vm/overcommit_memory") == 2:
        table = dict(line.split(":", 1) for line in read_lines(root / "proc/meminfo") if ":" in line)
        used, limit = (table.get(key, "unknown").strip() for key in ("Committed_AS", "CommitLimit"))
        reasons.append(
            f"vm.overcommit_memory is 2, and {used} of {limit} are committed: set it to 0 or 1 "
            "(sysctl vm.overcommit_memory=0), or give a smaller memory_pool_size"
        )
    most, n_mappings = read_int(root / "proc/sys/vm/max_map_count"), len(read_lines(root / "proc/self/maps"))
    if most is not None and n_mappings > most - most // 20:
        reasons.append(
            f"{n_mappings} of at most {most} mappings are in use: raise vm.max_map_count "
            f"(sysctl vm.max_map_count={4 * most})"
        )
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        reasons.append(
            f"address space is limited to {format_bytes(address_space)} (RLIMIT_AS): raise it (ulimit -v), or give a "
            "smaller memory_pool_size"
        )
    return "; ".join(reasons) or (
        f"vm.max_map_count is {most}, and {n_mappings} mappings are in use; give a smaller memory_pool_size, or raise "
        "vm.max_map_count"
    )


def reserve(n_bytes: int) -> int:
    """Reserve address space without memory behind it; return its address. Huge pages are disabled, because they would
    back more bytes than are accounted."""
    libc = _libc()
    address = libc.mmap(None, n_bytes, _PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS_NORESERVE, -1, 0)
    if address is None or address == _MAP_FAILED:
        raise _fail("mmap", n_bytes)
    if address % FRAME_BYTES:  # only if FRAME_BYTES is a multiple of the actual page size
        unreserve(address, n_bytes)
        address = _reserve_aligned(n_bytes)
    libc.madvise(address, n_bytes, _MADV_NOHUGEPAGE)  # fails harmlessly if the kernel has no huge pages
    return int(address)


def _reserve_aligned(n_bytes: int) -> int:
    libc = _libc()
    base = libc.mmap(None, n_bytes + FRAME_BYTES, _PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS_NORESERVE, -1, 0)
    if base is None or base == _MAP_FAILED:
        raise _fail("mmap", n_bytes)
    address = -(-base // FRAME_BYTES) * FRAME_BYTES
    if address > base:
        unreserve(base, address - base)
    end = -(-(address + n_bytes) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
    if base + n_bytes + FRAME_BYTES > end:
        unreserve(end, base + n_bytes + FRAME_BYTES - end)
    return int(address)


def unreserve(address: int, n_bytes: int) -> None:
    """Release address space and any memory behind it."""
    if _libc().munmap(address, n_bytes) != 0:
        raise _fail("munmap", n_bytes)


def discard(address: int, n_bytes: int) -> None:
    """Return the memory behind a range to the system; the range stays reserved and reads as zeros."""
    if n_bytes and _libc().madvise(address, n_bytes, _MADV_DONTNEED) != 0:
        raise _fail("madvise", n_bytes)


def move_frames(source: int, target: int, n_bytes: int) -> None:
    """Move the memory behind `source` to `target`; `source` stays reserved but empty."""
    moved = _libc().mremap(source, n_bytes, n_bytes, _MREMAP_MAYMOVE_FIXED_DONTUNMAP, target)
    if moved != target:
        raise _fail("mremap", n_bytes)


@lru_cache(maxsize=1)
def can_move_frames() -> bool:
    """Return whether this kernel moves frames and keeps the source reserved (Linux 5.7)."""
    base = reserve(2 * FRAME_BYTES)
    try:
        ctypes.memset(base, 7, 1)
        move_frames(base, base + FRAME_BYTES, FRAME_BYTES)
        return ctypes.string_at(base + FRAME_BYTES, 1) == b"\x07"
    except MemoryOptimizationError:
        return False
    finally:
        unreserve(base, 2 * FRAME_BYTES)
