"""Measure allocation with first touch, and fragmentation after a recorded sequence; write them into the README here."""

from __future__ import annotations

import argparse
import itertools
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
ALLOCATORS: dict[str, tuple[list[str], dict[str, str]]] = {
    "fresh": ([], {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)}),
    "glibc": ([], {}),
    "glibc, as this library sets it": (["--tamed"], {}),
}
"""How the C library is set up, and what that is called. Setting the threshold to its default keeps it there."""
REPLAYS: dict[str, tuple[str, list[str], dict[str, str]]] = {
    "glibc": ("plain", [], {}),
    "glibc, as this library sets it": ("plain", ["--tamed"], {}),
    "no pool: one mapping per tensor": ("plain", [], {"MALLOC_MMAP_THRESHOLD_": str(64 * 2**10)}),
    "pools": ("pools", [], {}),
    "pools, compacted every second": ("pools-1s", [], {}),
    "pools, each request a session": ("pools-sessions", [], {}),
}
OURS = "pools"
_LARGE_BYTES = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each setting, in turns")
    results.add_result_options(parser, HERE, adds=False)
    arguments = parser.parse_args()
    if not arguments.report:
        content = {"environment": results.machine(), "date": results.now(), "commit": results.commit()}
        content |= {"speeds": [], "replays": []}
        for number in range(arguments.rounds):
            for name, (options, variables) in ALLOCATORS.items():
                rows = measured(["speed", *options], variables)
                content["speeds"] += [{"allocator": name, "round": number} | row for row in rows]
            for name, (what, options, variables) in REPLAYS.items():
                content["replays"].append({"memory": name, "round": number} | measured([what, *options], variables))
            print(f"round {number + 1}", flush=True)
            results.keep(content, arguments.json)
    content = json.loads(arguments.json.read_text())
    results.publish(report(content), arguments.json, HERE)


def measured(options: list[str], variables: dict[str, str]):
    """Run `measure.py` in a process of its own and return what it prints."""
    command = [sys.executable, str(HERE / "measure.py"), *options]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(options)}: {results.failure(done)}")
    return json.loads(done.stdout.splitlines()[-1])


def report(content: dict) -> Iterator[str]:
    """Give the lines of the report."""
    yield ""
    yield f"{results.machine_line(content['environment'])} {content['date']}, at {content['commit']}."
    yield ""
    yield from report_speeds(content["speeds"])
    yield from report_replays(content["replays"])


def report_speeds(rows: list[dict]) -> Iterator[str]:
    """Give the lines on allocation and first touch."""

    def us(allocator: str, pattern: str, way: str, n_bytes: int) -> float:
        key = (allocator, pattern, way, n_bytes)
        found = (row for row in rows if (row["allocator"], row["pattern"], row["way"], row["n_bytes"]) == key)
        return median([each for row in found for each in row["us_all"]])

    sizes = list(dict.fromkeys(row["n_bytes"] for row in rows))
    titles = {"one": "One tensor at a time", "request": "The tensors of a request, then all freed"}
    for pattern, title in titles.items():
        yield f"{title}, us per tensor:"
        yield ""
        yield (
            "| size | allocator of torch | `torch.empty` + touch | ours + touch | | "
            "`torch.zeros` + touch | `allocate_tensor` | |"
        )
        yield "|---|---|---|---|---|---|---|---|"
        for n_bytes, allocator in itertools.product(sizes, ALLOCATORS):
            empty, zeros, ours, zeroed = (
                us(allocator, pattern, way, n_bytes) for way in ("empty", "zeros", "ours", "ours, zeroed")
            )
            yield (
                f"| {n_bytes >> 10} KiB | {allocator} | {empty:.0f} | {ours:.0f} | {empty / ours:.2g}x | "
                f"{zeros:.0f} | {zeroed:.0f} | {zeros / zeroed:.2g}x |"
            )
        yield ""
    large = [each for each in sizes if each >= _LARGE_BYTES]
    for allocator in ALLOCATORS:
        parts = []
        for way, peer in (("ours", "empty"), ("ours, zeroed", "zeros"), ("ours, zeroed", "empty")):
            found = {
                (pattern, n_bytes): us(allocator, pattern, peer, n_bytes) / us(allocator, pattern, way, n_bytes)
                for pattern, n_bytes in itertools.product(titles, large)
            }
            (_, at), least = min(found.items(), key=lambda each: each[1])[0], min(found.values())
            name = "without zeroing" if way == "ours" else "zeroed"
            parts.append(f"{name} {least:.2g}x of `torch.{peer}` at least ({at >> 20} MiB)")
        yield f"- 1 MiB and more, {allocator}: {', '.join(parts)}."
    yield ""


def report_replays(rows: list[dict]) -> Iterator[str]:
    """Give the lines on fragmentation."""

    def figure(memory: str, name: str) -> float:
        return median([row[name] for row in rows if row["memory"] == memory])

    def share(memory: str, when: str) -> float:
        """Part of the memory held that no tensor uses."""
        return 1 - figure(memory, f"in_use_{when}_bytes") / figure(memory, f"held_{when}_bytes")

    whens = {"mean": "all the time", "between": "between requests", "end": "at the end"}
    first = rows[0]
    yield (
        f"The recorded sequence: {first['requests']} requests, {first['events']} allocations and releases; "
        f"in use {first['in_use_mean_bytes'] / 1e6:.0f} MB on average, "
        f"{first['in_use_peak_bytes'] / 1e6:.0f} MB at the peak, {first['in_use_end_bytes'] / 1e6:.0f} MB at the end."
    )
    yield ""
    shares = " | ".join(map(fragments, whens.values()))
    yield f"| allocator | held, mean MB | held, peak MB | held, at the end MB | {shares} | CPU s |"
    yield "|" + "---|" * (len(whens) + 5)
    for memory in REPLAYS:
        held = [f"{figure(memory, f'held_{when}_bytes') / 1e6:.0f}" for when in ("mean", "peak", "end")]
        parts = [f"{100 * share(memory, when):.0f} %" for when in whens]
        yield f"| {memory} | {' | '.join([*held, *parts])} | {figure(memory, 's'):.1f} |"
    yield ""
    for peer in list(REPLAYS)[:3]:
        changes = [f"{100 * (share(OURS, when) / share(peer, when) - 1):+.0f} % {text}" for when, text in whens.items()]
        yield f"- Fragmentation of the pools, against {peer}: {', '.join(changes)}."


def fragments(when: str) -> str:
    """Return the title of a column."""
    return f"unused, {when}"


def median(values: list[float]) -> float:
    """Return the middle of some figures."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


if __name__ == "__main__":
    main()
