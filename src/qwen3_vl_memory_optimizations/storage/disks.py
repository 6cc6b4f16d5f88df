"""Distinguish directories on a disk from those on a file system that keeps its files in memory.

A swap file on such a file system saves no memory. The mount table is read below an injectable `root`, so that tests can
describe other machines.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..process import read_lines

IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "rootfs"})
"""Types of file systems that keep their files in memory; `rootfs` is the kernel's initial one."""

_ESCAPE = re.compile(r"\\([0-7]{3})")
_UPPER = re.compile(r"(?:^|,)upperdir=((?:\\.|[^,\\])*)")


def memory_file_system(path: str | os.PathLike[str], *, root: str | os.PathLike[str] = "/") -> str | None:
    """Return the name of a path's file system if its files take memory; `None` if it is on a disk or unknown.

    An `overlay` counts as its upper directory, where new files go. If that is not mounted in this namespace, as in most
    containers, it is unknown.

    Args:
        path: need not exist yet.
        root: the root of the tree that holds `/proc`.
    """
    return _memory_file_system(path, _mounts(Path(root)))


def nearest_existing(path: str | os.PathLike[str]) -> Path:
    """Return a path itself, or its nearest parent that exists."""
    path = Path(path).absolute()
    return next(each for each in (path, *path.parents) if os.path.exists(each) or each == each.parent)


def can_hold_files(directory: str | os.PathLike[str]) -> bool:
    """Return whether files can be created in a directory, or the directory in its nearest existing parent."""
    there = nearest_existing(directory)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def swap_candidates(base_dir: Path) -> list[Path]:
    """Return swap file candidates: below `base_dir` and the home directory, `/var/tmp`, the current directory."""
    candidates = [base_dir / "swap"]
    with contextlib.suppress(RuntimeError):  # a user without a home directory
        candidates.append(Path.home() / ".cache" / "qwen3vl-mem" / "swap")
    candidates.append(Path("/var/tmp"))
    with contextlib.suppress(OSError):  # the current directory was removed
        candidates.append(Path.cwd())
    return list(dict.fromkeys(candidates))


def disks_first(candidates: Iterable[Path], *, root: str | os.PathLike[str] = "/") -> list[Path]:
    """Return directories in the order in which to try them: those on a disk before those in memory."""
    mounts = _mounts(Path(root))
    return sorted(candidates, key=lambda directory: _memory_file_system(directory, mounts) is not None)


def _mounts(root: Path) -> dict[Path, tuple[str, str]]:
    """Return mount point -> type and options. The last of several on one point hides the others."""
    mounts = {}
    for line in read_lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, end = before.split(), after.split()
        if len(fields) > 4 and end:
            options = end[2] if len(end) > 2 else ""
            mounts[Path(_unescaped(fields[4]))] = (end[0], _unescaped(options))
    return mounts


def _memory_file_system(path: str | os.PathLike[str], mounts: dict[Path, tuple[str, str]]) -> str | None:
    path = Path(os.path.realpath(path))
    over: list[Path] = []
    while True:
        point = next((each for each in (path, *path.parents) if each in mounts), None)
        if point is None or point in over:
            return None
        kind, options = mounts[point]
        if kind in IN_MEMORY:
            return " on ".join(["overlay"] * len(over) + [kind])
        upper = _UPPER.search(options) if kind == "overlay" else None
        if upper is None:
            return None
        over.append(point)
        path = Path(re.sub(r"\\(.)", r"\1", upper[1]))


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
