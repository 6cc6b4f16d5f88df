"""Choose which model, codec and budget to use on this machine, and say it in three lines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ...errors import format_bytes, format_duration
from .estimates import BITS, Row

LEAST_TOKENS_PER_S, MOST_PAGE_S = 3.0, 60.0
RULE = (
    f"the largest model with at least {LEAST_TOKENS_PER_S:g} tokens/s and at most {MOST_PAGE_S:g} s per page, "
    "at 8 bits if that is fast enough, else at 4; if none is, the form of the smallest model that answers a page first"
)
_ANSWER_TOKENS = 100
_CODECS = ("int8_rotated", "int4")


@dataclasses.dataclass(frozen=True, slots=True)
class Recommendation:
    """What to use; `row` is `None` if no model fits.

    Attributes:
        row: the estimate of the recommendation.
        least: the estimate of the same model and codec in the least budget; `None`: that is the same one.
        lines: three lines that say it.
    """

    row: Row | None
    least: Row | None
    lines: tuple[str, ...]


def recommend(rows: Sequence[Row], limit_bytes: int) -> Recommendation:
    """Choose among estimates, in the order of models from small to large; see `RULE`."""
    candidates = [row for row in rows if row.fits and row.codec in _CODECS and row.tokens_per_s]
    if not candidates:
        least = min(rows, key=lambda row: row.least_bytes)
        text = f"No model fits in {format_bytes(limit_bytes)}: {least.model} needs {format_bytes(least.least_bytes)}."
        if any(row.fits for row in rows):
            text = "The speed of the SSD is not measured, so no model can be recommended."
        return Recommendation(None, None, (text,))
    models = list(dict.fromkeys(row.model for row in candidates))
    preferred = [
        row
        for model in reversed(models)
        for codec in _CODECS
        for row in candidates
        if (row.model, row.codec) == (model, codec) and _is_fast(row)
    ]
    smallest = [row for row in candidates if row.model == models[0]]
    chosen = (
        _largest_budget(preferred[0], candidates)
        if preferred
        else min(smallest, key=lambda row: (_answer_s(row), -row.budget_bytes))
    )
    least = min((row for row in candidates if _same(row, chosen)), key=lambda row: row.budget_bytes)
    return Recommendation(
        chosen,
        None if least is chosen else least,
        (_use(chosen), _least(chosen, least), command(chosen)),
    )


def command(row: Row) -> str:
    """Return the command that runs a recommendation."""
    codec = " --codec int4" if row.codec == "int4" else ""
    budget = f"{row.budget_bytes / 1e9:.3g}GB"
    return (
        f"qwen3vl-mem generate Qwen/Qwen3-VL-{row.model}-Instruct{codec} --ram-budget {budget} --detail document "
        '-i page.png -p "What is the total?"'
    )


def _use(row: Row) -> str:
    return f"Use {row.model} at {BITS[row.codec]} bits in {format_bytes(row.budget_bytes)}: about {_speed(row)}."


def _least(chosen: Row, least: Row) -> str:
    text = f"Least budget for it: {format_bytes(chosen.least_bytes)}"
    if least is not chosen:
        text += f", with about {_speed(least)}"
    elif not chosen.in_memory:
        text += f"; in {format_bytes(chosen.whole_bytes)} it reads nothing from the SSD"
    return text + "."


def _speed(row: Row) -> str:
    page = "" if row.page_s is None else f", {format_duration(row.page_s)} per page to the first token"
    return f"{_rate(row):.2g} tokens/s{page}"


def _rate(row: Row) -> float:
    return row.tokens_per_s or 0.0


def _is_fast(row: Row) -> bool:
    return _rate(row) >= LEAST_TOKENS_PER_S and row.page_s is not None and row.page_s <= MOST_PAGE_S


def _answer_s(row: Row) -> float:
    """Return the time of an answer about a page."""
    return (math.inf if row.page_s is None else row.page_s) + _ANSWER_TOKENS / _rate(row)


def _same(row: Row, other: Row) -> bool:
    return (row.model, row.codec) == (other.model, other.codec)


def _largest_budget(row: Row, candidates: Sequence[Row]) -> Row:
    return max((each for each in candidates if _same(each, row)), key=lambda each: each.budget_bytes)
