"""Running a command in a memory control group: the proof of a budget from outside the process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


def unavailable_reason() -> str | None:
    """Return why no memory control group can be made here, or `None` if one can."""
    root = _V1 if (_V1 / "memory.limit_in_bytes").exists() else _V2
    if not root.exists():
        return f"{root} does not exist"
    if not os.access(root, os.W_OK):
        return f"{root} is not writable"
    if root == _V2 and "memory" not in (_V2 / "cgroup.subtree_control").read_text().split():
        return f"the memory controller is not enabled below {_V2}"
    return None


@dataclass(slots=True)
class ControlGroup:
    """A memory control group with a limit and no swap (both versions of the kernel's interface)."""

    path: Path
    version: int

    @classmethod
    def create(cls, limit_bytes: int) -> ControlGroup:
        """Make a group whose members together may use `limit_bytes`."""
        version = 1 if (_V1 / "memory.limit_in_bytes").exists() else 2
        group = cls((_V1 if version == 1 else _V2) / f"qwen3vl-mem-{uuid.uuid4().hex[:8]}", version)
        group.path.mkdir()
        limit, swap, none = (
            ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", limit_bytes)
            if version == 1
            else ("memory.max", "memory.swap.max", 0)
        )
        (group.path / limit).write_text(str(limit_bytes))
        with contextlib.suppress(OSError):  # the kernel accounts no swap: then there is none to forbid
            (group.path / swap).write_text(str(none))
        return group

    def enter(self) -> None:
        """Put the calling process into the group."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int:
        """Return the most the group ever used, page cache included."""
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        return int((self.path / name).read_text())

    def kills(self) -> int:
        """Return how many members the kernel killed for memory."""
        text = (self.path / ("memory.oom_control" if self.version == 1 else "memory.events")).read_text()
        fields = dict(line.split() for line in text.splitlines())
        return int(fields.get("oom_kill", 0))

    def remove(self) -> None:
        """Remove the group; its members must have ended."""
        with contextlib.suppress(OSError):
            (self.path / ("memory.force_empty" if self.version == 1 else "memory.reclaim")).write_text("0")
        with contextlib.suppress(OSError):
            self.path.rmdir()


@contextlib.contextmanager
def control_group(limit_bytes: int) -> Iterator[ControlGroup]:
    """Make a control group for a block, and remove it afterwards."""
    group = ControlGroup.create(limit_bytes)
    try:
        yield group
    finally:
        group.remove()


def run_in_group(
    command: Sequence[str], group: ControlGroup, *, env: dict[str, str] | None = None, timeout_s: float = 1800
) -> subprocess.CompletedProcess[str]:
    """Run a command inside a group from its first instruction on, and return its output."""
    return subprocess.run(
        command,
        env=env,
        preexec_fn=group.enter,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def drop_page_cache() -> bool:
    """Empty the kernel's page cache, so that a measurement starts cold; return whether it was allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True
