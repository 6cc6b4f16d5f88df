"""Prove the budget from outside: each run in a memory control group whose limit is the budget, without swap."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.control_group import control_group, drop_page_cache, run_in_group, unavailable_reason  # noqa: E402

MEASURE = Path(__file__).with_name("measure.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="checkpoint directory (see benchmarks/make_checkpoint.py)")
    parser.add_argument("--limits", nargs="+", type=float, default=[2.6, 1.6, 1.2], help="GB")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all results to this file")
    arguments, passed_on = parser.parse_known_args()
    reason = unavailable_reason()
    if reason is not None:
        sys.exit(f"no memory control group here: {reason}")
    results = []
    for _ in range(arguments.repeat):
        for limit in arguments.limits:
            results.append(measure(arguments.model, round(limit * 1e9), passed_on))
            print(json.dumps(results[-1]), flush=True)
    for limit in arguments.limits:
        rates = [r["token_per_s"] for r in results if r["limit_bytes"] == round(limit * 1e9) and r["finished"]]
        if rates:
            print(f"{limit} GB: median {statistics.median(rates):.2f} token/s of {len(rates)} runs")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def measure(model: str, limit_bytes: int, options: list[str]) -> dict:
    """Run one measurement cold, in a group of `limit_bytes`, and return its figures with the group's."""
    drop_page_cache()
    with control_group(limit_bytes) as group:
        command = [sys.executable, str(MEASURE), model, "--ram-budget", str(limit_bytes), *options]
        done = run_in_group(command, group)
        figures = {
            "limit_bytes": limit_bytes,
            "finished": done.returncode == 0,
            "group_peak_bytes": group.peak_bytes(),
            "kills": group.kills(),
        }
    if done.returncode == 0:
        figures |= json.loads(done.stdout.splitlines()[-1])
        missing = figures["decode_weight_bytes"] * (1 - figures["hit_rate"])
        if missing:
            possible = figures["ssd_bytes_per_s"] / missing
            figures["share_of_ssd_speed"] = round(figures["token_per_s"] / possible, 3)
    else:
        figures["error"] = done.stderr[-2000:]
    return figures


if __name__ == "__main__":
    main()
