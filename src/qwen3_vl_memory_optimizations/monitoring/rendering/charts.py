"""What is drawn of a run, for the page and the report alike: which figures, in which unit, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ANY = "*"
"""In the path of a figure: each key of a table, which becomes part of the label."""

Point = tuple[float, float | None]
Sample = tuple[float, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Series:
    """Lines of a chart.

    Attributes:
        label: of the line; of lines with `ANY` in the path, what the key is put into at `{}`.
        path: keys of the snapshot, joined by dots.
        rate: growth a second since the sample before, instead of the figure itself.
        optional: left out where there never was such a figure, as with a limit that nobody set.
    """

    label: str
    path: str
    rate: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart over time.

    Attributes:
        section: of the page.
        unit: `bytes`, `bytes/s`, `share`, `/s`, `times`, `cores` or `count`.
        note: what the figures mean.
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
        "Share of the time spent on the vision tower, prompts and tokens.",
        tuple(Series(name, f"phases.seconds.{name}", rate=True) for name in ("vision", "prefill", "decode")),
        "stack",
    ),
    Chart(
        "stalls",
        "timeline",
        "Stalls",
        "share",
        "Share of the time in which somebody waited for a page from the SSD.",
        (Series("waiting", "paging.stall_s", rate=True),),
        "bars",
    ),
    Chart(
        "migrations",
        "timeline",
        "Migrations",
        "/s",
        "Pages that moved between memory and SSD.",
        (
            Series("read from the SSD", "paging.page_reads", rate=True),
            Series("dropped, unchanged", "paging.evictions", rate=True),
            Series("swapped out", "paging.swap_writes", rate=True),
            Series("swapped in", "paging.swap_reads", rate=True),
        ),
    ),
    Chart(
        "traffic",
        "timeline",
        "SSD traffic",
        "bytes/s",
        "Checkpoint and swap file.",
        (Series("read", "paging.bytes_read", rate=True), Series("written", "paging.bytes_written", rate=True)),
    ),
    Chart(
        "tokens",
        "timeline",
        "Speed",
        "/s",
        "Forwards, one of which gives a token while decoding; new tokens count when their response ends.",
        (Series("forwards", "paging.passes", rate=True), Series("tokens", "responses.tokens", rate=True)),
    ),
    Chart(
        "cpu",
        "timeline",
        "Processor",
        "cores",
        "CPU-seconds of the process a second.",
        (Series("in use", "process.cpu_s", rate=True),),
    ),
    Chart(
        "process",
        "allocation",
        "Process",
        "bytes",
        "Resident memory, libraries included.",
        (Series("resident", "process.rss_bytes"), Series("ram budget", "budget.ram_budget_bytes", optional=True)),
    ),
    Chart(
        "frames",
        "allocation",
        "Page frames",
        "bytes",
        "Memory behind managed tensors, and the most that the budget leaves them.",
        (
            Series("used", "budget.frames_used_bytes"),
            Series("free, kept for reuse", "budget.frames_free_bytes"),
            Series("limit", "budget.frames_limit_bytes", optional=True),
        ),
    ),
    Chart(
        "pools",
        "allocation",
        "Pool use",
        "share",
        "Granted bytes of the address space of each pool of runtime tensors.",
        (Series("{}", "pools.*.utilization"),),
    ),
    Chart(
        "pool_bytes",
        "allocation",
        "Pool bytes",
        "bytes",
        "Granted bytes of each pool.",
        (Series("{}", "pools.*.used_bytes"),),
    ),
    Chart(
        "fragmentation",
        "allocation",
        "Fragmentation",
        "share",
        "External fragmentation of each pool: 1 - largest hole / free bytes.",
        (Series("{}", "pools.*.external_fragmentation"),),
    ),
    Chart(
        "hit_rate",
        "cache",
        "Hit rate",
        "share",
        "Of the levels of the cache of results; of weights: bytes found in memory.",
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
        "What was read ahead, brought back or admitted, and was used afterwards.",
        (
            Series("pages read ahead", "prediction.prefetch_accuracy"),
            Series("tensors brought back", "prediction.tier_effectiveness"),
            Series("admitted to {}", "cache.levels.*.prediction_efficiency"),
            Series("lifetimes", "metrics.predicted_lifetime_accuracy"),
        ),
    ),
    Chart(
        "level_migrations",
        "cache",
        "Migrations between levels",
        "count",
        "Cached results that came from another level, and tensors that were brought back, so far.",
        (Series("to {}", "cache.levels.*.migrations"), Series("tensors brought back", "migrations.tensors")),
    ),
    Chart(
        "ratio",
        "compression",
        "Compression ratio",
        "times",
        "Original over encoded bytes.",
        (Series("{}", "kinds.*.compression_ratio"),),
    ),
    Chart(
        "error",
        "compression",
        "Relative error",
        "share",
        "Mean over what was encoded, by bytes.",
        (Series("{}", "kinds.*.relative_error"),),
    ),
    Chart(
        "encode_speed",
        "compression",
        "Encoding speed",
        "bytes/s",
        "Original bytes a second, as measured where they were encoded.",
        (Series("{}", "kinds.*.encode_bytes_per_s"),),
    ),
    Chart(
        "decode_speed",
        "compression",
        "Decoding speed",
        "bytes/s",
        "Bytes a second, of samples decoded where they were encoded. Products of weights read what is encoded.",
        (Series("{}", "kinds.*.decode_bytes_per_s"),),
    ),
    Chart(
        "lives",
        "lives",
        "Runtime tensors alive",
        "count",
        "Tensors that are no weights, and cached results.",
        (Series("{}", "life_cycles.*.alive"),),
    ),
    Chart(
        "births",
        "lives",
        "Births",
        "/s",
        "Runtime tensors made.",
        (Series("{}", "life_cycles.*.births", rate=True),),
    ),
)
"""All charts, in the order of the page."""


def charts_as_rows() -> list[dict[str, Any]]:
    """Return `CHARTS` as plain values, ready for JSON."""
    return [asdict(chart) for chart in CHARTS]


def lines_of(chart: Chart, samples: Sequence[Sample]) -> dict[str, list[Point]]:
    """Return the points of each line of a chart, by label; a figure that is not there is `None`."""
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
    """Return a figure of a snapshot; `None`: there is none."""
    value: Any = snapshot
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _found(value: Any, path: Sequence[str], keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the figures at a path, with the keys at each `ANY`."""
    if not path:
        yield keys, value
    elif isinstance(value, Mapping):
        for key in list(value) if path[0] == ANY else [path[0]] if path[0] in value else []:
            yield from _found(value[key], path[1:], (*keys, key) if path[0] == ANY else keys)


def _rates(points: list[Point]) -> list[Point]:
    rates: list[Point] = []
    for (before_s, before), (t, value) in zip(points, points[1:], strict=False):
        known = before is not None and value is not None and t > before_s
        rates.append((t, (value - before) / (t - before_s) if known else None))  # type: ignore[operator]
    return rates
