"""Memory of this process and of its control groups: read the figures, and release unneeded memory.

Nothing is configured: all figures come from the operating system. Files are read below an injectable `root`, so that
tests can describe other machines.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import os
import platform
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import psutil

# Control groups version 1 report "no limit" as the largest multiple of the page size below 2**63.
_UNLIMITED_BYTES = 2**60
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MADV_PAGEOUT = 21


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """Resident memory of this process.

    Attributes:
        rss_bytes: total.
        anonymous_bytes: the part without a backing file, including shared memory: only swap could take it.
        file_bytes: mapped files; the kernel drops them when memory is short.
        peak_rss_bytes: maximum of `rss_bytes` so far.
    """

    rss_bytes: int
    anonymous_bytes: int
    file_bytes: int
    peak_rss_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GroupMemory:
    """A memory control group that limits this process.

    Attributes:
        limit_bytes: what its members may use together without being killed or throttled: above `memory.high` the kernel
            reclaims from them and slows them down.
        used_bytes: what they use: anonymous memory, cached files, kernel memory.
        cached_bytes: cached files that no process maps; the kernel drops them when the group is at its limit.
        droppable_bytes: cached files that were not used recently.
        files_bytes: all file pages, including mapped ones: the kernel drops running code before it gives up.
    """

    limit_bytes: int
    used_bytes: int
    cached_bytes: int
    droppable_bytes: int
    files_bytes: int = 0


def process_memory(*, root: str | os.PathLike[str] = "/") -> ProcessMemory:
    """Return the resident memory of this process.

    Without `/proc`, all of it counts as anonymous, so that reclaimable memory is never overestimated.
    """
    status = read_colon_table(Path(root) / "proc/self/status")
    if "VmRSS" not in status:
        rss = psutil.Process().memory_info().rss
        return ProcessMemory(rss_bytes=rss, anonymous_bytes=rss, file_bytes=0, peak_rss_bytes=_peak_rss_bytes(rss))
    rss = _kilobytes(status["VmRSS"])
    return ProcessMemory(
        rss_bytes=rss,
        anonymous_bytes=_kilobytes(status.get("RssAnon", "0")) + _kilobytes(status.get("RssShmem", "0")),
        file_bytes=_kilobytes(status.get("RssFile", "0")),
        # The kernel raises the high-water mark lazily: it can lag behind the resident size.
        peak_rss_bytes=max(rss, _kilobytes(status.get("VmHWM", "0"))),
    )


def rss_bytes() -> int:
    """Return the resident memory of this process in bytes; takes about 10 us, cheap enough for every allocation."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return int(psutil.Process().memory_info().rss)


def mapped_file_bytes() -> int:
    """Return the file-backed part of `rss_bytes`, mostly library code; takes about 10 us."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as statm:
            return int(statm.read().split()[2]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


def reset_peak_rss() -> bool:
    """Reset `peak_rss_bytes`; return whether the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def major_faults() -> int:
    """Return how often this process has waited for a page to be read, mostly library code; 0: unknown."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def usable_memory(*, root: str | os.PathLike[str] = "/", groups: bool = True) -> tuple[int, int]:
    """Return (usable, available now) bytes: the minimum over the machine and (with `groups`) its control groups."""
    table = read_colon_table(Path(root) / "proc/meminfo")
    if "MemTotal" in table:
        total = _kilobytes(table["MemTotal"])
        available = _kilobytes(table.get("MemAvailable") or table.get("MemFree", "0"))
    else:
        machine = psutil.virtual_memory()
        total, available = machine.total, machine.available
    for group in limiting_groups(root=root) if groups else ():
        total = min(total, group.limit_bytes)
        available = max(0, min(available, group.limit_bytes - max(0, group.used_bytes - group.droppable_bytes)))
    return total, available


# --- control groups ---


def limiting_groups(*, root: str | os.PathLike[str] = "/") -> Iterator[GroupMemory]:
    """Yield the memory-limited control groups that contain this process, innermost first."""
    base = Path(root)
    groups = read_lines(base / "proc/self/cgroup")
    mount = base / "sys/fs/cgroup"
    for line in groups:
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            limits = ("memory.limit_in_bytes",)
            kinds = ("total_cache", "total_mapped_file", "total_inactive_file", "total_shmem")
            return _upwards(mount / "memory", group, limits, "memory.usage_in_bytes", *kinds)
    unified = next((line.split(":", 2)[2] for line in groups if line.startswith("0::")), None)
    if unified is None:
        return iter(())
    kinds = ("file", "file_mapped", "inactive_file", "shmem")
    return _upwards(mount, unified, ("memory.max", "memory.high"), "memory.current", *kinds)


def _upwards(
    mount: Path,
    group: str,
    limit_names: tuple[str, ...],
    use_name: str,
    cached: str,
    mapped: str,
    inactive: str,
    shared: str,
) -> Iterator[GroupMemory]:
    inner = mount / group.strip("/")
    # Inside a container the path is often the host's: then only the mount, its own group, exists.
    for directory in (inner, *inner.parents):
        # A limit of 0 is written to force a reclaim, and is not usable for planning.
        limit = min((limit for name in limit_names if (limit := read_int(directory / name))), default=_UNLIMITED_BYTES)
        if limit < _UNLIMITED_BYTES:
            table = dict(line.split(" ", 1) for line in read_lines(directory / "memory.stat") if " " in line)
            yield GroupMemory(
                limit_bytes=limit,
                used_bytes=read_int(directory / use_name) or 0,
                cached_bytes=max(0, int(table.get(cached, 0)) - int(table.get(mapped, 0))),
                droppable_bytes=int(table.get(inactive, 0)),
                files_bytes=max(0, int(table.get(cached, 0)) - int(table.get(shared, 0))),
            )
        if directory == mount:
            break


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryStalls:
    """Total time that any task has waited for memory, in seconds (pressure stall information, `some`).

    Attributes:
        group_s: tasks in this process's control group; `None`: not available (version 1, or an old kernel).
        system_s: tasks on this machine; `None`: not available.
    """

    group_s: float | None
    system_s: float | None


def memory_stalls(*, root: str | os.PathLike[str] = "/") -> MemoryStalls:
    """Return how long this process's group and the machine have waited for memory."""
    base = Path(root)
    group = next((line[3:] for line in read_lines(base / "proc/self/cgroup") if line.startswith("0::")), None)
    own = None
    if group is not None:
        mount = base / "sys/fs/cgroup"
        inner = mount / group.strip("/")
        # Inside a container the path is often the host's: then only the mount, its own group, exists.
        own = _stall_s((inner if inner.is_dir() else mount) / "memory.pressure")
    return MemoryStalls(own, _stall_s(base / "proc/pressure/memory"))


def _stall_s(path: Path) -> float | None:
    for line in read_lines(path):
        fields = line.split()
        if fields[:1] == ["some"] and fields[-1].startswith("total=") and fields[-1][6:].isdigit():
            return int(fields[-1][6:]) / 1e6
    return None


# --- starting ---


@contextlib.contextmanager
def pause_collection() -> Iterator[None]:
    """Pause Python's garbage collector in a block such as an import, where it would scan all modules in vain.

    Importing torch and transformers creates half a million lasting objects; without collections it takes 0.4 s less.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# --- giving back ---


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def tame_allocator() -> None:
    """Make glibc keep the memory of large temporaries between operations, in few arenas.

    Memory returned after each operation (a low mmap threshold) must be faulted in again by the next, which doubles the
    time of a prefill. `trim_heap` releases what a pass leaves behind.
    """
    try:
        libc = _libc()
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
    except (OSError, AttributeError):  # another C library behaves differently
        return


def trim_heap() -> None:
    """Return the holes in the heap to the system; a prefill leaves tens of megabytes of them."""
    try:
        _libc().malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


def release_library_pages() -> None:
    """Release library code: startup reads far more of it than computing needs (100 MB of 112).

    Needed pages return with the next access, from the cache or the disk. Pages that other processes map stay. Takes
    about 60 ms, and as long to read the needed ones again.
    """
    for line in read_lines(Path("/proc/self/maps")):
        fields = line.split(None, 5)
        # Only code: data that the loader wrote to has no file to be read from again.
        if len(fields) == 6 and "x" in fields[1] and fields[5].startswith("/"):
            start, stop = (int(text, 16) for text in fields[0].split("-"))
            try:
                _libc().madvise(start, stop - start, _MADV_PAGEOUT)  # fails harmlessly before Linux 5.4
            except (OSError, AttributeError):
                return
    drop_cached_libraries()


def drop_cached_libraries() -> None:
    """Drop cached but unmapped pages of this process's libraries, which are unneeded readahead."""
    mappings = (line.split(None, 5) for line in read_lines(Path("/proc/self/maps")))
    files = {fields[5].strip() for fields in mappings if len(fields) == 6}
    for module in list(sys.modules.values()):
        for attribute in ("__file__", "__cached__"):
            path = getattr(module, "__dict__", {}).get(attribute)
            if isinstance(path, str):
                files.add(path)
    for path in files:
        if not path.startswith("/"):
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:  # deleted since, or not a file
            continue
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:  # a device
            pass
        finally:
            os.close(descriptor)


# --- small files of the system ---


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def read_int(path: Path) -> int | None:
    """Return the number in the first line of a file, `None` if there is none."""
    first = next(iter(read_lines(path)), "").strip()
    return int(first) if first.isdigit() else None


def read_colon_table(path: Path) -> dict[str, str]:
    """Return the `key: value` lines of a file."""
    return {key: value.strip() for key, _, value in (line.partition(":") for line in read_lines(path))}


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) * 1024


def _peak_rss_bytes(rss: int) -> int:
    try:
        import resource
    except ImportError:
        return rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(rss, peak if platform.system() == "Darwin" else peak * 1024)
