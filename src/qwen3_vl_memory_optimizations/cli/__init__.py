"""The command line `qwen3vl-mem`: one file per command; a command imports its dependencies when it runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from .._version import __version__
from . import cache, dashboard, demo, doctor, evaluate, generate, pack, report, top
from ._output import Command, CommandGroup

__all__ = ["app", "main"]

app = typer.Typer(
    name="qwen3vl-mem",
    cls=CommandGroup,
    help="Run Qwen3-VL inside a hard memory budget.",
    epilog="Start with: qwen3vl-mem demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (
    demo.demo,
    generate.generate,
    pack.pack,
    evaluate.evaluate,
    doctor.doctor,
    dashboard.dashboard,
    top.top,
    report.report,
):
    app.command(cls=Command)(command)
app.add_typer(cache.app)


def main() -> None:
    """Run the command line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    app(prog_name="qwen3vl-mem")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"qwen3vl-mem {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # Options of the program itself; its help text is passed to `Typer`.
    pass
