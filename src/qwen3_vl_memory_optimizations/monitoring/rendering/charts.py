"""Chart definitions of a run for both page and report: figures, units and styles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ANY = "*"
"""In a figure's path: matches every key of a table; the key becomes part of the label."""

RATE_S = 2.0
"""Least span of a rate; over a shorter one, such as that before the last sample of a run, one event is a spike."""

Point = tuple[float, float | None]
Sample = tuple[float, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Series:
    """Lines of a chart.

    Attributes:
        label: label of the line; with `ANY` in the path, the key replaces `{}`.
        path: keys of the snapshot, joined by dots.
        rate: plot the growth per second over at least `RATE_S` instead of the figure.
        optional: omit the line if the figure never appears, such as a limit that is not set.
    """

    label: str
    path: str
    rate: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart over time.

    Attributes:
        section: section of the page.
        unit: `bytes`, `bytes/s`, `share`, `/s`, `times`, `cores` or `count`.
        note: explanation of the figures.
        style: `line`, `bars` or `stack`.
    """

    key: str
    section: str
    title: str
    unit: str
    note: str
    series: tuple[Series, ...]
    style: str = "line"


CHARTS = (
    Chart(
        "phases",
        "timeline",
        "Phases",
        "share",
        "Share of time in the vision tower, prefill and decode.",
        tuple(Series(name, f"phases.seconds.{name}", rate=True) for name in ("vision", "prefill", "decode")),
        "stack",
    ),
    Chart(
        "stalls",
        "timeline",
        "Stalls",
        "share",
        "Share of time stalled on page reads from the SSD.",
        (Series("stalled", "paging.stall_s", rate=True),),
        "bars",
    ),
    Chart(
        "migrations",
        "timeline",
        "Migrations",
        "/s",
        "Pages moved between memory and SSD.",
        (
            Series("read from SSD", "paging.page_reads", rate=True),
            Series("evicted without a write", "paging.evictions", rate=True),
            Series("swapped out", "paging.swap_writes", rate=True),
            Series("swapped in", "paging.swap_reads", rate=True),
        ),
    ),
    Chart(
        "traffic",
        "timeline",
        "SSD traffic",
        "bytes/s",
        "Reads of the checkpoint and swap file, and swap writes.",
        (Series("read", "paging.bytes_read", rate=True), Series("written", "paging.bytes_written", rate=True)),
    ),
    Chart(
        "tokens",
        "overview",
        "Speed",
        "/s",
        "Forward passes (one per decode step) and generated tokens, over two seconds.",
        (Series("forward passes", "paging.passes", rate=True), Series("tokens", "responses.tokens", rate=True)),
    ),
    Chart(
        "cpu",
        "timeline",
        "CPU",
        "cores",
        "CPU cores in use by the process.",
        (Series("in use", "process.cpu_s", rate=True),),
    ),
    Chart(
        "process",
        "overview",
        "Process memory",
        "bytes",
        "Resident memory, libraries included.",
        (Series("resident", "process.rss_bytes"), Series("RAM budget", "budget.ram_budget_bytes", optional=True)),
    ),
    Chart(
        "frames",
        "allocation",
        "Page frames",
        "bytes",
        "Memory of managed tensors, and the limit set by the budget.",
        (
            Series("used", "budget.frames_used_bytes"),
            Series("free, kept for reuse", "budget.frames_free_bytes"),
            Series("limit", "budget.frames_limit_bytes", optional=True),
        ),
    ),
    Chart(
        "pools",
        "allocation",
        "Pool utilization",
        "share",
        "Granted share of each runtime-tensor pool's address space.",
        (Series("{}", "pools.*.utilization"),),
    ),
    Chart(
        "pool_bytes",
        "allocation",
        "Pool bytes",
        "bytes",
        "Granted bytes per pool.",
        (Series("{}", "pools.*.used_bytes"),),
    ),
    Chart(
        "fragmentation",
        "allocation",
        "Fragmentation",
        "share",
        "External fragmentation per pool: 1 - largest hole / free bytes.",
        (Series("{}", "pools.*.external_fragmentation"),),
    ),
    Chart(
        "hit_rate",
        "cache",
        "Hit rate",
        "share",
        "Result cache by level; for weights, share of bytes already in memory.",
        (
            Series("all levels", "cache.hit_rate"),
            Series("level {}", "cache.levels.*.hit_rate"),
            Series("weights", "paging.hit_rate"),
        ),
    ),
    Chart(
        "prediction",
        "cache",
        "Prediction efficiency",
        "share",
        "Share of prefetched pages, prefetched tensors and admitted entries that were used later.",
        (
            Series("prefetched pages", "prediction.prefetch_accuracy"),
            Series("prefetched tensors", "prediction.tier_effectiveness"),
            Series("admitted to {}", "cache.levels.*.prediction_efficiency"),
            Series("predicted lifetimes", "metrics.predicted_lifetime_accuracy"),
        ),
    ),
    Chart(
        "level_migrations",
        "cache",
        "Migrations between levels",
        "count",
        "Cached results moved from another level, and prefetched tensors, in total.",
        (Series("to {}", "cache.levels.*.migrations"), Series("prefetched tensors", "migrations.tensors")),
    ),
    Chart(
        "ratio",
        "compression",
        "Compression ratio",
        "times",
        "Original / encoded bytes.",
        (Series("{}", "kinds.*.compression_ratio"),),
    ),
    Chart(
        "error",
        "compression",
        "Relative error",
        "share",
        "Mean over encoded tensors, weighted by bytes.",
        (Series("{}", "kinds.*.relative_error"),),
    ),
    Chart(
        "encode_speed",
        "compression",
        "Encoding speed",
        "bytes/s",
        "Original bytes per second, measured during encoding.",
        (Series("{}", "kinds.*.encode_bytes_per_s"),),
    ),
    Chart(
        "decode_speed",
        "compression",
        "Decoding speed",
        "bytes/s",
        "Bytes per second, from samples decoded after encoding. Matrix products read encoded weights directly.",
        (Series("{}", "kinds.*.decode_bytes_per_s"),),
    ),
    Chart(
        "lives",
        "lives",
        "Live runtime tensors",
        "count",
        "All tensors except weights, and cached results.",
        (Series("{}", "life_cycles.*.alive"),),
    ),
    Chart(
        "births",
        "lives",
        "Created tensors",
        "/s",
        "Runtime tensors created per second.",
        (Series("{}", "life_cycles.*.births", rate=True),),
    ),
)
"""All charts in page order."""


def charts_as_rows() -> list[dict[str, Any]]:
    """Return `CHARTS` ready for JSON."""
    return [asdict(chart) for chart in CHARTS]


def lines_of(chart: Chart, samples: Sequence[Sample]) -> dict[str, list[Point]]:
    """Return the points of each line of a chart by label; missing figures are `None`."""
    lines: dict[str, list[Point]] = {}
    for series in chart.series:
        path = series.path.split(".")
        labels: dict[tuple[str, ...], None] = {}
        for _, snapshot in samples:
            for keys, _ in _found(snapshot, path):
                labels.setdefault(keys)
        for keys in labels:
            filled = iter(keys)
            exact = [next(filled) if part == ANY else part for part in path]
            points = [(t, figure_at(snapshot, exact)) for t, snapshot in samples]
            if not series.optional or any(value is not None for _, value in points):
                lines[series.label.format(*keys)] = _rates(points) if series.rate else points
    return lines


def figure_at(snapshot: Mapping[str, Any], path: Sequence[str]) -> float | None:
    """Return a figure of a snapshot, or `None` if missing."""
    value: Any = snapshot
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _found(value: Any, path: Sequence[str], keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the figures at a path with the keys matched by each `ANY`."""
    if not path:
        yield keys, value
    elif isinstance(value, Mapping):
        for key in list(value) if path[0] == ANY else [path[0]] if path[0] in value else []:
            yield from _found(value[key], path[1:], (*keys, key) if path[0] == ANY else keys)


def _rates(points: list[Point]) -> list[Point]:
    """Return growth per second over the latest span of at least two seconds, or since the first point."""
    rates: list[Point] = []
    start = 0
    for t, value in points[1:]:
        while points[start + 1][0] <= t - RATE_S:
            start += 1
        before_s, before = points[start]
        known = before is not None and value is not None and t > before_s
        rates.append((t, (value - before) / (t - before_s) if known else None))  # type: ignore[operator]
    return rates
