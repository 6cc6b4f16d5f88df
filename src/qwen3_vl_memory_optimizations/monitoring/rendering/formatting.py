"""Figures as people read them."""

from __future__ import annotations

from ...errors import format_bytes

NOT_MEASURED = "not measured"

_ENDINGS = {"/s": "/s", "times": " x", "s": " s", "cores": " cores"}


def show(value: float | None, unit: str) -> str:
    """Return a figure in one of the units of charts, or in `plain` or `s`; one that is not there is said to be so."""
    if value is None:
        return NOT_MEASURED
    if unit in ("bytes", "bytes/s"):
        return format_bytes(value) + unit[len("bytes") :]
    if unit == "share":
        return f"{_digits(100 * value)} %"
    return _digits(value) + _ENDINGS.get(unit, "")


def _digits(value: float) -> str:
    """Return a number with three digits that mean something, and never an exponent where it is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
