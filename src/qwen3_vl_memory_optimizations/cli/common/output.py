"""Shared by all commands: output of results and errors, and the common options."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

EXIT_EMPTY = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
INPUT, MEMORY, GENERATION, OUTPUT = "Input", "Memory", "Generation", "Output"
"""Panels of options in help texts."""


def _remember(name: str) -> Callable[[typer.Context, bool], bool]:
    """Return a callback that stores an option of any command where `CommandGroup` finds it."""

    def note(ctx: typer.Context, value: bool) -> bool:
        ctx.meta[name] = value
        return value

    return note


JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=_remember("json"),
        rich_help_panel=OUTPUT,
        help="Print one JSON object to stdout and nothing else.",
    ),
]
DebugOption = Annotated[
    bool,
    typer.Option("--debug", callback=_remember("debug"), rich_help_panel=OUTPUT, help="Print a traceback on errors."),
]
RamBudgetOption = Annotated[
    str | None,
    typer.Option(
        "--ram-budget", metavar="SIZE", rich_help_panel=MEMORY, help="Memory limit for the whole process, such as 4GB."
    ),
]
TensorBudgetOption = Annotated[
    str | None,
    typer.Option("--tensor-budget", metavar="SIZE", rich_help_panel=MEMORY, help="Memory limit for the weights."),
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME|FILE",
        rich_help_panel=MEMORY,
        help="Hardware profile; explicit options override it: auto (best match, see doctor), a name, or a .toml file.",
    ),
]
CodecOption = Annotated[
    str,
    typer.Option(
        "--codec",
        metavar="CODEC",
        rich_help_panel=MEMORY,
        help="Weight format: auto, none (unchanged), or a codec such as int8_rotated, int8 or int4.",
    ),
]
CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        metavar="DIR",
        envvar="QWEN3VL_MEM_CACHE",
        rich_help_panel=MEMORY,
        help="Directory of packed checkpoints, cached results and recorded runs. "
        "(default: $QWEN3VL_MEM_CACHE, or ~/.cache/qwen3vl-mem)",
    ),
]


def typed(ctx: typer.Context, **settings: Any) -> dict[str, Any]:
    """Return only what the user set, by flag, environment or config file, so that a profile overrides defaults."""
    sources = {name: ctx.get_parameter_source(name) for name in settings}
    return {name: settings[name] for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


def console() -> Console:
    """Return the console for results."""
    from rich.console import Console

    return Console()


def error_console() -> Console:
    """Return the console for everything except results."""
    from rich.console import Console

    return Console(stderr=True)


def print_json(value: Any) -> None:
    """Print the result of a command as JSON."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def percent(share: float | None) -> str:
    """Format a share as a percentage; `None` is a dash."""
    return "-" if share is None else f"{100 * share:.0f} %"
