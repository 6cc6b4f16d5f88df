"""Measure what each codec costs in accuracy and saves in bytes, on the shipped tiny Qwen3-VL and on SmolLM2-135M.

Everything needed is fetched first. Each model and codec is a run of `qwen3vl-mem evaluate`, kept in one JSON file as
soon as it is done and not repeated (`--again`). Then the tables in README.md are written between its markers, and the
plot beside it (with another `--json`, the tables are printed).
"""

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
from benchmarks.accuracy.prepare import MODEL_NAME, prepare  # noqa: E402
from qwen3_vl_memory_optimizations.compression import codec_names  # noqa: E402

HERE = Path(__file__).parent
TINY = ROOT / "src" / "qwen3_vl_memory_optimizations" / "assets" / "tiny-qwen3vl"
SUMMARY_BEGIN = "<!-- accuracy: begin (written by benchmarks/accuracy/run.py) -->"
SUMMARY_END = "<!-- accuracy: end -->"
SUMMARIES = {
    "docs/choosing-a-codec.md": "| codec | bytes vs. 16 bits | perplexity of SmolLM2 | accuracy of the tiny model |",
}
"""Files with a short table, and its heading."""

PLOT = "accuracy-against-bytes.png"

TINY_NAME = "tiny Qwen3-VL"
OUTLIERS_NAME = "SmolLM2 with outliers"
SHUFFLED_NAME = "SmolLM2 with shuffled channels"
WORK = {
    TINY_NAME: ("images", ["--images", "1000"], ["--images", "14"]),
    MODEL_NAME: ("text", ["--tokens", "20992"], ["--tokens", "1024"]),
    OUTLIERS_NAME: ("text", ["--tokens", "4096"], ["--tokens", "1024"]),
    SHUFFLED_NAME: ("text", ["--tokens", "20992"], ["--tokens", "1024"]),
}
"""Model -> task, options of the run, and of the short one within a budget."""

N_THREADS = {TINY_NAME: "1"}
"""The products of the tiny model are so small that several threads would mostly wait for each other."""

BUDGET_SHARE = 3
LEAST_BUDGET_BYTES = 2_000_000
"""What the Pager needs to work at all, which is more than a third of the tiny model in INT8."""

CLI = [sys.executable, "-c", "from qwen3_vl_memory_optimizations.cli import main; main()"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", nargs="+", default=[*codec_names(), "auto"], help="default: all there are")
    parser.add_argument("--models", nargs="+", choices=[*WORK], default=[*WORK])
    parser.add_argument("--again", action="store_true", help="repeat runs that were done")
    parser.add_argument("--report", action="store_true", help="write tables and plot again; measure nothing")
    parser.add_argument("--work-dir", type=Path, default=ROOT / ".bench" / "accuracy", help="for what is fetched")
    parser.add_argument("--json", type=Path, default=HERE / "results.json", help="where results are kept")
    arguments = parser.parse_args()
    if not arguments.report:
        measure_all(arguments)
    content = json.loads(arguments.json.read_text())
    if arguments.json != parser.get_default("json"):
        print("\n".join(report(content)))
        return
    draw(content["runs"], HERE / PLOT)
    results.write_between(HERE / "README.md", results.BEGIN, results.END, report(content))
    for name, heading in SUMMARIES.items():
        results.write_between(ROOT / name, SUMMARY_BEGIN, SUMMARY_END, summary(content["runs"], heading))


def measure_all(arguments: argparse.Namespace) -> None:
    """Do the runs that are not there yet."""
    images, smollm2, outliers, shuffled = prepare(arguments.work_dir)
    directories = {TINY_NAME: TINY, MODEL_NAME: smollm2, OUTLIERS_NAME: outliers, SHUFFLED_NAME: shuffled}
    runs = json.loads(arguments.json.read_text())["runs"] if arguments.json.exists() else []
    for model in arguments.models:
        for codec in arguments.codecs:
            before = [run for run in runs if (run["model"], run["codec"]) == (model, codec)]
            if before and "error" not in before[0] and not arguments.again:
                continue
            run = {"model": model, "codec": codec, "date": results.now(), "commit": results.commit()}
            run |= measure(directories[model], codec, model, arguments.work_dir, images)
            runs = [each for each in runs if each not in before] + [run]
            results.keep({"environment": results.machine(), "runs": runs}, arguments.json)
            print(json.dumps({key: run[key] for key in run if key != "result"}), flush=True)


def measure(directory: Path, codec: str, model: str, work_dir: Path, images: Path) -> dict:
    """Evaluate one codec, then a little within a third of its bytes; return the figures, or how it failed."""
    task, options, short = WORK[model]
    variables = {"OMP_NUM_THREADS": N_THREADS[model]} if model in N_THREADS else {}
    variables |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(images)]), "HF_HUB_OFFLINE": "1"}
    whole = evaluate(directory, codec, options, work_dir, variables)
    if "error" in whole:
        return whole
    result = whole["codecs"][0]
    budget_bytes = max(result["weight_bytes"] // BUDGET_SHARE, LEAST_BUDGET_BYTES)
    limited = evaluate(directory, codec, [*short, "--tensor-budget", str(budget_bytes)], work_dir, variables)
    run = {"result": result, "baseline": whole["baseline"], "budget_bytes": budget_bytes}
    if "error" in limited:
        return run | {"budget_error": limited["error"]}
    return run | {"budget_difference": limited["codecs"][0]["tasks"][task]["difference"]}


def evaluate(directory: Path, codec: str, options: list[str], work_dir: Path, variables: dict[str, str]) -> dict:
    """Run `qwen3vl-mem evaluate` and return its report."""
    command = [*CLI, "evaluate", str(directory), "--codec", codec, "--cache-dir", str(work_dir / "cache"), "--json"]
    done = subprocess.run([*command, *options], env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        return {"error": results.failure(done)}
    return json.loads(done.stdout)


def report(content: dict) -> Iterator[str]:
    """Give the lines of the report."""
    here, runs = content["environment"], content["runs"]
    dates, commits = sorted(run["date"] for run in runs), sorted({run["commit"] for run in runs})
    yield ""
    yield results.machine_line(here)
    yield f"Runs: {len(runs)}, from {dates[0]} to {dates[-1]}, at {', '.join(commits)}."
    yield ""
    yield f"![accuracy against bytes]({PLOT})"
    for model, (task, _, _) in WORK.items():
        done = [run for run in runs if run["model"] == model and "result" in run]
        if not done:
            continue
        done.sort(key=lambda run: -run["result"]["weight_bytes"])
        first = done[0]["result"]["tasks"][task]
        yield ""
        yield f"**{model}**, {first['positions']:,} predictions ({task}), compared with {done[0]['baseline']}"
        yield ""
        yield (
            "| codec | MB | vs. 16 bits | perplexity | accuracy | macro F1 | same top-1 | KL | layer error | "
            "same top-1 within a budget | stored as |"
        )
        yield "|---" * 11 + "|"
        before = first["baseline"]
        alone = " | ".join(number(before[key]) for key in ("perplexity", "accuracy", "f1"))
        yield f"| *uncompressed* | | | {alone} | | | | | |"
        for run in done:
            yield row(run, task)
    for run in runs:
        if "error" in run:
            yield f"\n{run['model']}, {run['codec']}: {run['error'].replace('<', '&lt;')}"


def row(run: dict, task: str) -> str:
    """Return the line of a codec."""
    result = run["result"]
    figures = result["tasks"][task]
    before, after, difference = (figures[key] for key in ("baseline", "optimized", "difference"))
    perplexity = number(after["perplexity"])
    if after["perplexity"] is not None:
        perplexity += f" ({100 * (after['perplexity'] / before['perplexity'] - 1):+.2f} %)"
    points = 100 * (after["accuracy"] - before["accuracy"])
    limited = run.get("budget_difference")
    cells = [
        run["codec"],
        f"{result['weight_bytes'] / 1e6:.1f}",
        f"{result['share_of_16_bit']:.3f}",
        perplexity,
        f"{number(after['accuracy'])} ({points:+.2f} points)",
        number(after["f1"]),
        *(number(difference[key]) for key in ("top1_agreement", "kl_divergence", "layer_relative_error")),
        f"{number(limited['top1_agreement'])} ({run['budget_bytes'] / 1e6:.1f} MB)" if limited else run["budget_error"],
        ", ".join(f"{count} {codec}" for codec, count in result["weights_stored_as"].items()),
    ]
    return "| " + " | ".join(cells) + " |"


def summary(runs: list[dict], heading: str) -> Iterator[str]:
    """Give the lines of the short table: every codec that was measured on a language model, the largest first."""
    yield heading
    yield "|---" * 4 + "|"
    tasks = {(run["model"], run["codec"]): run["result"] for run in runs if "result" in run}
    found = [(codec, result) for (model, codec), result in tasks.items() if model == MODEL_NAME]
    for codec, result in sorted(found, key=lambda pair: -pair[1]["weight_bytes"]):
        text = result["tasks"]["text"]
        images = tasks[TINY_NAME, codec]["tasks"]["images"] if (TINY_NAME, codec) in tasks else None
        perplexity = f"{number(text['optimized']['perplexity'])} ({number(text['baseline']['perplexity'])})"
        accuracy = f"{images['optimized']['accuracy']:.3f} ({images['baseline']['accuracy']:.3f})" if images else "-"
        yield f"| {codec} | {result['share_of_16_bit']:.3f} | {perplexity} | {accuracy} |"


def number(value: float | None) -> str:
    """Return a figure with four digits; one that is not finite is said to be so."""
    return "not finite" if value is None else f"{value:.4g}"


def draw(runs: list[dict], path: Path) -> None:
    """Draw for each model what every codec gets, against its bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    colors = {codec: f"C{index}" for index, codec in enumerate(sorted({run["codec"] for run in runs}))}
    figure, axes = plt.subplots(-(-len(WORK) // 2), 2, figsize=(11, 9), constrained_layout=True)
    for axis, (model, (task, _, _)) in zip(axes.flat, WORK.items(), strict=True):
        metric = "perplexity" if task == "text" else "accuracy"
        for index, run in enumerate(run for run in runs if run["model"] == model and "result" in run):
            figures = run["result"]["tasks"][task]
            if index == 0:
                axis.axhline(figures["baseline"][metric], color="gray", linestyle="--", linewidth=1, label="as it is")
            value = figures["optimized"][metric]
            if value is not None:
                axis.scatter(
                    run["result"]["share_of_16_bit"], value, label=run["codec"], color=colors[run["codec"]], zorder=3
                )
        better = "less is better" if metric == "perplexity" else "more is better"
        axis.set(title=model, xlabel="bytes of all weights, over 16 bits each", ylabel=f"{metric} ({better})")
        if metric == "perplexity":
            axis.set_yscale("log")
            for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                set_formatter(ScalarFormatter())
        axis.set_xlim(left=0)
        axis.grid(True, which="both", alpha=0.25)
        axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
