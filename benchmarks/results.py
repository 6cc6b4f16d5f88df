"""What benchmarks share: runs within a limit, results kept after each run, tables between the markers of a page."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from .control_group import control_group, run_in_group, unavailable_reason

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: begin (written by run.py) -->", "<!-- results: end -->"


def require_groups(limits: Sequence[str]) -> None:
    """Exit where some of the limits need control groups and none can be made."""
    reason = unavailable_reason()
    if reason is not None and any(limit != "none" for limit in limits):
        sys.exit(f"no memory control group here: {reason}; `--limits none` works")


def load_kept(arguments: argparse.Namespace, empty: dict) -> dict:
    """Return what `--json` holds, if `--add` asks to keep it, else `empty`."""
    if arguments.add and arguments.json.exists():
        return json.loads(arguments.json.read_text())
    return empty


def keep(content: dict, path: Path) -> None:
    """Write what was measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def add_result_options(parser: argparse.ArgumentParser, here: Path, *, adds: bool = True) -> None:
    """Add `--json`, `--add` and `--report` to the options of a benchmark.

    Args:
        parser: of the benchmark.
        here: its folder.
        adds: whether runs can be added to those that are there.
    """
    parser.add_argument("--json", type=Path, default=here / "results.json", help="where results are kept")
    if adds:
        parser.add_argument("--add", action="store_true", help="keep what is there, and add to it")
    parser.add_argument("--report", action="store_true", help="write the tables again; measure nothing")


def publish(lines: Iterable[str], json_path: Path, here: Path) -> None:
    """Print a report; where its results are the published ones, write it into the README of the benchmark too."""
    lines = list(lines)
    print("\n".join(lines))
    if json_path == here / "results.json":
        write_between(here / "README.md", BEGIN, END, [*lines, ""])


def write_between(path: Path, begin: str, end: str, lines: Iterable[str]) -> None:
    """Replace what stands between two markers of a file."""
    text = path.read_text()
    path.write_text("\n".join([text.split(begin)[0] + begin, *lines, end]) + text.split(end)[1])


def run_limited(command: list[str], limit: str, child: dict[str, str], *, start_key: str | None = None) -> dict:
    """Run a measurement in a control group of its limit and return its figures with the group's, or how it failed.

    Args:
        command: prints its figures as JSON in its last line; with a limit it is given `--ram-budget` besides.
        limit: `none`, or GB.
        child: its environment.
        start_key: variable of that which gets the time, on the monotonic clock, right before the process starts.
    """
    figures: dict = {}

    def variables() -> dict[str, str]:
        return child | ({start_key: repr(time.monotonic())} if start_key else {})

    if limit == "none":
        done = subprocess.run(command, env=variables(), capture_output=True, text=True)
    else:
        limit_bytes = round(float(limit) * 1e9)
        with control_group(limit_bytes) as group:
            done = run_in_group([*command, "--ram-budget", str(limit_bytes)], group, env=variables())
            figures = {"group_peak_bytes": group.peak_bytes(), "kills": group.kills()}
    if done.returncode:
        return figures | {"error": failure(done)}
    return figures | json.loads(done.stdout.splitlines()[-1])


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """Return how a process failed, in a line."""
    tail = done.stderr.strip().splitlines()[-1:] or ["no output"]
    return f"exit status {done.returncode}: {tail[0][:500]}"


def machine() -> dict:
    """Return the machine and the versions that all runs of a file share."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def cpu_name() -> str:
    """Return the processor as the system names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def machine_name(cpu: str) -> str:
    """Return a processor's name in a form for keys and files: what is measured on one says little of another."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"\(\w+\)|processor|cpu|@.*", " ", cpu.lower()))
    return "-".join(words) or "unknown"


def machine_line(here: dict) -> str:
    """Return the machine as a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    return f"Machine: {here['cpu']}, {here['cores']} cores, Linux {here['kernel']}, {versions}."


def runs_line(here: dict, runs: Sequence[dict]) -> str:
    """Return the model, and how many runs there are, from when to when and of which commits, as sentences."""
    dates = sorted(run["date"] for run in runs)
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    return f"Model: {here['model']}. {len(runs)} runs, from {dates[0]} to {dates[-1]}, at {commits}."


def commit() -> str:
    """Return the commit this project was measured at; `+` means that files differed from it."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "src") else "")


def now() -> str:
    """Return the date and time."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
