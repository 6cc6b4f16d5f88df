"""Measure what predictive collection saves in a session of 50 questions about pictures: with it and without, in turns.

Results go to one JSON file after each run; then the table in README.md is written from it, between its markers (with
another `--json`, it is printed).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks import results  # noqa: E402

HERE = Path(__file__).parent
PLACES = {"in memory and on the SSD": [], "private: in memory alone": ["--private"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint directory")
    parser.add_argument("--cache-dir", required=True, help="where its packed form lies, or is put")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the order of the pictures")
    results.add_result_options(parser, HERE)
    arguments = parser.parse_args()
    if not arguments.report:
        measure_all(arguments)
    results.publish(report(json.loads(arguments.json.read_text())), arguments.json, HERE)


def measure_all(arguments: argparse.Namespace) -> None:
    content = results.load_kept(arguments, {"runs": []})
    content["environment"] = results.machine() | {"model": Path(arguments.model).name}
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    for seed in arguments.seeds:
        for place, options in PLACES.items():
            pair = []
            for collect in ("off", "on"):
                command = [sys.executable, str(HERE / "measure.py"), arguments.model, "--collect", collect]
                command += ["--seed", str(seed), "--packed-dir", arguments.cache_dir, *options]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(results.failure(done))
                pair.append(json.loads(done.stdout.splitlines()[-1]))
                pair[-1] |= {"place": place, "date": results.now(), "commit": results.commit()}
            answers = [run.pop("answers") for run in pair]
            for run in pair:
                if run["gc"]:
                    run["gc"].pop("life_cycles")
                content["runs"].append(run | {"same_answers": answers[0] == answers[1]})
            results.keep(content, arguments.json)


def report(content: dict) -> Iterator[str]:
    """Give the lines of the report."""
    here, runs = content["environment"], content["runs"]
    yield from ["", results.machine_line(here), results.runs_line(here, runs), ""]
    yield (
        "| cache | seed | peak without, MB | peak with, MB | reduction | mean without, MB | mean with, MB "
        "| collected | needed again | success rate | prediction accuracy | majority baseline "
        "| hits without, with | SSD hits | same answers |"
    )
    yield "|" + "---|" * 15
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    for without, collected in pairs:
        yield f"| {without['place']} | {without['seed']} | {_row(without, collected)} |"
    saved = [1 - collected["peak_bytes"] / without["peak_bytes"] for without, collected in pairs]
    success = [collected["gc"]["success_rate"] for _, collected in pairs]
    yield ""
    yield (
        f"- Reduction of the peak: {100 * statistics.median(saved):.0f} % "
        f"({100 * min(saved):.0f} to {100 * max(saved):.0f}); "
        f"success rate {statistics.median(success):.3f} ({min(success):.3f} to {max(success):.3f})."
    )


def _row(without: dict, collected: dict) -> str:
    gc = collected["gc"]
    cells = [f"{run[key] / 1e6:.1f}" for key in ("peak_bytes", "mean_bytes") for run in (without, collected)]
    cells.insert(2, f"**{100 * (1 - collected['peak_bytes'] / without['peak_bytes']):.0f} %**")
    cells += [
        str(gc["swapped"] + gc["freed"]),
        str(gc["needed_again"]),
        f"{gc['success_rate']:.3f}",
        f"{gc['lifetime_accuracy']:.3f}",
        f"{gc['base_rate']:.3f}",
        f"{without['hits']}, {collected['hits']}",
        str(collected["ssd_hits"]),
        "yes" if collected["same_answers"] else "no",
    ]
    return " | ".join(cells)


if __name__ == "__main__":
    main()
