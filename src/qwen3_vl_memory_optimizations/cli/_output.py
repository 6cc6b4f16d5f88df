"""What all commands share: how results, progress and errors are shown, and the options for that."""

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
from typer.core import TyperGroup

from ..errors import MemoryOptimizationError

if TYPE_CHECKING:
    from rich.console import Console

_UsageError: Any = typer.BadParameter.__base__  # typer brings its own click since 0.26
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

Progress = Callable[[str, int, int], None]


def _remember(name: str) -> Callable[[typer.Context, bool], bool]:
    """Return a callback that notes an option where `CommandGroup` finds it, whichever command it was given to."""

    def note(ctx: typer.Context, value: bool) -> bool:
        ctx.meta[name] = value
        return value

    return note


JsonOption = Annotated[
    bool,
    typer.Option("--json", callback=_remember("json"), help="Print one JSON object on stdout, and nothing else there."),
]
DebugOption = Annotated[
    bool, typer.Option("--debug", callback=_remember("debug"), help="Show where in the code an error came from.")
]
RamBudgetOption = Annotated[
    str | None,
    typer.Option("--ram-budget", metavar="SIZE", help="The most the whole process may use, such as 4GB."),
]
TensorBudgetOption = Annotated[
    str | None, typer.Option("--tensor-budget", metavar="SIZE", help="The most the weights in memory may use.")
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME|FILE",
        help="Settings for a sort of machine, where no option says otherwise: auto (the one that fits; see doctor), "
        "a name, or a .toml file.",
    ),
]
CodecOption = Annotated[
    str,
    typer.Option(
        "--codec",
        help="How weights are stored: auto, none (as they are), or a codec such as int8_rotated, int8 or int4.",
    ),
]
CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        metavar="DIR",
        help="Where packed checkpoints and cached results lie. (default: $QWEN3VL_MEM_CACHE, or ~/.cache/qwen3vl-mem)",
    ),
]


def typed(ctx: typer.Context, **settings: Any) -> dict[str, Any]:
    """Return those of a command's options that the user typed: a default is no wish, and a profile goes before it."""
    sources = {name: ctx.get_parameter_source(name) for name in settings}
    return {name: settings[name] for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


class CommandGroup(TyperGroup):
    """Shows what goes wrong as one line that says what to do, never as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: the command failed, and what there is to say was said.
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
    # No markup and no wrapping: the message may hold brackets, and paths that people copy.
    error_console().print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def console() -> Console:
    """Return the console for results."""
    from rich.console import Console

    return Console()


def error_console() -> Console:
    """Return the console for everything that is not a result."""
    from rich.console import Console

    return Console(stderr=True)


def print_json(value: Any) -> None:
    """Print the result of a command for machines."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


@contextlib.contextmanager
def progress_bar(*, quiet: bool = False, in_bytes: bool = True) -> Iterator[Progress]:
    """Give a callback (description, done, in all) that shows a bar with remaining time, and the rate of bytes.

    The bar lives on stderr and vanishes at the end. Without a terminal, or `quiet`, nothing is shown.
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
    """Show on stderr that something is being done that has no measure of progress."""
    screen = error_console()
    if quiet or not screen.is_terminal:
        yield
        return
    with screen.status(message):
        yield


def percent(share: float | None) -> str:
    """Return a share for people; a figure that is not there is a dash."""
    return "-" if share is None else f"{100 * share:.0f} %"
