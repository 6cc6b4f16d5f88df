"""Measure decoding with no help, with prompt lookup and with a draft: each run cold, in a control group of its limit.

Results go to one JSON file after each run; then the table in README.md is written from it, between its markers (with
another `--json`, it is printed).
"""

from __future__ import annotations

import argparse
import fractions
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks import results  # noqa: E402
from benchmarks.assistant.measure import HELP, TEXTS  # noqa: E402
from benchmarks.control_group import drop_page_cache  # noqa: E402

HERE = Path(__file__).parent
RATES = (0.3, 0.6, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint directory")
    parser.add_argument("assistant", nargs="?", help="checkpoint directory of the draft; without one there is none")
    parser.add_argument(
        "--limits",
        nargs="+",
        default=["1.6"],
        metavar="GB",
        help="`none`, GB for the process, or a part of the weights such as `1/3` (default: %(default)s)",
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, default=HERE / "results.json", help="where results are kept")
    parser.add_argument("--add", action="store_true", help="keep the runs that are there, and add to them")
    parser.add_argument("--report", action="store_true", help="write the table again; measure nothing")
    arguments, passed_on = parser.parse_known_args()
    if not arguments.report:
        measure_all(arguments, passed_on)
    content = json.loads(arguments.json.read_text())
    if arguments.json != parser.get_default("json"):
        print("\n".join(report(content)))
        return
    results.write_between(HERE / "README.md", results.BEGIN, results.END, report(content))


def measure_all(arguments: argparse.Namespace, options: list[str]) -> None:
    """Do all runs; the kinds of help take turns, so that a machine whose speed drifts meets all alike."""
    results.require_groups([limit for limit in arguments.limits if "/" not in limit])
    content = results.load_kept(arguments, {"runs": []})
    content["environment"] = results.machine()
    kinds = HELP if arguments.assistant else tuple(kind for kind in HELP if kind != "assistant")
    names = {"model": Path(arguments.model).name, "assistant": Path(arguments.assistant or "").name}
    shown = [option for option in options if "/" not in option and option != "--cache-dir"]
    for repetition in range(arguments.repeat):
        turn = repetition % len(kinds)
        for limit in arguments.limits:
            for kind in [*kinds[turn:], *kinds[:turn]]:
                run = names | {"help": kind, "limit": limit, "options": shown, "commit": results.commit()}
                run |= {"date": results.now(), "cold": drop_page_cache()}
                run |= measure(arguments, kind, limit, options)
                content["runs"].append(run)
                results.keep(content, arguments.json)
                print(json.dumps(run), flush=True)


def measure(arguments: argparse.Namespace, kind: str, limit: str, options: list[str]) -> dict:
    """Run one measurement and return its figures with the group's, or how it failed."""
    command = [sys.executable, str(HERE / "measure.py"), arguments.model, "--help-with", kind]
    command += ["--assistant", arguments.assistant] if arguments.assistant else []
    command += options
    if "/" in limit:
        command += ["--weights-share", str(float(fractions.Fraction(limit)))]
    child = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return results.run_limited(command, "none" if "/" in limit else limit, child)


def report(content: dict) -> Iterator[str]:
    """Give the lines of the report."""
    yield ""
    yield results.machine_line(content["environment"])
    for model in dict.fromkeys(run["model"] for run in content["runs"]):
        yield from report_model(model, [run for run in content["runs"] if run["model"] == model])


def report_model(model: str, runs: list[dict]) -> Iterator[str]:
    """Give the lines about one model."""
    dates = sorted(run["date"] for run in runs)
    kinds = ", ".join(sorted({run["prompt"] for run in runs if "prompt" in run})) or "none"
    drafts = ", ".join(sorted({run["assistant"] for run in runs} - {""})) or "none"
    options = " ".join(dict.fromkeys(option for run in runs for option in run["options"]))
    yield ""
    yield f"## {model}"
    yield ""
    yield f"Draft: {drafts}; prompts: {kinds}{'; options: ' + options if options else ''}."
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    yield f"Runs: {len(runs)}, from {dates[0]} to {dates[-1]}, at {commits}."
    if warm := sum(not run["cold"] for run in runs):
        yield f"The page cache could not be dropped before {warm} of the runs."
    yield ""
    heads = ("limit", "text", "method", "tokens per second", "vs. none", "tokens per pass", "draft passes")
    yield f"| {' | '.join((*heads, 'SSD reads per token, GB', 'same answer'))} |"
    yield "|---" * 9 + "|"
    for limit in dict.fromkeys(run["limit"] for run in runs):
        for text in TEXTS:
            none = None
            for kind in HELP:
                group = [run for run in runs if (run["limit"], run["help"]) == (limit, kind)]
                cells = [run[text] for run in group if text in run and run[text]["passes"]]
                if cells:
                    alone = {run[text]["answer"] for run in runs if run["help"] == "none" and text in run}
                    rate = statistics.median(cell["token_per_s"] for cell in cells)
                    none = rate if kind == "none" else none
                    yield f"| {_named(limit)} | {text} | {kind} | {_row(cells, alone, none)} |"
    yield from _costs(runs)
    for run in runs:
        if "error" in run:
            yield f"\n{_named(run['limit'])}, {run['help']}: {run['error'].replace('<', '&lt;')}"


def _named(limit: str) -> str:
    return f"{limit} of the weights" if "/" in limit else limit if limit == "none" else f"{limit} GB"


def _costs(runs: list[dict]) -> Iterator[str]:
    """Give what passes over several tokens cost, measured, and what follows from it."""
    measured = [run for run in runs if "costs" in run]
    if not measured:
        return
    rows = list(measured[0]["costs"])
    yield ""
    yield "Time per pass by number of new tokens (measured, ms; SSD reads, GB):"
    yield ""
    yield "| limit | " + " | ".join(f"{row} token{'s' if row != '1' else ''}" for row in rows) + " |"
    yield "|---" * (len(rows) + 1) + "|"
    derived = []
    for limit in dict.fromkeys(run["limit"] for run in measured):
        group = [run["costs"] for run in measured if run["limit"] == limit]
        seconds = {row: statistics.median(costs[row]["pass_s"] for costs in group) for row in rows}
        read = {row: statistics.median(costs[row]["read_bytes"] for costs in group) for row in rows}
        cells = (f"{1000 * seconds[row]:.1f} ({read[row] / 1e9:.3f})" for row in rows)
        yield f"| {_named(limit)} | {' | '.join(cells)} |"
        for rate in RATES:
            gains = (_tokens(rate, int(row) - 1) * seconds["1"] / seconds[row] for row in rows[1:])
            derived.append(f"| {_named(limit)} | {100 * rate:.0f} % | {' | '.join(f'{gain:.2f}x' for gain in gains)} |")
    yield ""
    yield (
        "Derived, not measured: the speed-up at an acceptance rate per drafted token, if drafts cost "
        "nothing and each pass verifies all but one of its tokens:"
    )
    yield ""
    yield "| limit | acceptance rate | " + " | ".join(f"passes over {row}" for row in rows[1:]) + " |"
    yield "|---" * (len(rows) + 1) + "|"
    yield from derived


def _tokens(rate: float, guesses: int) -> float:
    """Return how many tokens a pass gives: guesses up to the first wrong one, and its own."""
    return sum(rate**number for number in range(guesses + 1))


def _row(cells: list[dict], plain: set[str], alone: float | None) -> str:
    """Return medians of the runs of a cell, the rate with its least and greatest."""
    rates = [cell["token_per_s"] for cell in cells]
    rate = f"{statistics.median(rates):.2f}"
    if len(rates) > 1:
        rate += f" ({min(rates):.2f} to {max(rates):.2f})"
    middle = {
        key: statistics.median(cell[key] for cell in cells)
        for key in ("tokens_per_pass", "draft_passes", "bytes_read_per_token")
    }
    gain = f"{statistics.median(rates) / alone:.2f}x" if alone else "-"
    same = "yes" if {cell["answer"] for cell in cells} <= plain else "no"
    return (
        f"{rate} | {gain} | {middle['tokens_per_pass']:.2f} | {middle['draft_passes']:.0f} | "
        f"{middle['bytes_read_per_token'] / 1e9:.3f} | {same}"
    )


if __name__ == "__main__":
    main()
