"""Shared by commands that run a model: record the run, and serve its dashboard on request."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import OUTPUT, error_console

if TYPE_CHECKING:
    from ...monitoring import Alert
    from ...optimizer import MemoryOptimizer

DashboardOption = Annotated[
    int | None,
    typer.Option(
        "--dashboard",
        metavar="PORT",
        min=0,
        max=65535,
        rich_help_panel=OUTPUT,
        help="Serve a live dashboard on 127.0.0.1 during the run (0: any free port).",
    ),
]
RecordOption = Annotated[
    bool,
    typer.Option(
        "--record/--no-record",
        rich_help_panel=OUTPUT,
        help="Record the run for top, dashboard and report; the last 20 runs are kept.",
    ),
]


def check_watching(dashboard: int | None) -> None:
    """Check before slow work that a dashboard can be served.

    Raises:
        ConfigurationError: its dependencies are not installed.
    """
    if dashboard is not None:
        from ...monitoring.dashboard.server import check_installed

        check_installed()


class FiredAlerts:
    """The alerts that fired during a run, by name; the latest text of each."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def hear(self, alert: Alert) -> None:
        """Take a change of an alert."""
        if alert.active:
            self.texts[alert.name] = alert.message


@contextlib.contextmanager
def watched(
    optimizer: MemoryOptimizer,
    *,
    dashboard: int | None,
    record: bool,
    command: str,
    model: str,
    watch_alerts: bool = False,
) -> Iterator[FiredAlerts]:
    """Record an optimizer during a block, and serve its dashboard; yield the alerts that fire.

    Alerts belong on the page and in the statistics, so they are not logged: they would interrupt an answer.

    Args:
        optimizer: the optimizer of the run; if it is private, no file is written.
        dashboard: port of the dashboard; `None` for no dashboard.
        record: whether to write a run file.
        command, model: names shown for the run.
        watch_alerts: evaluate alerts even if the run is neither recorded nor shown.

    Raises:
        ConfigurationError: the dashboard cannot be served.
    """
    from ...monitoring import AlertMonitor, AlertWatch, Recorder, start_dashboard

    fired = FiredAlerts()
    monitor = AlertMonitor(on_change=fired.hear)
    path = _run_path(optimizer) if record and not optimizer.config.private else None
    about = {"command": command, "model": model}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_alert_messages())
        if dashboard is not None:
            optimizer.figures.measure()  # takes 0.3 s, so before the run
            page = stack.enter_context(start_dashboard(optimizer, dashboard, path=path, monitor=monitor, about=about))
            text = f"dashboard: {page.url}"
            error_console().print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
        elif path is not None:
            stack.enter_context(Recorder(optimizer, path=path, history=0, monitor=monitor, about=about))
        elif watch_alerts:
            stack.enter_context(AlertWatch(optimizer, monitor))
        yield fired


@contextlib.contextmanager
def _without_alert_messages() -> Iterator[None]:
    alerts = logging.getLogger(f"{__name__.split('.')[0]}.monitoring.alerts")
    before = alerts.disabled
    alerts.disabled = True
    try:
        yield
    finally:
        alerts.disabled = before


def _run_path(optimizer: MemoryOptimizer) -> Path | None:
    """Return the path of the run file, or `None` if it cannot be written: a run works without a recording."""
    from ...monitoring.recording.run_file import new_run_path, runs_dir

    try:
        return new_run_path(runs_dir(optimizer.config))
    except OSError as error:
        error_console().print(f"this run is not recorded: {error}", style="yellow", markup=False, soft_wrap=True)
        return None
