"""`write_report`: a recorded run as one self-contained HTML file with SVG plots."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..recording.run_file import RunFile
from ..recording.run_state import RunState
from .charts import CHARTS, lines_of
from .document import document, folded, section, table, write_document
from .report_parts import (
    MOST_POINTS,
    SECTIONS,
    alert_rows,
    breach_html,
    duration_of,
    every_nth,
    facts,
    metric_rows,
    summary_rows,
    tables_of,
    title_of,
    verdict_html,
)
from .svg import chart_as_svg


def write_report(run: Path, output: Path) -> Path:
    """Write the report of a recorded run and return its path.

    Raises:
        ConfigurationError: the run cannot be read.
        StorageError: the report cannot be written; an existing file is kept.
    """
    recorded = RunFile(run, keep_samples=True)
    return write_document(report_html(recorded.header, recorded.state), output)


def report_html(header: Mapping[str, Any], state: RunState) -> str:
    """Return the report of a run: verdict, summary and alerts; everything else is folded or below."""
    samples = every_nth(state.samples)
    parts = [
        verdict_html(state.snapshot),
        f'<p class="note">{escape(duration_of(header, state))} Plots show at most {MOST_POINTS} points.</p>',
        section("Summary", table(("figure", "value"), summary_rows(state.snapshot))),
        section(
            "Alerts",
            breach_html(state.snapshot) + table(("alert", "state", "value", "limit"), alert_rows(state.snapshot)),
        ),
    ]
    for key, name in SECTIONS.items():
        charts = [chart_as_svg(chart, lines_of(chart, samples)) for chart in CHARTS if chart.section == key]
        content = f'<div class="charts">{"".join(charts)}</div>{tables_of(key, state)}'
        parts.append(section(name, content) if key == "overview" else folded(name, content))
    parts.append(folded("Metrics", table(("metric", "value"), metric_rows(state.snapshot))))
    parts.append(folded("Settings and hardware", table(("", ""), facts(header))))
    return document(f"qwen3vl-mem · {title_of(header)}", "".join(parts))
