"""Charts of a run as SVG, for a report without scripts."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from .charts import Chart, Point
from .formatting import NOT_MEASURED, show

_WIDTH, _HEIGHT = 460, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 8, 8, 20
_DASHES = ("", "6 3", "2 3", "9 3 2 3", "1 2", "12 4", "4 2 1 2", "8 2")


@dataclass(frozen=True, slots=True)
class Axes:
    """The range of a chart: seconds, and figures from zero to `top`."""

    start: float
    end: float
    top: float

    @classmethod
    def of(cls, chart: Chart, *runs: dict[str, list[Point]]) -> Axes:
        """Return axes that hold the lines of all given runs."""
        points = [point for lines in runs for each in lines.values() for point in each]
        known = [value for _, value in points if value is not None]
        start = min((t for t, _ in points), default=0.0)
        end = max(max((t for t, _ in points), default=0.0), start + 1.0)
        return cls(start, end, 1.0 if chart.style == "stack" else _nice_top(max(known, default=0.0)))


def chart_as_svg(chart: Chart, lines: dict[str, list[Point]], axes: Axes | None = None, heading: str = "") -> str:
    """Return a chart with its legend as HTML.

    Args:
        chart: its definition.
        lines: points by label.
        axes: default: as the lines need.
        heading: default: the chart's title.
    """
    heading = heading or chart.title
    parts = []
    if any(value is not None for points in lines.values() for _, value in points):
        axes = axes or Axes.of(chart, lines)
        parts = [*_axes(chart, axes), *_marks(chart, lines, axes)]
    else:
        parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle">{NOT_MEASURED}</text>')
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 26 10" aria-hidden="true">'
        f'<line x2="26" y1="5" y2="5" {_stroke(index)}/></svg>{escape(label.replace("_", " "))}: '
        f"{_summary(chart, points)}</li>"
        for index, (label, points) in enumerate(lines.items())
    )
    label = escape(f"{heading}. {chart.note}")
    return (
        f'<article><h3>{escape(heading)}</h3><p class="note">{escape(chart.note)}</p>'
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(parts)}</svg>'
        f'<ul class="legend">{legend}</ul></article>'
    )


def _summary(chart: Chart, points: list[Point]) -> str:
    known = [value for _, value in points if value is not None]
    if not known:
        return f'<span class="absent">{NOT_MEASURED}</span>'
    mean = sum(known) / len(known)
    figures = (("last", known[-1]), ("mean", mean), ("max", max(known)))
    return ", ".join(f"{name} {show(value, chart.unit)}" for name, value in figures)


def _x(t: float, start: float, end: float) -> float:
    return _LEFT + (t - start) / (end - start) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, top: float) -> float:
    return _HEIGHT - _BOTTOM - value / top * (_HEIGHT - _TOP - _BOTTOM)


def _axes(chart: Chart, axes: Axes) -> list[str]:
    parts = []
    start, end, top = axes.start, axes.end, axes.top
    for share in (0.0, 0.5, 1.0):
        y = _y(share * top, top)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{show(share * top, chart.unit)}</text>')
    for t, anchor in ((start, "start"), (end, "end")):
        parts.append(f'<text x="{_x(t, start, end):.1f}" y="{_HEIGHT - 5}" text-anchor="{anchor}">{t:.1f} s</text>')
    return parts


def _marks(chart: Chart, lines: dict[str, list[Point]], axes: Axes) -> list[str]:
    start, end, top = axes.start, axes.end, axes.top
    base: dict[float, float] = {}
    parts = []
    for index, points in enumerate(lines.values()):
        commands, pen, left = [], False, start
        for t, value in points:
            x, low = _x(t, start, end), base.get(t, 0.0) if chart.style == "stack" else 0.0
            if value is not None and chart.style == "line":
                commands.append(f"{'L' if pen else 'M'}{x:.1f} {_y(value, top):.1f}")
            elif value:
                high = min(low + value, top)
                base[t] = high
                bottom = f"{_y(low, top):.1f}"
                commands.append(f"M{_x(left, start, end):.1f} {bottom}V{_y(high, top):.1f}H{x:.1f}V{bottom}Z")
            pen, left = value is not None, t
        how = f'fill="none" {_stroke(index)}' if chart.style == "line" else f'fill="var(--c{index % 8})"'
        parts.append(f'<path d="{"".join(commands)}" {how}/>')
    return parts


def _stroke(index: int) -> str:
    return f'stroke="var(--c{index % 8})" stroke-width="2" stroke-dasharray="{_DASHES[index % 8]}"'


def _nice_top(value: float) -> float:
    if value <= 0:
        return 1.0
    scale = 1.0
    while scale * 10 <= value:
        scale *= 10
    while scale > value:
        scale /= 10
    return next(top for top in (scale, 2 * scale, 2.5 * scale, 5 * scale, 10 * scale) if top >= value * 0.999)
