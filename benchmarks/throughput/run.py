"""Measure several prompts at once within a budget: each batch cold, in a control group of its limit.

Results go to one JSON file after each run; then the table in README.md is written from it, between its markers (with
another `--json`, it is printed).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks import results  # noqa: E402
from benchmarks.control_group import drop_page_cache  # noqa: E402

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint directory")
    parser.add_argument("--limits", nargs="+", default=["1.6", "1.2"], metavar="GB", help="`none` or GB")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--repeat", type=int, default=3)
    results.add_result_options(parser, HERE)
    arguments, passed_on = parser.parse_known_args()
    if not arguments.report:
        measure_all(arguments, passed_on)
    results.publish(report(json.loads(arguments.json.read_text())), arguments.json, HERE)


def measure_all(arguments: argparse.Namespace, options: list[str]) -> None:
    """Do all runs; the batches take turns, so that a machine whose speed drifts meets all alike."""
    results.require_groups(arguments.limits)
    content = results.load_kept(arguments, {"runs": []})
    shown = [option for option in options if "/" not in option and option != "--cache-dir"]
    content["environment"] = results.machine() | {"model": Path(arguments.model).name, "options": shown}
    for _ in range(arguments.repeat):
        for limit in arguments.limits:
            for batch in arguments.batches:
                run = {"limit": limit, "batch": batch, "date": results.now(), "commit": results.commit()}
                command = [sys.executable, str(HERE / "measure.py"), arguments.model, "--batch", str(batch), *options]
                run |= {"cold": drop_page_cache()}
                run |= results.run_limited(command, limit, os.environ | {"PYTHONPATH": str(ROOT / "src")})
                content["runs"].append(run)
                results.keep(content, arguments.json)
                print(json.dumps(run), flush=True)


def report(content: dict) -> Iterator[str]:
    """Give the lines of the report."""
    here, runs = content["environment"], content["runs"]
    dates = sorted(run["date"] for run in runs)
    yield ""
    yield results.machine_line(here)
    options = f"; options: {' '.join(here['options'])}" if here["options"] else ""
    span = f"{len(runs)} runs, from {dates[0]} to {dates[-1]}, at {', '.join(sorted({run['commit'] for run in runs}))}"
    yield f"Model: {here['model']}, INT8{options}. {span}."
    if warm := sum(not run["cold"] for run in runs):
        yield f"The page cache could not be dropped before {warm} of the runs."
    yield ""
    yield (
        "| limit | prompts | tokens per second | vs. one prompt | time per step, s | SSD reads per step, GB "
        "| weights per step, GB | memory for weights, GB | excess SSD reads per step, GB | SSD busy | prefill, s |"
    )
    yield "|" + "---|" * 11
    for limit in dict.fromkeys(run["limit"] for run in runs):
        alone = None
        for batch in sorted({run["batch"] for run in runs}):
            group = [r for r in runs if (r["limit"], r["batch"]) == (limit, batch) and "error" not in r]
            if group:
                rate = statistics.median(run["token_per_s"] for run in group)
                alone = rate if batch == 1 else alone
                share = f"{rate / alone:.1f}x" if alone else "-"
                yield f"| {limit if limit == 'none' else limit + ' GB'} | {batch} | {_row(group, share)} |"
    for run in runs:
        if "error" in run:
            yield f"\n{run['limit']}, {run['batch']} prompts: {run['error'].replace('<', '&lt;')}"


def _row(runs: list[dict], share: str) -> str:
    """Return medians of the runs, the rate with its least and greatest."""
    rates = [run["token_per_s"] for run in runs]

    def middle(key: str, scale: float = 1, digits: int = 3) -> str:
        return f"{statistics.median(run[key] for run in runs) / scale:.{digits}f}"

    beyond = [r["read_bytes_per_step"] - max(0, r["used_bytes_per_step"] - r["frames_bytes"]) for r in runs]
    cells = [
        f"**{statistics.median(rates):.2f}** ({min(rates):.2f} to {max(rates):.2f})",
        share,
        middle("step_s", digits=2),
        middle("read_bytes_per_step", 1e9),
        middle("used_bytes_per_step", 1e9),
        middle("frames_bytes", 1e9),
        f"{statistics.median(beyond) / 1e9:.3f}",
        f"{100 * statistics.median(run['reading_share'] for run in runs):.0f} %",
        middle("prefill_s", digits=1),
    ]
    return " | ".join(cells)


if __name__ == "__main__":
    main()
