"""Compare what the tuner ends with to the best of a grid, on two workloads; write the figures into the README here."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks import results  # noqa: E402

HERE = Path(__file__).parent
FIGURES = {"decode": "tokens/s", "pictures": "hit rate of L2"}
_UNITS = {"decode": (2**20, "MiB"), "pictures": (2**10, "KiB")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="checkpoint, for `decode`")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    results.add_result_options(parser, HERE)
    arguments, options = parser.parse_known_args()
    if not arguments.report:
        content = results.load_kept(arguments, {"runs": []})
        content["environment"] = results.machine()
        for workload in arguments.only:
            command = [sys.executable, str(HERE / "measure.py"), workload, *options]
            command += ["--model", arguments.model] if workload == "decode" else []
            done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{workload}: {results.failure(done)}")
            run = {"date": results.now(), "commit": results.commit()} | json.loads(done.stdout.splitlines()[-1])
            content["runs"] = [each for each in content["runs"] if each["workload"] != workload] + [run]
            results.keep(content, arguments.json)
    content = json.loads(arguments.json.read_text())
    results.publish(report(content), arguments.json, HERE)


def report(content: dict) -> Iterator[str]:
    """Give the lines of the report."""
    yield ""
    yield results.machine_line(content["environment"])
    for run in content["runs"]:
        workload = run["workload"]
        scale, unit = _UNITS[workload]

        def size(n_bytes: float, scale: int = scale, unit: str = unit) -> str:
            return f"{n_bytes / scale:.4g} {unit}"

        final = {row["value"]: row for row in run["final"]}
        yield ""
        yield f"**{workload}** ({run['date']}, at {run['commit']}): `{run['parameter']}`, {FIGURES[workload]}"
        yield ""
        yield f"| alternating, before | {' | '.join(size(row['value']) for row in run['grid'])} |"
        yield "|" + "---|" * (len(run["grid"]) + 1)
        yield f"| grid | {' | '.join(format(row['figure'], '.3f') for row in run['grid'])} |"
        yield ""
        yield "| alternating, after | value | figure | all rounds |"
        yield "|---|---|---|---|"
        for name in ("best", "tuned", "start"):
            row = final[run[name]]
            title = {"best": "best of the grid", "tuned": "value found by the tuner", "start": "start value"}[name]
            yield f"| {title} | {size(run[name])} | {row['figure']:.3f} | {', '.join(map(str, row['all']))} |"
        ratio = final[run["tuned"]]["figure"] / final[run["best"]]["figure"]
        rested = "and rested" if run["rested"] else "and had not come to rest"
        yield ""
        yield f"The tuner ended at {100 * ratio:.1f} % of the grid's best after {run['tuning_s']:.0f} s, {rested}."
        yield "Its log:"
        yield ""
        yield "```"
        yield from run["log"]
        yield "```"


if __name__ == "__main__":
    main()
