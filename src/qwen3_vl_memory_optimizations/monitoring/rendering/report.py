"""`write_report`: a recorded run as one self-contained HTML file with SVG plots."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...errors import StorageError
from ..dashboard.files import STATIC
from ..recording.run_file import RunFile
from ..recording.run_state import RunState
from .charts import CHARTS, Sample, figure_at, lines_of
from .formatting import NOT_MEASURED, show
from .svg import chart_as_svg

_MOST_POINTS = 400
_SECTIONS = {
    "timeline": "Timeline",
    "allocation": "Allocation",
    "cache": "Cache",
    "compression": "Compression",
    "lives": "Lifetimes",
}
_SUMMARY = (
    ("Tokens per second, first tokens excluded", "responses.tokens_per_s", "plain"),
    ("Mean time to first token", "responses.first_token_s", "s"),
    ("Responses", "responses.count", "count"),
    ("Generated tokens", "responses.tokens", "count"),
    ("CPU seconds per token", "responses.cpu_s_per_token", "s"),
    ("Peak process memory", "process.peak_rss_bytes", "bytes"),
    ("Process memory budget", "budget.ram_budget_bytes", "bytes"),
    ("Tensor memory budget", "budget.tensor_budget_bytes", "bytes"),
    ("Peak page frames", "budget.frames_peak_bytes", "bytes"),
    ("SSD reads", "paging.bytes_read", "bytes"),
    ("Swap writes", "paging.bytes_written", "bytes"),
    ("Weight hit rate", "paging.hit_rate", "share"),
    ("SSD stall time", "paging.stall_s", "s"),
)
_METRIC_UNITS = {
    "allocation_speedup": "times",
    "compression_ratio": "times",
    "swap_operations_count": "count",
    "tier_migration_rate": "/s",
}


def write_report(run: Path, output: Path) -> Path:
    """Write the report of a recorded run and return its path.

    Raises:
        ConfigurationError: the run cannot be read.
        StorageError: the report cannot be written; an existing file is kept.
    """
    recorded = RunFile(run, keep_samples=True)
    text = report_html(recorded.header, recorded.state)
    partial = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{output}: the report cannot be written: {error.strerror}", path=output) from error
    return output


def report_html(header: Mapping[str, Any], state: RunState) -> str:
    """Return the report of a run."""
    title = " · ".join(str(each) for each in ("qwen3vl-mem", header.get("command"), header.get("model")) if each)
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(header["started_s"]))
    how = "" if state.ended else " The run had not ended, or its process was killed."
    samples = _every_nth(state.samples)
    sections = [_section("Summary", _table(("figure", "value"), _summary(state.snapshot)))]
    sections.append(_section("Alerts", _table(("alert", "state", "value", "limit"), _alerts(state.snapshot))))
    for key, name in _SECTIONS.items():
        charts = [chart_as_svg(chart, lines_of(chart, samples)) for chart in CHARTS if chart.section == key]
        tables = _tables(key, state)
        sections.append(_section(name, f'<div class="charts">{"".join(charts)}</div>{tables}'))
    sections.append(_section("Metrics", _table(("metric", "value"), _metrics(state.snapshot))))
    sections.append(_section("Settings and hardware", _table(("", ""), _facts(header))))
    style = (STATIC / "report.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{style}</style></head><body><h1>{escape(title)}</h1>"
        f'<p class="note">Started {started}, ran {state.t:.1f} s, {len(state.samples)} samples; plots show at most '
        f"{_MOST_POINTS} points.{how}</p>{''.join(sections)}</body></html>\n"
    )


def _every_nth(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Return evenly spaced samples including the last. Rates between them are exact."""
    step = -(-len(samples) // _MOST_POINTS) or 1
    return samples[::-1][::step][::-1]


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _table(headings: Sequence[str], rows: Iterator[Sequence[str]], nothing: str = NOT_MEASURED) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    body = body or f'<tr><td colspan="{len(headings)}" class="absent">{escape(nothing)}</td></tr>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _summary(snapshot: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, path, unit in _SUMMARY:
        value = figure_at(snapshot, path.split("."))
        if value is not None or not path.startswith("budget."):
            yield name, show(value, unit)


def _alerts(snapshot: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for row in snapshot.get("alerts", ()):
        unit = "s" if row["name"] == "response_time" else "share"
        limit = "not set" if row["limit"] is None else show(row["limit"], unit)
        yield row["name"].replace("_", " "), "active" if row["active"] else "clear", show(row["value"], unit), limit


def _tables(section: str, state: RunState) -> str:
    snapshot = state.snapshot
    if section == "timeline":
        events = ((f"{event['t']:.1f} s", event["event"], event["text"]) for event in state.events)
        return f"<details><summary>Events</summary>{_table(('at', 'event', ''), events, 'none')}</details>"
    if section == "allocation":
        rows = (
            (row["tier"], row["kind"].replace("_", " "), row["codec"], str(row["tensors"]), show(row["bytes"], "bytes"))
            for row in snapshot.get("memory_map", ())
        )
        return "<h3>Data placement at the end</h3>" + _table(
            ("tier", "kind", "codec", "tensors", "bytes"), rows, "none"
        )
    if section == "compression":
        kinds = (
            (
                name.replace("_", " "),
                show(row["logical_bytes"], "bytes"),
                show(row["encoded_bytes"], "bytes"),
                show(row["compression_ratio"], "times"),
                show(row["relative_error"], "share"),
                show(row["encode_bytes_per_s"], "bytes/s"),
                show(row.get("decode_bytes_per_s"), "bytes/s"),
            )
            for name, row in snapshot.get("kinds", {}).items()
        )
        headings = ("kind", "original", "encoded", "ratio", "relative error", "encoding speed", "decoding speed")
        return "<h3>By kind</h3>" + _table(headings, kinds, "none")
    return ""


def _metrics(snapshot: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, value in snapshot.get("metrics", {}).items():
        yield name.replace("_", " "), show(value, _METRIC_UNITS.get(name, "share"))


def _facts(value: Mapping[str, Any], name: str = "") -> Iterator[Sequence[str]]:
    for key, part in value.items():
        label = f"{name}{key.replace('_', ' ')}"
        if isinstance(part, Mapping):
            yield from _facts(part, f"{label}: ")
        elif isinstance(part, list | tuple):
            yield label, ", ".join(str(each) for each in part)
        else:
            yield label, "none" if part is None else str(part)
