"""`RunSource`: the page's interface to a run, whether live or in a file."""

from __future__ import annotations

from typing import Any, Protocol

from ..recording.history import History
from ..recording.run_state import Record, RunState


class RunSource(Protocol):
    """A run; implemented by `Recorder` and `RunFile`."""

    @property
    def header(self) -> Record:
        """Description of the run."""

    @property
    def state(self) -> RunState:
        """State as of the latest record."""

    @property
    def history(self) -> History | None:
        """The records."""

    @property
    def running(self) -> bool:
        """Whether more records may follow."""

    def poll(self) -> None:
        """Read new records."""


def run_id(source: RunSource) -> str:
    """Return a unique id of a run."""
    return f"{source.header['started_s']}-{source.header['pid']}"


def newest(source: RunSource) -> dict[str, Any]:
    """Return the latest snapshot and memory map, ready for JSON."""
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
