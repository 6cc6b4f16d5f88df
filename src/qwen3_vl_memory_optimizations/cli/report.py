"""`qwen3vl-mem report`: write a recorded run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._output import CacheDirOption, DebugOption, JsonOption, console, print_json
from .dashboard import RunArgument, _runs_dir


def report(
    run: RunArgument = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="HTML file to write. (default: RUN.html in the current directory)"
        ),
    ] = None,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the report of a run as one self-contained HTML file.

    It contains plots, tables, alerts, the settings and the hardware.

    Example: qwen3vl-mem report -o run.html
    """
    from ..monitoring.recording.run_file import find_run
    from ..monitoring.rendering.report import write_report

    path = find_run(run, _runs_dir(cache_dir))
    written = write_report(path, output or Path(f"{path.stem}.html"))
    if as_json:
        print_json({"run": str(path), "report": str(written), "bytes": written.stat().st_size})
    else:
        console().print(str(written), markup=False, highlight=False, soft_wrap=True)
