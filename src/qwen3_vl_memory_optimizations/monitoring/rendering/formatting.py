"""Formatting of figures."""

from __future__ import annotations

NOT_MEASURED = "not measured"

_ENDINGS = {"/s": "/s", "tokens/s": " tokens/s", "times": " x", "s": " s", "cores": " cores"}
_SIZES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def show(value: float | None, unit: str) -> str:
    """Format a figure in a chart unit, `plain`, `tokens/s` or `s`; `None` reads "not measured"."""
    if value is None:
        return NOT_MEASURED
    if unit in ("bytes", "bytes/s"):
        return _size(value) + unit[len("bytes") :]
    if unit == "share":
        return f"{_digits(100 * value)} %"
    return _digits(value) + _ENDINGS.get(unit, "")


def breach_text(peak_bytes: int, budget_bytes: int | None) -> str | None:
    """Return a breach of a budget as text, or `None` if the peak is within it."""
    if budget_bytes is None or peak_bytes <= budget_bytes:
        return None
    unit, scale, digits = ("GB", 1e9, 2) if peak_bytes >= 1e9 else ("MB", 1e6, 0)
    peak, budget, over = (
        f"{n_bytes / scale:.{digits}f} {unit}" for n_bytes in (peak_bytes, budget_bytes, peak_bytes - budget_bytes)
    )
    return f"peak {peak}, over the budget of {budget} by {over}"


def show_difference(first: float | None, second: float | None, unit: str) -> str:
    """Format how much a figure grew from the first to the second; shares in percentage points."""
    if first is None or second is None:
        return NOT_MEASURED
    grown = second - first
    if not grown:
        return "same"
    text = f"{_digits(100 * abs(grown))} points" if unit == "share" else show(abs(grown), unit)
    sign = "+" if grown > 0 else "\u2212"
    relative = "" if unit == "share" or not first else f" ({sign}{_digits(100 * abs(grown / first))} %)"
    return f"{sign}{text}{relative}"


def _size(n_bytes: float) -> str:
    """Format bytes with three significant digits, trailing zeros included: `2.00 GB`."""
    for unit, scale in _SIZES:
        value = abs(n_bytes) / scale
        if value >= 0.9995:
            decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{n_bytes / scale:.{decimals}f} {unit}"
    return f"{n_bytes:.0f} B"


def _digits(value: float) -> str:
    """Format a number with three significant digits, and large ones without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
