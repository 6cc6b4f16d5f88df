"""Shared by all commands: output of results, progress and errors, and the common options."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import MemoryOptimizationError

if TYPE_CHECKING:
    from rich.console import Console

_UsageError: Any = typer.BadParameter.__base__  # typer brings its own click since 0.26
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
INPUT, MEMORY, GENERATION, OUTPUT = "Input", "Memory", "Generation", "Output"
"""Panels of options in help texts."""
_MOST_WITHOUT_PANELS = 7

Progress = Callable[[str, int, int], None]


def _remember(name: str) -> Callable[[typer.Context, bool], bool]:
    """Return a callback that stores an option where `CommandGroup` finds it, whatever the command."""

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
        rich_help_panel=MEMORY,
        help="Weight format: auto, none (unchanged), or a codec such as int8_rotated, int8 or int4.",
    ),
]
CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        metavar="DIR",
        rich_help_panel=MEMORY,
        help="Directory of packed checkpoints, cached results and recorded runs. "
        "(default: $QWEN3VL_MEM_CACHE, or ~/.cache/qwen3vl-mem)",
    ),
]


def typed(ctx: typer.Context, **settings: Any) -> dict[str, Any]:
    """Return only explicitly given options, so that a profile overrides defaults."""
    sources = {name: ctx.get_parameter_source(name) for name in settings}
    return {name: settings[name] for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


class Command(TyperCommand):
    """A command whose help lists few options without panels, and `--help` with the last panel."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help text."""
        options: list[Any] = [each for each in self.get_params(ctx) if each.param_type_name == "option"]
        use_panels = len(options) > _MOST_WITHOUT_PANELS
        for option in options:
            panel = getattr(option, "rich_help_panel", None) or (OUTPUT if option.name == "help" else None)
            option.rich_help_panel = panel if use_panels else None
        super().format_help(ctx, formatter)


class CommandGroup(TyperGroup):
    """A command group that reports errors as one line with advice, never as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: the command failed and its error was printed.
        """
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            error_console().print("stopped", style="yellow")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except _UsageError as error:
            if "--json" in sys.argv:
                print_json({"error": {"type": "UsageError", "message": error.format_message()}})
            raise
        except BrokenPipeError:
            raise
        except (MemoryOptimizationError, OSError) as error:
            _show_error(error, debug=ctx.meta.get("debug", False), as_json=ctx.meta.get("json", False))
            raise typer.Exit(EXIT_ERROR) from None


def _show_error(error: Exception, *, debug: bool, as_json: bool) -> None:
    if debug:
        traceback.print_exception(error)
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": str(error)}})
    # No markup, no wrapping: messages may contain brackets, and paths to copy.
    error_console().print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)


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


@contextlib.contextmanager
def progress_bar(*, quiet: bool = False, in_bytes: bool = True) -> Iterator[Progress]:
    """Yield a callback (description, done, total) that shows a progress bar with time left, and bytes per second.

    The bar is on stderr and disappears at the end. Without a terminal, or if `quiet`, it is not shown.
    """
    screen = error_console()
    if quiet or not screen.is_terminal:
        yield lambda description, done_bytes, total_bytes: None
        return
    from rich import progress as bars

    amounts = (bars.DownloadColumn(), bars.TransferSpeedColumn()) if in_bytes else (bars.TaskProgressColumn(),)
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=None),
        *amounts,
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=screen, transient=True, expand=True) as bar:
        tasks: dict[str, bars.TaskID] = {}

        def report(description: str, done_bytes: int, total_bytes: int) -> None:
            if description not in tasks:
                tasks[description] = bar.add_task(description, total=total_bytes)
            bar.update(tasks[description], completed=done_bytes, total=total_bytes)

        yield report


@contextlib.contextmanager
def working(message: str, *, quiet: bool = False) -> Iterator[None]:
    """Show a spinner on stderr during work without measurable progress."""
    screen = error_console()
    if quiet or not screen.is_terminal:
        yield
        return
    with screen.status(message):
        yield


def percent(share: float | None) -> str:
    """Format a share as a percentage; `None` is a dash."""
    return "-" if share is None else f"{100 * share:.0f} %"
