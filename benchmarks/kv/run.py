"""Measure the KV cache: bytes and time of a decode step, perplexity, decoding from the SSD; write README.md from it.

Each measurement is a process of `measure.py`, kept in one JSON file as soon as it is done and not repeated (`--again`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks import results  # noqa: E402
from benchmarks.peers.layout import AVX2_ENVIRONMENT  # noqa: E402
from benchmarks.start.run import child_environment  # noqa: E402

HERE = Path(__file__).parent
CODECS = ("none", "int8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint of SmolLM2-135M, as benchmarks/accuracy/prepare.py makes it")
    parser.add_argument("--work", nargs="+", default=["step", "perplexity", "swap"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768], help="contexts")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--avx2", action="store_true", help="hold the libraries to AVX2")
    parser.add_argument("--swap-dir", default="/tmp", help="a directory on the SSD")
    parser.add_argument("--again", action="store_true", help="repeat what was measured")
    parser.add_argument("--report", action="store_true", help="write the tables again; measure nothing")
    parser.add_argument("--json", type=Path, default=HERE / "results.json", help="where results are kept")
    arguments = parser.parse_args()
    content = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"runs": {}}
    if not arguments.report:
        for key, command in measurements(arguments):
            if key in content["runs"] and not arguments.again:
                continue
            content["runs"][key] = measure(command, avx2=arguments.avx2)
            results.keep(content, arguments.json)
    if arguments.json == parser.get_default("json"):
        results.write_between(HERE / "README.md", results.BEGIN, results.END, report(content["runs"]))
    else:
        print("\n".join(report(content["runs"])))


def measurements(arguments: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Give the name and the options of each measurement."""
    mark = " avx2" if arguments.avx2 else ""
    if "step" in arguments.work:
        for dtype in arguments.dtypes:
            for tokens in arguments.tokens:
                codecs = ["dynamic", "none", "int8"] if tokens < 16384 else ["dynamic", "int8"]
                options = ["--codecs", *codecs, "--tokens", str(tokens), "--dtype", dtype]
                yield f"step {dtype} {tokens}{mark}", ["step", *options]
    if "perplexity" in arguments.work and arguments.model:
        for codec in ("dynamic", *CODECS):
            options = ["--codecs", codec, "--tokens", "20480"]
            yield f"perplexity {codec}{mark}", ["perplexity", arguments.model, *options]
    if "swap" in arguments.work:
        options = ["--tokens", "32768", "--budget", str(500 * 10**6), "--swap-dir", arguments.swap_dir, "--steps", "4"]
        yield f"swap int8{mark}", ["swap", "--codecs", "int8", *options]


def measure(command: list[str], *, avx2: bool) -> dict:
    """Run one measurement and return its figures, or how it failed."""
    done = subprocess.run(
        [sys.executable, str(HERE / "measure.py"), *command],
        env=child_environment() | (AVX2_ENVIRONMENT if avx2 else {}),
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"error": results.failure(done)}
    print(json.dumps(found), flush=True)
    return found


def report(runs: dict[str, dict]) -> Iterator[str]:
    """Give the lines of the tables."""
    good = {key: run for key, run in runs.items() if "error" not in run}
    yield ""
    for run in list(good.values())[:1]:
        dates, commits = sorted(each["date"] for each in good.values()), {each["commit"] for each in good.values()}
        yield f"{results.machine_line(run['machine'])} From {dates[0]} to {dates[-1]}, at {', '.join(sorted(commits))}."
    yield from _step_table({key: run for key, run in good.items() if run["work"] == "step"})
    yield from _perplexity_table([run for run in good.values() if run["work"] == "perplexity"])
    yield from _swap_table([run for run in good.values() if run["work"] == "swap"])
    for key, run in runs.items():
        if "error" in run:
            yield f"\n{key}: {run['error'].replace('<', '&lt;')}"
    yield ""


def _step_table(runs: dict[str, dict]) -> Iterator[str]:
    if not runs:
        return
    yield ""
    yield "| context | dtype | instructions | cache | step, ms | minimum | speed-up | GB | vs. 16 bits |"
    yield "|" + "---|" * 9
    for run in runs.values():
        base = run["caches"]["dynamic"]["step_ms"]
        for codec, found in run["caches"].items():
            cells = [
                f"{run['tokens']:,}",
                run["dtype"],
                run["cpu_capability"],
                "`DynamicCache`, sdpa" if codec == "dynamic" else f"`{codec}`",
                f"{found['step_ms']:.0f}",
                f"{found['least_ms']:.0f}",
                f"**{base / found['step_ms']:.2f}**",
                f"{found['n_bytes'] / 1e9:.2f}",
                f"{found['of_16_bit']:.3f}",
            ]
            yield f"| {' | '.join(cells)} |"


def _perplexity_table(runs: list[dict]) -> Iterator[str]:
    base = next((run["perplexity"] for run in runs if run["codecs"] == ["dynamic"]), None)
    if base is None:
        return
    yield ""
    yield "| cache | perplexity of SmolLM2-135M | change | tokens |"
    yield "|---|---|---|---|"
    for run in runs:
        name, found = run["codecs"][0], run["perplexity"]
        cells = [f"`{name}`", f"{found:.4f}", f"{100 * (found / base - 1):+.3f} %", f"{run['scored_tokens']:,}"]
        yield f"| {' | '.join(cells)} |"


def _swap_table(runs: list[dict]) -> Iterator[str]:
    if not runs:
        return
    yield ""
    yield (
        "| cache | context | KV, GB | budget, GB | step, ms "
        "| SSD reads per step, GB | read, GB/s | SSD, GB/s | share of the SSD |"
    )
    yield "|" + "---|" * 9
    for run in runs:
        cells = [
            f"`{run['codecs'][0]}`",
            f"{run['tokens']:,}",
            f"{run['n_bytes'] / 1e9:.2f}",
            f"{run['budget'] / 1e9:.2f}",
            f"{run['step_ms']:.0f}",
            f"{run['bytes_read_a_step'] / 1e9:.2f}",
            f"{run['read_gb_s']:.2f}",
            f"{run['ssd_gb_s']:.2f}",
            f"**{run['read_gb_s'] / run['ssd_gb_s']:.2f}**",
        ]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
