"""Write the tables into README.md, between its markers, and the plots beside it, from the JSON files of `run.py`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.peers.layout import HERE, ISAS, PEERS, SHAPES, WORKS  # noqa: E402

BEGIN, END = "<!-- results: begin (written by report.py) -->", "<!-- results: end -->"
TITLES = {
    "decode-32": "Decode, token/s",
    "prefill-256": "Prefill of 256 tokens, token/s",
    "prefill-1024": "Prefill of 1024 tokens, token/s",
    "image-448": "Image of 448x448 and 32 tokens to first token, s (less is better)",
    "image-1024": "Image of 1024x1024 and 32 tokens to first token, s (less is better)",
}
PLOTTED = ("decode-32", "prefill-256")
ISA_TITLES = {"native": "native instructions", "avx2": "held to AVX2"}

Group = dict[tuple[str, str, str], list[dict]]
"""Runs by work, peer and limit."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="print the tables of this file, and write nothing")
    arguments = parser.parse_args()
    if arguments.json is not None:
        print("\n".join(report(json.loads(arguments.json.read_text()), plots={})))
        return
    lines: list[str] = []
    for path in sorted(HERE.glob("results-*.json")):
        content = json.loads(path.read_text())
        lines += report(content, draw(content["runs"], HERE, path.stem.removeprefix("results-")))
    readme = HERE / "README.md"
    text = readme.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text("\n".join([before + BEGIN, *lines, END]) + after)


def report(content: dict, plots: dict[tuple[str, str], str]) -> Iterator[str]:
    """Give the lines of the report of one machine."""
    cpu = content["environment"]["cpu"]
    yield from _machine(content)
    for shape, isa, group in _sections(content["runs"]):
        yield from ["", f"## {shape}, {ISA_TITLES[isa]} ({cpu})"]
        if (shape, isa) in plots:
            yield from ["", f"![token/s against the limit]({plots[shape, isa]})"]
        for work in WORKS:
            if any(key[0] == work for key in group):
                yield from ["", f"**{TITLES[work]}**", "", *_table(group, work)]
        yield from _start_table(group)
        yield from _share_table(group, content["disk"])
    if any("value" in run and is_cut_short(run) for run in content["runs"]):
        yield from ["", "† Cut short by the time limit: fewer tokens than asked for, or the first, cold pass alone."]
    yield from _failures(content["runs"])


def _machine(content: dict) -> Iterator[str]:
    here, runs = content["environment"], content["runs"]
    dates = sorted(run["date"] for run in runs)
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    speeds = [probe["read_bytes_per_s"] / 1e9 for probe in content["disk"]]
    commits = sorted({run["commit"] for run in runs if PEERS[run["peer"]].worker == "ours"})
    warm = sum(not run["cold"] for run in runs if "cold" in run)
    yield from ["", f"# On {here['cpu']}", ""]
    yield f"Machine: {here['cpu']}, {here['cores']} cores, {here['ram_gb']} GB, Linux {here['kernel']}."
    yield f"Threads of every peer: {here['cores']}. Python {here['python']}, {versions}."
    yield f"Runs: {len(runs)}, from {dates[0]} to {dates[-1]}; this project at {', '.join(commits) or 'no commit'}."
    if speeds:
        yield (
            f"Direct reads of 512 MB between the runs: median {statistics.median(speeds):.2f} GB/s "
            f"({min(speeds):.2f} to {max(speeds):.2f}, {len(speeds)} probes)."
        )
    if warm:
        yield f"The page cache could not be dropped before {warm} of the runs."


def _sections(runs: list[dict]) -> Iterator[tuple[str, str, Group]]:
    for shape in SHAPES:
        for isa in ISAS:
            group: Group = defaultdict(list)
            for run in runs:
                if (run["shape"], run["isa"]) == (shape, isa):
                    group[run["work"], run["peer"], run["limit"]].append(run)
            if group:
                yield shape, isa, group


def _limits(group: Group) -> list[str]:
    """Return the limits of a section, the widest first."""
    return sorted({limit for _, _, limit in group}, key=lambda x: -_gigabytes(x))


def _gigabytes(limit: str) -> float:
    return float("inf") if limit == "none" else float(limit)


def _heading(limit: str) -> str:
    return "no limit" if limit == "none" else f"{limit} GB"


def _table(group: Group, work: str) -> Iterator[str]:
    limits = _limits(group)
    yield "| | " + " | ".join(map(_heading, limits)) + " |"
    yield "|---" * (len(limits) + 1) + "|"
    for peer in PEERS:
        if any((work, peer, limit) in group for limit in limits):
            cells = [_cell(group.get((work, peer, limit), [])) for limit in limits]
            yield f"| {peer} | " + " | ".join(cells) + " |"


def _cell(runs: list[dict]) -> str:
    """Return median and spread of a cell's runs, or how they failed."""
    values = [run["value"] for run in runs if "value" in run]
    if not values:
        return runs[-1]["failure"] if runs else ""
    text = _number(statistics.median(values))
    if len(values) > 1:
        text += f" ({_number(min(values))} to {_number(max(values))})"
    if any(is_cut_short(run) for run in runs if "value" in run):
        text += " †"
    failed = len(runs) - len(values)
    return f"{text}; {failed} of {len(runs)} failed: {runs[-1].get('failure', '')}" if failed else text


def is_cut_short(run: dict) -> bool:
    """Return whether the clock left a run fewer tokens than asked for, or its first pass alone."""
    if run["work"].startswith("decode"):
        return run["counted_tokens"] < int(run["work"].split("-")[1])
    return len(run["first_token_s"]) < 2


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _start_table(group: Group) -> Iterator[str]:
    """Give what the runs of decode say besides: the way to the first token, memory, reads."""
    limits = _limits(group)
    rows = []
    for peer in PEERS:
        for limit in limits:
            runs = [run for run in group.get(("decode-32", peer, limit), []) if "value" in run]
            if runs:
                middle = {
                    key: statistics.median(run[key] for run in runs)
                    for key in ("start_to_first_token_s", "peak_rss_bytes", "read_bytes_per_token")
                }
                rows.append(
                    f"| {peer} | {_heading(limit)} | {_number(middle['start_to_first_token_s'])} | "
                    f"{middle['peak_rss_bytes'] / 1e9:.2f} | {middle['read_bytes_per_token'] / 1e9:.3f} |"
                )
    if rows:
        yield ""
        yield (
            "**Start of the process to first token (prompt of 32 tokens), memory and disk reads while decoding** "
            "(medians)"
        )
        yield ""
        yield "| | limit | start to first token, s | peak resident, GB | disk reads per token, GB |"
        yield "|---|---|---|---|---|"
        yield from rows


def _share_table(group: Group, probes: list[dict]) -> Iterator[str]:
    """Give how much of what memory and disk allow our decoding reaches at each limit."""
    rows = []
    for peer in (name for name in PEERS if PEERS[name].worker == "ours"):
        runs = {limit: group.get(("decode-32", peer, limit), []) for limit in _limits(group)}
        in_memory = [run["value"] for run in runs.get("none", []) if "value" in run]
        for limit, of_limit in runs.items():
            shares = [
                run["value"] / min(statistics.median(in_memory), _disk_bytes_per_s(run, probes) / missing)
                for run in of_limit
                if in_memory and "value" in run and (missing := run["read_bytes_per_token"]) > 0
            ]
            if shares and limit != "none":
                spread = f" ({100 * min(shares):.0f} to {100 * max(shares):.0f})" if len(shares) > 1 else ""
                rows.append(f"| {peer} | {_heading(limit)} | {100 * statistics.median(shares):.0f} %{spread} |")
    if rows:
        yield ""
        yield (
            "**Decoding speed, share of the lower of its speed without a limit and the bound set by the disk** "
            "(the direct read before the run, over the bytes read per token; "
            "random reads, so sequential ones can exceed 100 %)"
        )
        yield from ["", "| | limit | share |", "|---|---|---|", *rows]


def _disk_bytes_per_s(run: dict, probes: list[dict]) -> float:
    """Return what the last probe before a run found."""
    earlier = [probe for probe in probes if probe["date"] <= run["date"]]
    return (earlier or probes)[-1 if earlier else 0]["read_bytes_per_s"]


def _failures(runs: list[dict]) -> Iterator[str]:
    """Give each different failure once, with where it happened."""
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for run in runs:
        if "error" in run:
            text = " ".join(run["error"].split())
            places[run["peer"], text].append(f"{run['shape']} {run['isa']} {_heading(run['limit'])} {run['work']}")
    if places:
        yield from ["", "**How runs failed**", ""]
    for (peer, text), where in places.items():
        yield f"- **{peer}**: {text.replace('<', '&lt;')} ({'; '.join(dict.fromkeys(where))})"


def draw(runs: list[dict], directory: Path, machine: str) -> dict[tuple[str, str], str]:
    """Draw token/s against the limit, where there are several limits; return the files' names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {}
    for shape, isa, group in _sections(runs):
        limits = _limits(group)
        if len(limits) < 2:
            continue
        figure, axes = plt.subplots(1, len(PLOTTED), figsize=(12, 4.5), constrained_layout=True)
        for axis, work in zip(axes, PLOTTED, strict=True):
            for number, peer in enumerate(PEERS):
                cells = [group.get((work, peer, limit), []) for limit in limits]
                values = [[run["value"] for run in cell if "value" in run] for cell in cells]
                x = [place for place, found in enumerate(values) if found]
                if not x:
                    continue
                y = [statistics.median(values[place]) for place in x]
                below = [middle - min(values[place]) for place, middle in zip(x, y, strict=True)]
                above = [max(values[place]) - middle for place, middle in zip(x, y, strict=True)]
                is_ours = PEERS[peer].worker == "ours"
                axis.errorbar(
                    x,
                    y,
                    yerr=[below, above],
                    label=peer,
                    color=f"C{number}",
                    marker="o" if is_ours else "s",
                    linewidth=2.5 if is_ours else 1.2,
                    capsize=3,
                )
            axis.set(title=TITLES[work], xlabel="memory limit of the process", ylabel="token/s", yscale="log")
            axis.set_xticks(range(len(limits)), map(_heading, limits))
            axis.grid(True, which="both", alpha=0.25)
        shown = [axis.get_legend_handles_labels() for axis in axes]
        by_label = {label: handle for handles, labels in shown for handle, label in zip(handles, labels, strict=True)}
        figure.legend(by_label.values(), by_label, loc="outside right upper", frameon=False)
        figure.suptitle(f"Qwen3-VL {shape} shape, {ISA_TITLES[isa]}; no point: the run failed")
        names[shape, isa] = f"limits-{shape}-{isa}-{machine}.png"
        # Without a date inside, the same figures give the same file.
        figure.savefig(directory / names[shape, isa], dpi=110, metadata={"Software": None})
        plt.close(figure)
    return names


if __name__ == "__main__":
    main()
