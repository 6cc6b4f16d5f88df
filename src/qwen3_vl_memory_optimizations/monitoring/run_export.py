"""Export of a run as one JSON document or a CSV table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .recording.run_state import Record, RunState


def state_of(lines: Iterable[str]) -> RunState:
    """Return the state after the given records, with all samples."""
    state = RunState(keep_samples=True)
    for line in lines:
        state.apply(json.loads(line))
    return state


def as_json(header: Record, state: RunState) -> dict[str, Any]:
    """Return the header, all samples (`t` and the full snapshot) and the events."""
    return {
        "header": header,
        "samples": [{"t": t, **snapshot} for t, snapshot in state.samples],
        "events": state.events,
    }


def as_csv(state: RunState) -> str:
    """Return CSV with one row per sample and one column per figure, named by its keys; unmeasured figures are empty."""
    rows = [{"t": t, **dict(_figures(snapshot))} for t, snapshot in state.samples]
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _figures(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _figures(part, f"{name}.{key}" if name else str(key))
    elif value is None or isinstance(value, int | float | str):
        yield name, value
