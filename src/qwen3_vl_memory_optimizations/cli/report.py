"""`qwen3vl-mem report`: write a recorded run, or a comparison of two, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common.output import OUTPUT, CacheDirOption, DebugOption, JsonOption, console, print_json
from .dashboard import RunArgument, _runs_dir


def report(
    run: RunArgument = None,
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER", help="A second run file: compare it with the first.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            rich_help_panel=OUTPUT,
            help="HTML file to write. (default: RUN.html, or RUN-OTHER.html, in the current directory)",
        ),
    ] = None,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the report of a run as one self-contained HTML file.

    It says first what limited the run, then shows figures, plots, alerts, the
    settings and the hardware. Given two runs, it shows their figures with the
    difference, the settings that differ, and their plots on the same axes.

    Example: qwen3vl-mem report -o run.html
             qwen3vl-mem report A.jsonl B.jsonl -o comparison.html
    """
    from ..monitoring.recording.run_file import find_run
    from ..monitoring.rendering.comparison import write_comparison
    from ..monitoring.rendering.report import write_report

    path = find_run(run, _runs_dir(cache_dir))
    if other is None:
        written = write_report(path, output or Path(f"{path.stem}.html"))
    else:
        second = find_run(other, _runs_dir(cache_dir))
        written = write_comparison(path, second, output or Path(f"{path.stem}-{second.stem}.html"))
    if as_json:
        compared = {} if other is None else {"other": str(other)}
        print_json({"run": str(path), **compared, "report": str(written), "bytes": written.stat().st_size})
    else:
        console().print(str(written), markup=False, highlight=False, soft_wrap=True)
