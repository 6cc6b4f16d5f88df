"""`RunSource`: what the page asks of a run, whether it is recorded now or lies in a file."""

from __future__ import annotations

from typing import Any, Protocol

from ..recording.history import History
from ..recording.run_state import Record, RunState


class RunSource(Protocol):
    """A run: `Recorder` and `RunFile` are such."""

    @property
    def header(self) -> Record:
        """What the run is of."""

    @property
    def state(self) -> RunState:
        """As of the latest record."""

    @property
    def history(self) -> History | None:
        """The records."""

    @property
    def running(self) -> bool:
        """Whether there may be more."""

    def poll(self) -> None:
        """Take what came since."""


def run_id(source: RunSource) -> str:
    """Return what tells one run from another."""
    return f"{source.header['started_s']}-{source.header['pid']}"


def newest(source: RunSource) -> dict[str, Any]:
    """Return the latest snapshot and what the map says, ready for JSON."""
    source.poll()
    state, pages = source.state, source.state.memory_map
    states = pages.states()
    return {
        "run": run_id(source),
        "t": state.t,
        "running": source.running,
        "snapshot": state.snapshot,
        "memory_map": [
            {"tensor_id": key, **tensor._asdict(), "states": states[key]} for key, tensor in pages.tensors.items()
        ],
    }
