"""What commands that run a model share: the run is recorded, and shown on a page if that is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._output import error_console

if TYPE_CHECKING:
    from ..optimizer import MemoryOptimizer

DashboardOption = Annotated[
    int | None,
    typer.Option(
        "--dashboard",
        metavar="PORT",
        min=0,
        max=65535,
        help="Serve a live page on 127.0.0.1 while it runs (0: any free port).",
    ),
]
RecordOption = Annotated[
    bool,
    typer.Option(
        "--record/--no-record", help="Keep figures of the run for top, dashboard and report; the last 20 runs stay."
    ),
]


def check_watching(dashboard: int | None) -> None:
    """Find out before anything slow is done whether a page can be served.

    Raises:
        ConfigurationError: what it needs is not installed.
    """
    if dashboard is not None:
        from ..monitoring.dashboard.server import check_installed

        check_installed()


@contextlib.contextmanager
def watched(
    optimizer: MemoryOptimizer, *, dashboard: int | None, record: bool, command: str, model: str
) -> Iterator[None]:
    """Record what an optimizer does in a block, and show it.

    Args:
        optimizer: of the run. Where it is private, nothing is written.
        dashboard: port of the page; `None`: no page.
        record: whether a file is written.
        command, model: what the run is of.

    Raises:
        ConfigurationError: the page cannot be served.
    """
    from ..monitoring import Recorder, start_dashboard

    path = _run_path(optimizer) if record and not optimizer.config.private else None
    about = {"command": command, "model": model}
    with contextlib.ExitStack() as stack:
        if dashboard is not None:
            optimizer.figures.measure()  # 0.3 s, before the run and not in it
            page = stack.enter_context(start_dashboard(optimizer, dashboard, path=path, about=about))
            text = f"dashboard: {page.url}"
            error_console().print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
        elif path is not None:
            stack.enter_context(Recorder(optimizer, path=path, history=0, about=about))
        yield


def _run_path(optimizer: MemoryOptimizer) -> Path | None:
    """Return where to record; `None`: nowhere, and a run needs no record of itself."""
    from ..monitoring.recording.run_file import new_run_path, runs_dir

    try:
        return new_run_path(runs_dir(optimizer.config))
    except OSError as error:
        error_console().print(f"the run is not recorded: {error}", style="yellow", markup=False, soft_wrap=True)
        return None
