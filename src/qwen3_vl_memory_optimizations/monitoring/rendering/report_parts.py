"""The parts of reports: verdict, summary, alerts, tables and settings of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ..recording.run_state import RunState
from .charts import Sample, figure_at
from .document import table
from .formatting import NOT_MEASURED, breach_text, show

MOST_POINTS = 400
SECTIONS = {
    "overview": "Speed and memory",
    "timeline": "Timeline",
    "allocation": "Allocation",
    "cache": "Cache",
    "compression": "Compression",
    "lives": "Lifetimes",
}
SUMMARY = (
    ("Decoding speed, first tokens excluded", "responses.tokens_per_s", "tokens/s"),
    ("Mean time to first token", "responses.first_token_s", "s"),
    ("Decoding spent waiting for the SSD", "verdict.waiting_share", "share"),
    ("SSD reads per token", "verdict.read_bytes_per_token", "bytes"),
    ("SSD read rate while reading", "verdict.disk_bytes_per_s", "bytes/s"),
    ("Responses", "responses.count", "count"),
    ("Generated tokens", "responses.tokens", "count"),
    ("CPU seconds per token", "responses.cpu_s_per_token", "s"),
    ("Peak process memory", "process.peak_rss_bytes", "bytes"),
    ("Peak since the model began", "budget.peak_bytes", "bytes"),
    ("Process memory budget", "budget.ram_budget_bytes", "bytes"),
    ("Tensor memory budget", "budget.tensor_budget_bytes", "bytes"),
    ("Peak page frames", "budget.frames_peak_bytes", "bytes"),
    ("SSD reads", "paging.bytes_read", "bytes"),
    ("Swap writes", "paging.bytes_written", "bytes"),
    ("Weight hit rate", "paging.hit_rate", "share"),
    ("SSD stall time", "paging.stall_s", "s"),
    ("Compression ratio", "metrics.compression_ratio", "times"),
)
"""Label, path in the snapshot, unit."""
METRIC_UNITS = {
    "allocation_speedup": "times",
    "compression_ratio": "times",
    "swap_operations_count": "count",
    "tier_migration_rate": "/s",
}


def title_of(header: Mapping[str, Any]) -> str:
    """Return the command and model of a run."""
    return " · ".join(str(each) for each in (header.get("command"), header.get("model")) if each)


def duration_of(header: Mapping[str, Any], state: RunState) -> str:
    """Return when a run started, how long it took, and whether it ended."""
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(header["started_s"]))
    how = "" if state.ended else " The run had not ended, or its process was killed."
    return f"Started {started}, ran {state.t:.1f} s, {len(state.samples)} samples.{how}"


def verdict_text(snapshot: Mapping[str, Any]) -> str:
    """Return the verdict of a run; runs recorded before there was one have none."""
    return str((snapshot.get("verdict") or {}).get("text") or f"What limits decoding: {NOT_MEASURED}.")


def verdict_html(snapshot: Mapping[str, Any]) -> str:
    """Return the verdict as a paragraph."""
    return f'<p class="verdict">{escape(verdict_text(snapshot))}</p>'


def summary_rows(snapshot: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Yield the labels and figures of the summary; budgets that are not set are omitted."""
    for name, path, unit in SUMMARY:
        value = figure_at(snapshot, path.split("."))
        if value is not None or not path.startswith("budget."):
            yield name, show(value, unit)


def alert_rows(snapshot: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Yield name, state, value and limit of each alert."""
    for row in snapshot.get("alerts", ()):
        unit = "s" if row["name"] == "response_time" else "share"
        limit = "not set" if row["limit"] is None else show(row["limit"], unit)
        yield row["name"].replace("_", " "), "active" if row["active"] else "clear", show(row["value"], unit), limit


def breach_html(snapshot: Mapping[str, Any]) -> str:
    """Return a breach of the budget as a paragraph; empty if there was none."""
    budget = snapshot.get("budget", {})
    peak_bytes = budget.get("peak_bytes")  # absent from runs of earlier versions
    text = None if peak_bytes is None else breach_text(peak_bytes, budget["ram_budget_bytes"])
    return "" if text is None else f'<p class="breach">{escape(text)}</p>'


def metric_rows(snapshot: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Yield the figures of section 7.1."""
    for name, value in snapshot.get("metrics", {}).items():
        yield name.replace("_", " "), show(value, METRIC_UNITS.get(name, "share"))


def tables_of(section: str, state: RunState) -> str:
    """Return the tables of a section."""
    snapshot = state.snapshot
    if section == "timeline":
        events = ((f"{event['t']:.1f} s", event["event"], event["text"]) for event in state.events)
        return f"<h3>Events</h3>{table(('at', 'event', ''), events, 'none')}"
    if section == "allocation":
        rows = (
            (row["tier"], row["kind"].replace("_", " "), row["codec"], str(row["tensors"]), show(row["bytes"], "bytes"))
            for row in snapshot.get("memory_map", ())
        )
        return "<h3>Data placement at the end</h3>" + table(("tier", "kind", "codec", "tensors", "bytes"), rows, "none")
    if section == "compression":
        kinds = (
            (
                name.replace("_", " "),
                show(row.get("original_bytes", row["logical_bytes"]), "bytes"),
                show(row["encoded_bytes"], "bytes"),
                show(row["compression_ratio"], "times"),
                show(row["relative_error"], "share"),
                show(row["encode_bytes_per_s"], "bytes/s"),
                show(row.get("decode_bytes_per_s"), "bytes/s"),
            )
            for name, row in snapshot.get("kinds", {}).items()
        )
        headings = ("kind", "original", "encoded", "ratio", "relative error", "encoding speed", "decoding speed")
        return "<h3>By kind</h3>" + table(headings, kinds, "none")
    return ""


def facts(value: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the settings and the hardware of a run's header as labels and texts."""
    for key, part in value.items():
        label = f"{name}{key.replace('_', ' ')}"
        if isinstance(part, Mapping):
            yield from facts(part, f"{label}: ")
        elif isinstance(part, list | tuple):
            yield label, ", ".join(str(each) for each in part)
        else:
            yield label, "none" if part is None else _fact(key, part)


def every_nth(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Return at most `MOST_POINTS` evenly spaced samples including the last. Rates between them are exact."""
    step = -(-len(samples) // MOST_POINTS) or 1
    return samples[::-1][::step][::-1]


def _fact(key: str, value: Any) -> str:
    is_size = isinstance(value, int | float) and not isinstance(value, bool)
    if is_size and (key.endswith(("_bytes", "_size", "_budget")) or key in ("ram_budget", "memory_size")):
        return show(value, "bytes")
    return str(value)
