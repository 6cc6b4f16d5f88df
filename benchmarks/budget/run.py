"""Prove the budget from outside: each run in a memory control group whose limit is the budget, without swap."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.control_group import control_group, drop_page_cache, run_in_group, unavailable_reason  # noqa: E402

MEASURE = Path(__file__).with_name("measure.py")
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- results: begin (written by run.py --publish) -->", "<!-- results: end -->"
PAGE_BYTES = 4 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="checkpoint directory (see benchmarks/make_checkpoint.py)")
    parser.add_argument("--limits", nargs="+", type=float, default=[2.6, 1.6, 1.2], help="GB")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path, help="add the results to this file")
    parser.add_argument("--publish", action="store_true", help="write the table of the --json file into the README")
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
        known = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        results = known + results
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.publish:
        publish(results)


def measure(model: str, limit_bytes: int, options: list[str]) -> dict:
    """Run one measurement cold, in a group of `limit_bytes`, and return its figures with the group's."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cache-dir", type=Path)
    given, options = parser.parse_known_args(options)
    drop_page_cache()
    with control_group(limit_bytes) as group, tempfile.TemporaryDirectory(dir=given.cache_dir) as cache_dir:
        # Nothing is kept from run to run but packed weights: every run computes.
        if given.cache_dir is not None:
            (given.cache_dir / "packed").mkdir(parents=True, exist_ok=True)
            (Path(cache_dir) / "packed").symlink_to((given.cache_dir / "packed").resolve())
        command = [sys.executable, str(MEASURE), model, "--ram-budget", str(limit_bytes), "--cache-dir", cache_dir]
        command += options
        done = run_in_group(command, group)
        figures = {
            "model": Path(model).name,
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


def publish(results: list[dict]) -> None:
    """Write the table of all results into the README, between its markers."""
    lines = [
        "| shape | limit | peak of the group | peak resident set | first token | token/s | hit rate (Belady) "
        "| SSD reads per token (missing bytes) | SSD bandwidth, probed | share of it | SSD busy |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, limit in sorted({(r["model"], r["limit_bytes"]) for r in results}, key=lambda key: (key[0], -key[1])):
        runs = [r for r in results if (r["model"], r["limit_bytes"]) == (model, limit) and r["finished"]]
        if not runs:
            lines.append(f"| {model} | {limit / 1e9:g} GB | did not finish |" + " |" * 8)
            continue

        def spread(name: str, scale: float = 1, digits: int = 2, runs: list[dict] = runs) -> str:
            values = sorted(r[name] / scale for r in runs if r.get(name) is not None)
            if not values:
                return "-"
            middle = f"{statistics.median(values):.{digits}f}"
            return f"{middle} ({values[0]:.{digits}f} to {values[-1]:.{digits}f})" if len(values) > 1 else middle

        median = {name: statistics.median(r[name] for r in runs) for name in ("hit_rate", "decode_weight_bytes")}
        pages = statistics.median(r["frames_limit_bytes"] for r in runs) / PAGE_BYTES
        belady = min(1.0, (pages - 1) / (median["decode_weight_bytes"] / PAGE_BYTES - 1))
        missing = median["decode_weight_bytes"] * (1 - median["hit_rate"])
        cells = (
            model,
            f"{limit / 1e9:g} GB",
            f"{spread('group_peak_bytes', 1e9, 3)} GB",
            f"{spread('rss_peak_bytes', 1e9)} GB",
            f"{spread('first_token_s', 1, 1)} s",
            f"**{spread('token_per_s')}**",
            f"{100 * median['hit_rate']:.1f} % ({100 * belady:.1f} %)",
            f"{spread('bytes_read_per_token', 1e9, 3)} GB ({missing / 1e9:.3f})",
            f"{spread('ssd_bytes_per_s', 1e9)} GB/s",
            f"{spread('share_of_ssd_speed', 0.01, 0)} %",
            f"{spread('reading_share', 0.01, 0)} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    head, _, rest = README.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    README.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{tail}")


if __name__ == "__main__":
    main()
