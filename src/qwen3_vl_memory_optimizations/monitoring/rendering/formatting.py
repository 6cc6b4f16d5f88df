"""Formatting of figures."""

from __future__ import annotations

from ...errors import format_bytes

NOT_MEASURED = "not measured"

_ENDINGS = {"/s": "/s", "times": " x", "s": " s", "cores": " cores"}


def show(value: float | None, unit: str) -> str:
    """Format a figure in a chart unit, `plain` or `s`; `None` reads "not measured"."""
    if value is None:
        return NOT_MEASURED
    if unit in ("bytes", "bytes/s"):
        return format_bytes(value) + unit[len("bytes") :]
    if unit == "share":
        return f"{_digits(100 * value)} %"
    return _digits(value) + _ENDINGS.get(unit, "")


def _digits(value: float) -> str:
    """Format a number with three significant digits, and large ones without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
