"""The command line `qwen3vl-mem`: one file per command; a command imports its dependencies when it runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from .._version import __version__
from . import cache, dashboard, evaluate, models, pack, pull, report, top
from .common.commands import Command, Program
from .demo.command import demo
from .doctor.command import doctor
from .generate.command import generate
from .generate.inputs import GenerateCommand

__all__ = ["app", "main"]

app = typer.Typer(
    name="qwen3vl-mem",
    cls=Program,
    help="""Run Qwen3-VL inside a hard memory budget.

Example: qwen3vl-mem demo

qwen3vl-mem doctor

qwen3vl-mem generate Qwen/Qwen3-VL-2B-Instruct -i photo.jpg -p "What is this?"
""",
    epilog="Options of commands can also be set in the environment (QWEN3VL_MEM_RAM_BUDGET=2GB) and in "
    "~/.config/qwen3vl-mem/config.toml.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (
    demo,
    generate,
    pull.pull,
    pack.pack,
    evaluate.evaluate,
    doctor,
    dashboard.dashboard,
    top.top,
    report.report,
):
    app.command(cls=GenerateCommand if command is generate else Command)(command)
app.add_typer(models.app)
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
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, allow_from_autoenv=False, help="Print the version."
        ),
    ] = False,
) -> None:
    # Options of the program itself; its help text is passed to `Typer`.
    pass
