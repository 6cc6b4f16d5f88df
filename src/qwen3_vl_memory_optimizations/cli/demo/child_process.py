"""A module of this package in a process of its own, whose memory is measured from outside."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from ...errors import MemoryOptimizationError
from ...process import read_colon_table

_SAMPLE_S = 0.05
_PACKAGE = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(slots=True)
class PeakMemory:
    """The most resident memory seen of another process.

    Attributes:
        rss_bytes: all of it.
        file_bytes: pages of mapped files, at the most; 0 where the system does not tell.
    """

    rss_bytes: int = 0
    file_bytes: int = 0

    def sample(self, pid: int) -> None:
        """Look at the process. The kernel keeps the peak itself (`VmHWM`), so none between two looks is missed."""
        status = read_colon_table(Path("/proc", str(pid), "status"))
        if "VmRSS" in status:
            kilobytes = {key: int(status.get(key, "0").split()[0]) for key in ("VmRSS", "VmHWM", "RssFile")}
            self.rss_bytes = max(self.rss_bytes, 1024 * max(kilobytes["VmRSS"], kilobytes["VmHWM"]))
            self.file_bytes = max(self.file_bytes, 1024 * kilobytes["RssFile"])
        elif not os.path.exists("/proc/self/status"):
            self.rss_bytes = max(self.rss_bytes, psutil.Process(pid).memory_info().rss)


def run_module(name: str, *arguments: str | Path, label: str) -> tuple[Any, PeakMemory]:
    """Run a module of this package as a program; return the JSON it prints, and its peak memory.

    The process is killed when this one is interrupted.

    Args:
        name: the module, relative to the package: `cli.demo.plain_transformers`.
        arguments: of the program.
        label: what it is, for errors.

    Raises:
        MemoryOptimizationError: it failed, or was killed.
    """
    # The process must find the package where this one did.
    search_path = os.pathsep.join(filter(None, (str(_PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", f"{_PACKAGE.name}.{name}", *map(str, arguments)]
    peak = PeakMemory()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        environment = os.environ | {"PYTHONPATH": search_path}
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        try:
            while process.poll() is None:
                peak.sample(process.pid)
                try:
                    process.wait(_SAMPLE_S)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            last_line = (errors.read().strip().splitlines() or ["it wrote nothing"])[-1]
            raise MemoryOptimizationError(f"{label} failed (exit code {process.returncode}): {last_line}")
        return json.loads(output.read()), peak
