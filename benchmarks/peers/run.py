"""Measure this project beside what else runs the model: each run cold, in its own process and memory control group.

Results go to one JSON file after each run. The same command goes on where it was stopped (Ctrl-C); a cell that failed
is not tried again. At the end `report.py` writes tables and plots (prints the tables if `--json` is given).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks.control_group import control_group, drop_page_cache, run_in_group, unavailable_reason  # noqa: E402
from benchmarks.peers.layout import (  # noqa: E402
    HERE,
    ISAS,
    PEERS,
    SHAPES,
    WORKS,
    Layout,
    results_path,
    worker_environment,
)
from benchmarks.results import commit, cpu_name, now  # noqa: E402

LIMITS = ("none", "4", "2.6", "1.6", "1.2")
QUICK = {
    "shapes": ["2B"],
    "limits": ["none", "1.6"],
    "work": ["decode-32", "prefill-256"],
    "peers": ["ours int8", "transformers bf16", "accelerate bf16", "llama.cpp Q8_0"],
    "repeat": 1,
    "time_limit": 35.0,
}
THREADS = len(os.sched_getaffinity(0))
_SOFT_SHARE = 0.8
"""Share of the time limit after which a worker starts nothing optional any more."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One place in the tables."""

    shape: str
    isa: str
    limit: str
    work: str
    peer: str

    @property
    def limit_bytes(self) -> int | None:
        """Bytes the process may use."""
        return None if self.limit == "none" else round(float(self.limit) * 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["2B"])
    parser.add_argument("--limits", nargs="+", default=LIMITS, metavar="GB", help="`none` or GB (default: %(default)s)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--avx2", action="store_true", help="hold every library to AVX2 instead of measuring natively")
    parser.add_argument("--time-limit", type=float, default=600, help="seconds a run may take (default: 600)")
    default = results_path(cpu_name())
    parser.add_argument("--json", type=Path, default=default, help=f"where results are kept (default: {default.name})")
    parser.add_argument("--redo", action="store_true", help="drop what the file holds of the cells asked for")
    parser.add_argument("--quick", action="store_true", help="a reduced set, at most 10 minutes")
    parser.add_argument("--bench-dir", type=Path, default=ROOT / ".bench", help="where `prepare.py` put its files")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
        if arguments.json == default:
            arguments.json = arguments.bench_dir / "peers" / "quick.json"
    layout = Layout(arguments.bench_dir.resolve())
    require_possible(layout, arguments)
    results = Results(arguments.json, environment(layout))
    plan = list(make_plan(arguments))
    if arguments.redo:
        results.drop({cell for _, cell in plan})
    try:
        execute(plan, results, layout, arguments.time_limit)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
    if results.runs:
        is_published = arguments.json == default
        options = [] if is_published else ["--json", str(arguments.json)]
        subprocess.run([str(layout.python), str(HERE / "report.py"), *options], check=True)


def require_possible(layout: Layout, arguments: argparse.Namespace) -> None:
    """Leave with the reason if what is asked for cannot be measured."""
    reason = unavailable_reason()
    if reason is not None and any(limit != "none" for limit in arguments.limits):
        sys.exit(f"no memory control group here: {reason}; `--limits none` works")
    missing = [shape for shape in arguments.shapes if not (layout.checkpoint(shape) / "config.json").exists()]
    if missing or not layout.python.exists():
        sys.exit(f"not prepared; run: python benchmarks/peers/prepare.py --shapes {' '.join(arguments.shapes)}")


def make_plan(arguments: argparse.Namespace) -> Iterator[tuple[int, Cell]]:
    """Give repetitions and cells in their order: peers follow each other, so a drifting machine meets all alike."""
    isa = ISAS[1] if arguments.avx2 else ISAS[0]
    for repetition in range(arguments.repeat):
        turn = repetition % len(arguments.peers)
        order = [*arguments.peers[turn:], *arguments.peers[:turn]]
        for shape, limit, work in itertools.product(arguments.shapes, arguments.limits, arguments.work):
            for peer in order:
                if PEERS[peer].vision or not work.startswith("image"):
                    yield repetition, Cell(shape, isa, limit, work, peer)


class Results:
    """The JSON file: the machine with its versions, and every single run."""

    def __init__(self, path: Path, here: dict) -> None:
        self.path = path
        self.environment = here
        self.runs: list[dict] = []
        self.disk: list[dict] = []
        if not path.exists():
            return
        stored = json.loads(path.read_text())
        differing = [key for key in here if stored["environment"].get(key) != here[key]]
        if differing:
            sys.exit(f"{path}: measured with another {', '.join(differing)}; give --json another file")
        self.runs, self.disk = stored["runs"], stored["disk"]

    def is_settled(self, repetition: int, cell: Cell) -> bool:
        """Return whether a run is there, or needs no repetition because it failed before."""
        runs = [run for run in self.runs if cell_of(run) == cell]
        return any(run["repetition"] == repetition or "error" in run for run in runs)

    def add(self, run: dict) -> None:
        """Keep a run, on the disk too."""
        self.runs.append(run)
        self._write()

    def add_disk_speed(self, bytes_per_s: float) -> None:
        """Keep a probe of the disk's speed."""
        self.disk.append({"date": now(), "read_bytes_per_s": round(bytes_per_s)})
        self._write()

    def drop(self, cells: set[Cell]) -> None:
        """Forget runs."""
        self.runs = [run for run in self.runs if cell_of(run) not in cells]

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        content = {"environment": self.environment, "disk": self.disk, "runs": self.runs}
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, self.path)


def cell_of(run: dict) -> Cell:
    """Return the cell of a stored run."""
    return Cell(run["shape"], run["isa"], run["limit"], run["work"], run["peer"])


def execute(plan: Sequence[tuple[int, Cell]], results: Results, layout: Layout, time_limit_s: float) -> None:
    """Do the runs of a plan that are not there yet."""
    from qwen3_vl_memory_optimizations.storage import measure_read_bandwidth

    todo = [(repetition, cell) for repetition, cell in plan if not results.is_settled(repetition, cell)]
    probed = None
    for number, (repetition, cell) in enumerate(todo, 1):
        if results.is_settled(repetition, cell):  # it failed a moment ago
            continue
        if probed != (repetition, cell.shape, cell.limit):
            probed = (repetition, cell.shape, cell.limit)
            results.add_disk_speed(measure_read_bandwidth(next(layout.checkpoint(cell.shape).glob("*.safetensors"))))
        run = {**asdict(cell), "repetition": repetition, "date": now(), "commit": commit()}
        run |= measure(cell, layout, time_limit_s)
        results.add(run)
        outcome = f"{run['value']} {run['unit']}" if "value" in run else run["error"].splitlines()[0]
        where = f"{cell.shape} {cell.isa} {cell.limit} {cell.work} {cell.peer}"
        print(f"[{number}/{len(todo)}] {where}: {outcome} ({run.get('wall_s', 0)} s)", flush=True)


def measure(cell: Cell, layout: Layout, time_limit_s: float) -> dict:
    """Run a worker on its work item and return its figures, or how it failed."""
    peer = PEERS[cell.peer]
    failures = layout.failures()
    for step in (need.format(isa=cell.isa) for need in peer.needs):
        if step in failures:
            return {"error": f"does not install: {failures[step]}", "failure": "does not install"}
    python = str(layout.python) if peer.needs else sys.executable
    command = [python, "-m", f"benchmarks.peers.workers.{peer.worker}", "--bench-dir", str(layout.bench)]
    command += ["--shape", cell.shape, "--variant", peer.variant, "--work", cell.work, "--threads", str(THREADS)]
    command += ["--limit", str(cell.limit_bytes or 0), "--soft-limit-s", str(time_limit_s * _SOFT_SHARE)]
    variables = worker_environment(layout, peer, cell.isa, THREADS)
    figures: dict = {"cold": drop_page_cache()}
    start = time.perf_counter()
    done: subprocess.CompletedProcess[str] | subprocess.TimeoutExpired
    kills = 0
    try:
        if cell.limit_bytes is None:
            options = {"capture_output": True, "text": True, "timeout": time_limit_s}
            done = subprocess.run(command, env=variables, cwd=ROOT, **options)
        else:
            with control_group(cell.limit_bytes) as group:
                try:
                    done = run_in_group(command, group, env=variables, timeout_s=time_limit_s)
                finally:
                    kills = group.kills()
                    figures |= {"group_peak_bytes": group.peak_bytes(), "kills": kills}
    except subprocess.TimeoutExpired as error:
        done = error
    figures["wall_s"] = round(time.perf_counter() - start, 1)
    shutil.rmtree(layout.offload, ignore_errors=True)
    return figures | outcome_of(done, kills)


def outcome_of(done: subprocess.CompletedProcess[str] | subprocess.TimeoutExpired, kills: int) -> dict:
    """Return a worker's figures, or `error` and, in few words, `failure`."""
    if kills:
        return {"error": "killed by the kernel: the limit's memory was used up", "failure": "killed (memory)"}
    # A worker stopped at the time limit may have given its figures, and still be giving back its memory.
    if figures := last_json(done.stdout):
        return figures
    if isinstance(done, subprocess.TimeoutExpired):
        return {"error": f"not done within {done.timeout:g} s", "failure": f"> {done.timeout:g} s"}
    if done.returncode < 0:
        return {"error": f"killed by signal {-done.returncode}", "failure": f"signal {-done.returncode}"}
    tail = done.stderr.strip().splitlines()[-1:] or ["no output"]
    return {"error": f"exit status {done.returncode}: {tail[0][:2000]}", "failure": f"exit {done.returncode}"}


def last_json(output: str | bytes | None) -> dict:
    """Return the line of figures, or of an error, that a worker printed; nothing if there is none."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    lines = [line for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
    figures = json.loads(lines[-1]) if lines else {}
    return figures | ({"failure": figures["error"].split(":")[0]} if "error" in figures else {})


def environment(layout: Layout) -> dict:
    """Return the machine and the versions that all runs of a file share."""
    return {
        "cpu": cpu_name(),
        "cores": THREADS,
        "ram_gb": round(int(_first_field("/proc/meminfo", "MemTotal").split()[0]) * 1024 / 1e9, 1),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "versions": _own_versions() | _peer_versions(layout),
    }


def _own_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}


def _peer_versions(layout: Layout) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json\nfound = {}\n"
        "for name in ('gguf', 'openvino', 'openvino-genai'):\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    found = json.loads(subprocess.run([str(layout.python), "-c", code], check=True, capture_output=True).stdout)
    for isa in ISAS:
        for info in layout.llama(isa).glob("llama_cpp_python-*.dist-info"):
            found["llama-cpp-python"] = info.name.split("-")[1].removesuffix(".dist")
    return found


def _first_field(path: str, name: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "unknown")


if __name__ == "__main__":
    main()
