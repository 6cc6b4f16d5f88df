"""Measure starting: from a fresh process, nothing cached, to the first token; and how long importing takes.

Results go to one JSON file; then the tables in README.md are written from it, between its markers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks import results  # noqa: E402
from benchmarks.control_group import drop_page_cache  # noqa: E402

HERE = Path(__file__).parent
OVERHEAD_S = 4.0
READING_FACTOR = 1.5
IMPORTS = {
    "torch": "import torch",
    "transformers' model class": "from transformers import Qwen3VLForConditionalGeneration",
    "create_optimized_model": "from qwen3_vl_memory_optimizations import create_optimized_model",
    "OptimizedVisionLanguageModel": "from qwen3_vl_memory_optimizations import OptimizedVisionLanguageModel",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint directory; packed already, or it is packed first")
    parser.add_argument("--cache-dir", default=None, help="where packed checkpoints lie")
    parser.add_argument("--limits", nargs="+", default=["none", "1.6"], metavar="GB", help="`none` or GB")
    parser.add_argument("--images-px", nargs="+", type=int, default=[0, 448], help="side of the image; 0: text only")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--import-repeat", type=int, default=7)
    results.add_result_options(parser, HERE)
    arguments = parser.parse_args()
    if not arguments.report:
        measure_all(arguments)
    content = json.loads(arguments.json.read_text())
    results.publish(report(content), arguments.json, HERE)


def measure_all(arguments: argparse.Namespace) -> None:
    """Do all runs, in turns, so that a machine whose speed drifts meets all alike; then the imports."""
    results.require_groups(arguments.limits)
    content = results.load_kept(arguments, {"runs": [], "imports": {name: [] for name in IMPORTS}})
    content["environment"] = results.machine() | {"model": Path(arguments.model).name}
    start(arguments, "none", 0)  # packs, and writes what Python compiles
    for _ in range(arguments.repeat):
        for limit in arguments.limits:
            for image_px in arguments.images_px:
                run = {"limit": limit, "image_px": image_px, "date": results.now(), "cold": drop_page_cache()}
                run["commit"] = results.commit()
                content["runs"].append(run | start(arguments, limit, image_px))
                print(json.dumps(content["runs"][-1]), flush=True)
                results.keep(content, arguments.json)
    for repetition in range(arguments.import_repeat + 1 if arguments.import_repeat else 0):
        for name, statement in IMPORTS.items():
            seconds = import_s(statement)
            if repetition:  # the first of each warms up
                content["imports"][name].append(round(seconds, 3))
    results.keep(content, arguments.json)


def child_environment() -> dict[str, str]:
    """Return the environment of a fresh process, which may keep what it compiles, as installed packages do."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}


def start(arguments: argparse.Namespace, limit: str, image_px: int) -> dict:
    """Run one start and return its figures with the group's, or how it failed."""
    command = [sys.executable, str(HERE / "measure.py"), arguments.model, "--image-px", str(image_px)]
    if arguments.cache_dir:
        command += ["--cache-dir", arguments.cache_dir]
    return results.run_limited(command, limit, child_environment(), start_key="BENCHMARK_START_S")


def import_s(statement: str) -> float:
    """Return how long an import takes in a fresh interpreter, from the start of the process to its end."""
    code = f"{statement}\nimport time\nprint(time.monotonic())"
    start_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True)
    done.check_returncode()
    return float(done.stdout.splitlines()[-1]) - start_s


def report(content: dict) -> Iterator[str]:
    """Give the lines of the report."""
    here, runs = content["environment"], content["runs"]
    dates = sorted(run["date"] for run in runs)
    yield ""
    yield f"{results.machine_line(here)} Python {here['python']}."
    span = f"{len(runs)} runs, from {dates[0]} to {dates[-1]}, at {', '.join(sorted({run['commit'] for run in runs}))}"
    yield f"Model: {here['model']}, INT8, packed. {span}."
    if warm := sum(not run["cold"] for run in runs):
        yield f"The page cache could not be dropped before {warm} of the runs."
    yield ""
    yield (
        "| limit | prompt | time to first token, s | bound, s | share of the bound | interpreter | import | load "
        "| first token | of it waiting for the SSD | repeated | needed, GB | SSD, GB/s | peak of the group, GB |"
    )
    yield "|" + "---|" * 14
    for limit in dict.fromkeys(run["limit"] for run in runs):
        for image_px in dict.fromkeys(run["image_px"] for run in runs):
            group = [r for r in runs if (r["limit"], r["image_px"]) == (limit, image_px) and "error" not in r]
            if group:
                prompt = f"image of {image_px}x{image_px}, 32 tokens" if image_px else "32 tokens"
                yield f"| {limit if limit == 'none' else limit + ' GB'} | {prompt} | {_row(group)} |"
    for run in runs:
        if "error" in run:
            yield f"\n{run['limit']}, {run['image_px']}: {run['error'].replace('<', '&lt;')}"
    if not any(content["imports"].values()):
        return
    yield ""
    yield "| import, warm | s | relative to transformers' model class |"
    yield "|---|---|---|"
    base = statistics.median(content["imports"]["transformers' model class"])
    for name, seconds in content["imports"].items():
        middle = statistics.median(seconds)
        yield f"| `{IMPORTS[name]}` | {middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {middle / base:.2f} |"


def bound_s(run: dict) -> float:
    """Return how long a start may take."""
    return READING_FACTOR * run["needed_bytes"] / run["ssd_bytes_per_s"] + OVERHEAD_S


def _row(runs: list[dict]) -> str:
    """Return medians of the runs, the time with its least and greatest."""
    times = [run["first_token_s"] for run in runs]
    stages = [
        f"{statistics.median(run['stages_s'][name] for run in runs):.2f}"
        for name in ("interpreter", "import", "load", "first token")
    ]
    peaks = [run["group_peak_bytes"] for run in runs if "group_peak_bytes" in run]

    def middle(key: str, scale: float = 1) -> str:
        return f"{statistics.median(run[key] for run in runs) / scale:.2f}"

    cells = [
        f"**{statistics.median(times):.2f}** ({min(times):.2f} to {max(times):.2f})",
        f"{statistics.median(bound_s(run) for run in runs):.2f}",
        f"{statistics.median(run['first_token_s'] / bound_s(run) for run in runs):.2f}",
        *stages,
        middle("stall_s"),
        middle("second_answer_s"),
        middle("needed_bytes", 1e9),
        middle("ssd_bytes_per_s", 1e9),
        f"{statistics.median(peaks) / 1e9:.2f}" if peaks else "-",
    ]
    return " | ".join(cells)


if __name__ == "__main__":
    main()
