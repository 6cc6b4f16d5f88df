"""Events between two snapshots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import format_bytes

_LEAST_STALL_S = 0.1

ALERT, PRESSURE, RESPONSE, STALL, SWAP = "alert", "pressure", "response", "stall", "swap"

ROUTINE = frozenset({RESPONSE, STALL, SWAP})
"""Frequent event types (up to two per second), capped separately so that they do not crowd out the others."""


def events_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the type and text of each event between two snapshots; `before` may be empty."""
    if not before:
        return
    yield from _alerts(before["alerts"], after["alerts"])
    yield from _responses(before["responses"], after["responses"])
    paging, earlier = after["paging"], before["paging"]
    stalled_s = paging["stall_s"] - earlier["stall_s"]
    if stalled_s >= _LEAST_STALL_S:
        faults = paging["faults"] - earlier["faults"]
        yield STALL, f"stalled {stalled_s:.2f} s on the SSD, {faults} faults"
    written, read = (paging[key] - earlier[key] for key in ("swap_writes", "swap_reads"))
    if written or read:
        yield SWAP, f"pages swapped out: {written}, swapped in: {read}"
    if after["budget"]["pressure_reliefs"] > before["budget"]["pressure_reliefs"]:
        yield PRESSURE, f"low memory on this machine: {format_bytes(after['budget']['given_up_bytes'])} released"


def _alerts(before: list[Mapping[str, Any]], after: list[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    active = {row["name"]: row["active"] for row in before}
    for row in after:
        if row["active"] != active.get(row["name"], False):
            yield ALERT, row["message"]


def _responses(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    n_new = after["count"] - before["count"]
    last = after["last"]
    if n_new > 1:
        yield RESPONSE, f"{n_new} responses, {after['tokens'] - before['tokens']} tokens"
    elif n_new and last is not None and last["generated"]:
        yield RESPONSE, f"{last['new_tokens']} tokens in {last['wall_s']:.2f} s"
    elif n_new:
        yield RESPONSE, "one forward pass"
