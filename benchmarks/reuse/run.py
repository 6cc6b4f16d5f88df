"""Measure what reuse saves: time to the first token of a new image, of one seen before, and after a restart.

Results go to one JSON file; then the table in README.md is written from it, between its markers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks import results  # noqa: E402
from benchmarks.peers.layout import AVX2_ENVIRONMENT  # noqa: E402
from benchmarks.reuse.measure import MODES  # noqa: E402

HERE = Path(__file__).parent
KINDS = ("new", "seen", "seen before the restart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint directory, packed already")
    parser.add_argument("--cache-dir", type=Path, required=True, help="where packed checkpoints lie")
    parser.add_argument("--limits", nargs="+", default=["none", "1.6"], metavar="GB", help="`none` or GB")
    parser.add_argument("--processors", nargs="+", choices=("native", "avx2"), default=["native"])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--image-px", type=int, default=1024)
    parser.add_argument("--images", type=int, default=3, help="a process")
    results.add_result_options(parser, HERE)
    arguments = parser.parse_args()
    if not arguments.report:
        measure_all(arguments)
    results.publish(report(json.loads(arguments.json.read_text())), arguments.json, HERE)


def measure_all(arguments: argparse.Namespace) -> None:
    """Do all runs: for each setting a process, and another on what it left."""
    results.require_groups(arguments.limits)
    content = results.load_kept(arguments, {"runs": []})
    content["environment"] = results.machine() | {"model": Path(arguments.model).name}
    for processor in arguments.processors:
        for limit in arguments.limits:
            for mode in arguments.modes:
                # Of its own, so that nothing is known; on the same disk, and with the packed checkpoints.
                directory = Path(tempfile.mkdtemp(prefix="reuse-", dir=arguments.cache_dir.parent))
                try:
                    (directory / "packed").mkdir()
                    for packed in (arguments.cache_dir / "packed").iterdir():
                        if packed.is_dir():
                            (directory / "packed" / packed.name).symlink_to(packed.resolve())
                    for phase in ("first",) if mode == "off" else ("first", "restart"):
                        row = {"processor": processor, "limit": limit, "mode": mode, "phase": phase}
                        row |= {"image_px": arguments.image_px, "date": results.now(), "commit": results.commit()}
                        content["runs"].append(row | run(arguments, processor, limit, mode, phase, directory))
                        print(json.dumps(content["runs"][-1]), flush=True)
                        results.keep(content, arguments.json)
                finally:
                    shutil.rmtree(directory)


def run(arguments: argparse.Namespace, processor: str, limit: str, mode: str, phase: str, directory: Path) -> dict:
    """Run one process and return its figures, or how it failed."""
    command = [sys.executable, str(HERE / "measure.py"), arguments.model, "--cache-dir", str(directory)]
    command += ["--mode", mode, "--phase", phase, "--image-px", str(arguments.image_px)]
    command += ["--images", str(arguments.images)]
    child = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    return results.run_limited(command, limit, child | (AVX2_ENVIRONMENT if processor == "avx2" else {}))


def report(content: dict) -> Iterator[str]:
    """Give the lines of the report."""
    here, rows = content["environment"], content["runs"]
    dates = sorted(row["date"] for row in rows)
    yield ""
    yield f"{results.machine_line(here)} Model: {here['model']}, packed, codec `auto`."
    yield f"From {dates[0]} to {dates[-1]}, at {', '.join(sorted({row['commit'] for row in rows}))}."
    yield ""
    yield (
        "| processor | limit | kept | new image, s | until `generate` returns | seen image, s | speed-up "
        "| seen before the restart, s | speed-up |"
    )
    yield "|" + "---|" * 9
    for processor, limit, mode in dict.fromkeys((row["processor"], row["limit"], row["mode"]) for row in rows):
        mine = [row for row in rows if (row["processor"], row["limit"], row["mode"]) == (processor, limit, mode)]
        new, seen, after = (_median(mine, kind) for kind in KINDS)
        off = [row for row in rows if (row["processor"], row["limit"], row["mode"]) == (processor, limit, "off")]
        base = _median(off, "new") or new  # what it takes without a cache
        limited = limit if limit == "none" else f"{limit} GB"
        cells = [processor, limited, mode, _seconds(new), _seconds(_median(mine, "new", "whole_s"))]
        for seconds in (seen, after):
            cells += [_seconds(seconds), "-" if base is None or seconds is None else f"**{base / seconds:.1f}**"]
        yield f"| {' | '.join(cells)} |"
    yield ""
    for row in rows:
        if "error" in row:
            yield f"{row['processor']}, {row['limit']}, {row['mode']}: {row['error'].replace('<', '&lt;')}"
    disturbed = sum(not each["undisturbed"] for row in rows for each in row.get("runs", []))
    if disturbed:
        yield f"{disturbed} measurements during which the machine stalled are excluded."


def _median(rows: list[dict], kind: str, figure: str = "s") -> float | None:
    found = [
        each[figure] for row in rows for each in row.get("runs", []) if each["kind"] == kind and each["undisturbed"]
    ]
    return statistics.median(found) if found else None


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
