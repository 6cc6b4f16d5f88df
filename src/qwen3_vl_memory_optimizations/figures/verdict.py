"""`judge`: what limits decoding, in one sentence with its numbers, and what more memory would give."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import format_bytes
from ..model.run.decode_steps import DecodeUse

SSD, MEMORY, PROCESSOR = "SSD", "memory", "processor"

_SSD_BOUND_SHARE = 0.1
_MEMORY_BOUND_SHARE = 0.6
"""A product that reads this share of the bandwidth which a plain sum reaches gains little from more cores."""
_OFFERED_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Verdict:
    """What limits decoding; a figure that is not measured is `None`.

    Attributes:
        limit: `SSD`, `memory` (its bandwidth) or `processor`.
        text: the verdict as one sentence.
        waiting_share: share of decoding spent waiting for page reads.
        tokens_per_s: per sequence, over the same steps.
        read_bytes_per_token: read from the SSD per token of a sequence.
        disk_bytes_per_s: rate of those reads, while any is in progress.
        memory_share: encoded bytes used per second / memory bandwidth.
        more_bytes: memory that would help; `more_tokens_per_s`: the estimated speed with it.
    """

    limit: str | None
    text: str
    waiting_share: float | None = None
    tokens_per_s: float | None = None
    read_bytes_per_token: float | None = None
    disk_bytes_per_s: float | None = None
    memory_share: float | None = None
    more_bytes: int | None = None
    more_tokens_per_s: float | None = None


def judge(
    use: DecodeUse | None,
    *,
    budget_bytes: int | None = None,
    available_bytes: int | None = None,
    bandwidth: float | None = None,
) -> Verdict:
    """Return what limits decoding.

    Args:
        use: recent decode steps; `None`: there were none.
        budget_bytes: the budget, if there is one; sets the size of the step that is suggested.
        available_bytes: memory that the machine could add to the budget; `None`: unknown.
        bandwidth: measured memory bandwidth in bytes/s; `None`: not measured.
    """
    if use is None or not use.seconds or not use.tokens:
        return Verdict(None, "Not measured: no token was decoded yet.")
    waiting = min(1.0, use.stall_s / use.seconds)
    memory_share = use.used_bytes / use.seconds / bandwidth if bandwidth else None
    more = _suggested_bytes(use, budget_bytes, available_bytes) if waiting >= _SSD_BOUND_SHARE else None
    faster = tokens_per_s_with(use, more) if more else None
    if waiting >= _SSD_BOUND_SHARE:
        limit, text = SSD, f"SSD-bound: {waiting:.0%} waiting"
        if more and faster:
            text += f"; {format_bytes(more)} more would give about {faster:.2g} tokens/s"
        elif available_bytes == 0:
            text += "; this machine has no memory left to add"
    elif memory_share is not None and memory_share >= _MEMORY_BOUND_SHARE:
        limit, text = MEMORY, f"Memory-bound: {memory_share:.0%} of the memory bandwidth, {waiting:.0%} waiting"
    else:
        limit, text = PROCESSOR, f"Processor-bound: {waiting:.0%} waiting for the SSD; more memory would change little"
    return Verdict(
        limit,
        text.replace("%", " %") + ".",
        waiting,
        use.tokens / use.seconds,
        use.read_bytes / use.tokens,
        use.read_bytes / use.reading_s if use.reading_s else None,
        memory_share,
        more if faster else None,
        faster,
    )


def tokens_per_s_with(use: DecodeUse, more_bytes: float) -> float | None:
    """Estimate the speed if `more_bytes` of weights stayed in memory; `None` if nothing was read.

    A decode step uses each weight once, so its reads shrink by these bytes, and its waiting by the time they took, down
    to zero. The time that computing takes stays.
    """
    if not use.read_bytes or not use.reading_s or not use.steps:
        return None
    saved_bytes = min(more_bytes, use.read_bytes / use.steps) * use.steps
    saved_s = min(use.stall_s, saved_bytes / (use.read_bytes / use.reading_s))
    return use.tokens / (use.seconds - saved_s) if use.seconds > saved_s else None


def _suggested_bytes(use: DecodeUse, budget_bytes: int | None, available_bytes: int | None) -> int | None:
    """Return a quarter of the budget as a round number; less if less ends the waiting or is available."""
    if not use.read_bytes or not use.reading_s:
        return None
    ends_waiting = min(use.stall_s * use.read_bytes / use.reading_s, use.read_bytes) / use.steps
    most = min(ends_waiting, math.inf if available_bytes is None else available_bytes)
    step = _round(_OFFERED_SHARE * budget_bytes) if budget_bytes else math.inf
    return int(float(f"{min(step, most):.2g}")) or None


def _round(value: float) -> float:
    """Return the nearest of 1, 2, 5, 10, ... times a power of ten."""
    scale = 10 ** math.floor(math.log10(value))
    return min((factor * scale for factor in (1, 2, 5, 10)), key=lambda each: abs(math.log(each / value)))
