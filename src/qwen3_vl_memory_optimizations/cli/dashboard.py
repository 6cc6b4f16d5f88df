"""`qwen3vl-mem dashboard`: the dashboard of a live or recorded run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import typer

from .common.output import OUTPUT, CacheDirOption, DebugOption, error_console

RunArgument = Annotated[
    Path | None,
    typer.Argument(metavar="RUN", help="Run file. (default: the newest live run, else the newest)"),
]


def dashboard(
    run: RunArgument = None,
    port: Annotated[
        int,
        typer.Option(
            "--port",
            min=0,
            max=65535,
            metavar="PORT",
            rich_help_panel=OUTPUT,
            help="Port on 127.0.0.1 (0: any free port).",
        ),
    ] = 0,
    cache_dir: CacheDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Serve the dashboard of a run until Ctrl-C.

    The default is the newest live run of any process, which the page follows;
    else the newest ended run. `generate` and `demo` record their runs in the
    cache directory.

    Example: qwen3vl-mem dashboard
    """
    from ..monitoring.dashboard import serve_run
    from ..monitoring.recording.run_file import find_run

    path = find_run(run, _runs_dir(cache_dir))
    with serve_run(path, port) as page:
        text = f"{page.url}  ({path.name}, {'running' if page.source.running else 'ended'}; Ctrl-C stops the dashboard)"
        error_console().print(text, markup=False, highlight=False, soft_wrap=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


def _runs_dir(cache_dir: Path | None) -> Path:
    from ..config import MemoryConfig
    from ..monitoring.recording.run_file import runs_dir

    return runs_dir(MemoryConfig(cache_dir=cache_dir))
