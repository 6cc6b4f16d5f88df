"""Measure decoding with no help, with prompt lookup and with a draft: each run cold, in a control group of its limit.

Results go to one JSON file after each run; then the table in README.md is written from it, between its markers (with
another `--json`, it is printed).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks.assistant.measure import HELP, TEXTS  # noqa: E402
from benchmarks.control_group import control_group, drop_page_cache, run_in_group, unavailable_reason  # noqa: E402
from benchmarks.peers.run import commit, now  # noqa: E402

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: begin (written by run.py) -->", "<!-- results: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint directory")
    parser.add_argument("assistant", help="checkpoint directory of the draft")
    parser.add_argument(
        "--limits", nargs="+", default=["1.6"], metavar="GB", help="`none` or GB (default: %(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, default=HERE / "results.json", help="where results are kept")
    parser.add_argument("--report", action="store_true", help="write the table again; measure nothing")
    arguments, passed_on = parser.parse_known_args()
    if not arguments.report:
        measure_all(arguments, passed_on)
    content = json.loads(arguments.json.read_text())
    if arguments.json != parser.get_default("json"):
        print("\n".join(report(content)))
        return
    readme = HERE / "README.md"
    text = readme.read_text()
    readme.write_text("\n".join([text.split(BEGIN)[0] + BEGIN, *report(content), END]) + text.split(END)[1])


def measure_all(arguments: argparse.Namespace, options: list[str]) -> None:
    """Do all runs; the kinds of help take turns, so that a machine whose speed drifts meets all alike."""
    reason = unavailable_reason()
    if reason is not None and any(limit != "none" for limit in arguments.limits):
        sys.exit(f"no memory control group here: {reason}; `--limits none` works")
    content: dict = {"environment": environment(arguments, options), "runs": []}
    for repetition in range(arguments.repeat):
        turn = repetition % len(HELP)
        for limit in arguments.limits:
            for kind in [*HELP[turn:], *HELP[:turn]]:
                run = {"help": kind, "limit": limit, "date": now(), "cold": drop_page_cache()}
                run |= measure(arguments, kind, limit, options)
                content["runs"].append(run)
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(content, indent=1) + "\n")
                print(json.dumps(run), flush=True)


def measure(arguments: argparse.Namespace, kind: str, limit: str, options: list[str]) -> dict:
    """Run one measurement and return its figures with the group's, or how it failed."""
    command = [sys.executable, str(HERE / "measure.py"), arguments.model, "--help-with", kind]
    command += ["--assistant", arguments.assistant, *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    if limit == "none":
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        figures = {}
    else:
        limit_bytes = round(float(limit) * 1e9)
        with control_group(limit_bytes) as group:
            done = run_in_group([*command, "--ram-budget", str(limit_bytes)], group, env=environment)
            figures = {"group_peak_bytes": group.peak_bytes(), "kills": group.kills()}
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return figures | {"error": f"exit status {done.returncode}: {tail[0][:500]}"}
    return figures | json.loads(done.stdout.splitlines()[-1])


def environment(arguments: argparse.Namespace, options: list[str]) -> dict:
    """Return what all runs share."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {
        "model": Path(arguments.model).name,
        "assistant": Path(arguments.assistant).name,
        "options": options,
        "cpu": cpu.split(":", 1)[1].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release().split("-")[0],
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "commit": commit(),
    }


def report(content: dict) -> Iterator[str]:
    """Give the lines of the report."""
    here, runs = content["environment"], content["runs"]
    dates = sorted(run["date"] for run in runs)
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    kinds = sorted({run["prompt"] for run in runs if "prompt" in run})
    yield ""
    yield f"Machine: {here['cpu']}, {here['cores']} cores, Linux {here['kernel']}, {versions}."
    yield (
        f"Model: {here['model']}, draft: {here['assistant']}; prompts: {', '.join(kinds) or 'none'}"
        f"{'; options: ' + ' '.join(here['options']) if here['options'] else ''}."
    )
    yield f"Runs: {len(runs)}, from {dates[0]} to {dates[-1]}, at {here['commit']}."
    if warm := sum(not run["cold"] for run in runs):
        yield f"The page cache could not be dropped before {warm} of the runs."
    yield ""
    yield "| limit | text | help | token/s | tokens a pass | passes of the draft | read a token, GB | same answer |"
    yield "|---|---|---|---|---|---|---|---|"
    for limit in dict.fromkeys(run["limit"] for run in runs):
        for text in TEXTS:
            for kind in HELP:
                group = [run for run in runs if (run["limit"], run["help"]) == (limit, kind)]
                cells = [run[text] for run in group if text in run and run[text]["passes"]]
                if cells:
                    plain = {run[text]["answer"] for run in runs if run["help"] == "none" and text in run}
                    yield f"| {limit} | {text} | {kind} | {_row(cells, plain)} |"
    for run in runs:
        if "error" in run:
            yield f"\n{run['limit']}, {run['help']}: {run['error'].replace('<', '&lt;')}"


def _row(cells: list[dict], plain: set[str]) -> str:
    """Return medians of the runs of a cell, the rate with its least and greatest."""
    rates = [cell["token_per_s"] for cell in cells]
    rate = f"{statistics.median(rates):.2f}"
    if len(rates) > 1:
        rate += f" ({min(rates):.2f} to {max(rates):.2f})"
    middle = {
        key: statistics.median(cell[key] for cell in cells)
        for key in ("tokens_per_pass", "draft_passes", "bytes_read_per_token")
    }
    same = "yes" if {cell["answer"] for cell in cells} <= plain else "no"
    return (
        f"{rate} | {middle['tokens_per_pass']:.2f} | {middle['draft_passes']:.0f} | "
        f"{middle['bytes_read_per_token'] / 1e9:.3f} | {same}"
    )


if __name__ == "__main__":
    main()
