"""Where the time of a token goes, in memory: products of weights, attention, the rest; natively and held to AVX2.

Each row is a process. Results go to one JSON file; then the table in README.md is written from it, between its markers.
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
from benchmarks.peers.layout import AVX2_ENVIRONMENT, ISAS  # noqa: E402

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint directory")
    parser.add_argument("--cache-dir", default=None, help="where packed checkpoints lie")
    parser.add_argument("--codecs", nargs="+", default=["int8_rotated", "int4", "none"], metavar="CODEC")
    parser.add_argument("--isas", nargs="+", choices=ISAS, default=list(ISAS))
    parser.add_argument("--contexts", nargs="+", type=int, default=[32, 1024], metavar="TOKENS")
    parser.add_argument("--repeat", type=int, default=3)
    results.add_result_options(parser, HERE)
    arguments = parser.parse_args()
    if not arguments.report:
        measure_all(arguments)
    content = json.loads(arguments.json.read_text())
    results.publish(report(content), arguments.json, HERE)


def measure_all(arguments: argparse.Namespace) -> None:
    """Do all runs, in turns, so that a machine whose speed drifts meets all alike."""
    content = results.load_kept(arguments, {"runs": []})
    content["environment"] = results.machine() | {"model": Path(arguments.model).name}
    plain = {key: value for key, value in os.environ.items() if key not in AVX2_ENVIRONMENT}
    for _ in range(arguments.repeat):
        for isa in arguments.isas:
            for codec in arguments.codecs:
                run = {"isa": isa, "codec": codec, "date": results.now(), "commit": results.commit()}
                command = [sys.executable, str(HERE / "measure.py"), arguments.model, "--codec", codec]
                command += ["--contexts", *map(str, arguments.contexts)]
                if arguments.cache_dir:
                    command += ["--cache-dir", arguments.cache_dir]
                environment = plain | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
                environment |= AVX2_ENVIRONMENT if isa == "avx2" else {}
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    run["error"] = results.failure(done)
                else:
                    run |= json.loads(done.stdout.splitlines()[-1])
                content["runs"].append(run)
                print(json.dumps(run), flush=True)
                results.keep(content, arguments.json)


def report(content: dict) -> Iterator[str]:
    """Give the lines of the report."""
    here, runs = content["environment"], content["runs"]
    yield from ["", results.machine_line(here), results.runs_line(here, runs), ""]
    yield (
        "| instructions | codec | compute dtype | context, tokens | tokens per second | time per token, ms "
        "| products, ms | weights per token, GB | GB/s | memory bandwidth, GB/s | attention, ms | other, ms |"
    )
    yield "|" + "---|" * 12
    for isa, codec in dict.fromkeys((run["isa"], run["codec"]) for run in runs):
        group = [run for run in runs if (run["isa"], run["codec"]) == (isa, codec) and "error" not in run]
        for context in dict.fromkeys(context for run in group for context in run["contexts"]):
            rows = [run["contexts"][context] for run in group]
            token, products, attention = (
                [1000 * row[key] for row in rows] for key in ("token_s", "products_s", "attention_s")
            )
            rest = [a - b - c for a, b, c in zip(token, products, attention, strict=True)]
            weights = statistics.median(row["weight_bytes"] for row in rows) / 1e9
            memory = statistics.median(run["memory_bytes_per_s"] for run in group) / 1e9
            yield (
                f"| {isa} | {codec} | {group[0]['dtype']} | {context} | **{1000 / statistics.median(token):.2f}** "
                f"| {_spread(token)} | {_spread(products)} | {weights:.2f} "
                f"| {1000 * weights / statistics.median(products):.1f} | {memory:.1f} | {_spread(attention)} "
                f"| {_spread(rest)} |"
            )
    for run in runs:
        if "error" in run:
            yield f"\n{run['isa']}, {run['codec']}: {run['error'].replace('<', '&lt;')}"


def _spread(values: list[float]) -> str:
    text = f"{statistics.median(values):.1f}"
    return text if len(values) == 1 else f"{text} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
