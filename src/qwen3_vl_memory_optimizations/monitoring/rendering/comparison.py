"""`write_comparison`: two recorded runs side by side as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..recording.run_file import RunFile
from .charts import CHARTS, Chart, figure_at, lines_of
from .document import document, folded, section, table, write_document
from .formatting import show, show_difference
from .report_parts import METRIC_UNITS, SECTIONS, SUMMARY, duration_of, every_nth, facts, title_of, verdict_html
from .svg import Axes, chart_as_svg

_ALWAYS_DIFFERENT = ("pid", "started s", "machine: available ram bytes")


def write_comparison(first: Path, second: Path, output: Path) -> Path:
    """Write the comparison of two recorded runs and return its path.

    Raises:
        ConfigurationError: a run cannot be read.
        StorageError: the report cannot be written; an existing file is kept.
    """
    return write_document(comparison_html(*(RunFile(path, keep_samples=True) for path in (first, second))), output)


def comparison_html(first: RunFile, second: RunFile) -> str:
    """Return the comparison of two runs: verdicts, figures with their difference, and charts on the same axes."""
    runs = (first, second)
    heads = "".join(
        f"<div><h2>{name}: {escape(title_of(run.header))}</h2>{verdict_html(run.state.snapshot)}"
        f'<p class="note">{escape(run.path.name)}. {escape(duration_of(run.header, run.state))}</p></div>'
        for name, run in zip("AB", runs, strict=True)
    )
    metrics = [(name.replace("_", " "), f"metrics.{name}", METRIC_UNITS.get(name, "share")) for name in _metrics(runs)]
    headings = ("figure", "A", "B", "B compared with A")
    parts = [
        f'<div class="pair">{heads}</div>',
        section("Figures", table(headings, _figures(runs, SUMMARY))),
        section("Settings that differ", table(("setting", "A", "B"), _differing(runs), "none")),
    ]
    for key, name in SECTIONS.items():
        charts = "".join(_pair(chart, runs) for chart in CHARTS if chart.section == key)
        parts.append(section(name, charts) if key == "overview" else folded(name, charts))
    parts.append(folded("Metrics", table(headings, _figures(runs, metrics))))
    return document("qwen3vl-mem · comparison of two runs", "".join(parts))


def _figures(runs: Sequence[RunFile], figures: Sequence[tuple[str, str, str]]) -> Iterator[Sequence[str]]:
    for name, path, unit in figures:
        one, two = (figure_at(run.state.snapshot, path.split(".")) for run in runs)
        if one is not None or two is not None:
            yield name, show(one, unit), show(two, unit), show_difference(one, two, unit)


def _metrics(runs: Sequence[RunFile]) -> dict[str, None]:
    return {name: None for run in runs for name in run.state.snapshot.get("metrics", {})}


def _differing(runs: Sequence[RunFile]) -> Iterator[Sequence[str]]:
    one, two = (dict(facts(run.header)) for run in runs)
    for label in one | two:
        values = tuple(table.get(label, "none") for table in (one, two))
        if values[0] != values[1] and label not in _ALWAYS_DIFFERENT:
            yield label, *values


def _pair(chart: Chart, runs: Sequence[RunFile]) -> str:
    """Return a chart of both runs, side by side on the same axes."""
    lines: list[dict[str, Any]] = [lines_of(chart, every_nth(run.state.samples)) for run in runs]
    axes = Axes.of(chart, *lines)
    drawn = "".join(
        chart_as_svg(chart, each, axes, heading=f"{chart.title}: {name}")
        for name, each in zip("AB", lines, strict=True)
    )
    return f'<div class="pair">{drawn}</div>'
