"""The classes of commands: defaults from the environment and a file, help texts, and errors as one line."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ...errors import ConfigurationError, MemoryOptimizationError
from .defaults import config_file, environment_name, file_defaults, option_name
from .output import EXIT_ERROR, EXIT_INTERRUPTED, OUTPUT, error_console, print_json

_UsageError: Any = typer.BadParameter.__base__  # typer brings its own click since 0.26
_WHERE_DEFAULTS_ARE = (
    "Options can also be set in the environment (QWEN3VL_MEM_RAM_BUDGET=2GB) and in ~/.config/qwen3vl-mem/config.toml."
)


class Command(TyperCommand):
    """A command whose options have environment variables, and whose help groups all of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _add_variables(self.params)
        self.epilog = self.epilog or _WHERE_DEFAULTS_ARE

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line; required arguments without braces."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help text."""
        with _as_shown(self.get_params(ctx)):
            super().format_help(ctx, formatter)


class CommandGroup(TyperGroup):
    """A group of commands; its help is that of a command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _add_variables(self.params)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line; required arguments without braces."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help text."""
        with _as_shown(self.get_params(ctx)):
            super().format_help(ctx, formatter)


class Program(CommandGroup):
    """All commands: reads the config file, and reports errors as one line with advice, never as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: the command failed and its error was printed.
        """
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        arguments = [*ctx._protected_args, *ctx.args]
        try:
            if "--help" not in arguments:  # a wrong file must not hide the help
                ctx.default_map = file_defaults(self)
            return super().invoke(ctx)
        except KeyboardInterrupt:
            error_console().print("stopped", style="yellow")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except _UsageError as error:
            place = _place_of_default(error)
            if place is not None:
                wrong = ConfigurationError(f"{place}: {error.message}")
                _show_error(wrong, debug=False, as_json="--json" in arguments)
                raise typer.Exit(EXIT_ERROR) from None
            if "--json" in sys.argv:
                print_json({"error": {"type": "UsageError", "message": error.format_message()}})
            raise
        except BrokenPipeError:
            raise
        except (MemoryOptimizationError, OSError) as error:
            _show_error(
                error,
                debug=ctx.meta.get("debug", "--debug" in arguments),
                as_json=ctx.meta.get("json", "--json" in arguments),
            )
            raise typer.Exit(EXIT_ERROR) from None


def _place_of_default(error: Any) -> str | None:
    """Return where the user set the value that an error is about; `None`: on the command line, or nowhere."""
    param, ctx = getattr(error, "param", None), error.ctx
    source = None if param is None or ctx is None else ctx.get_parameter_source(param.name)
    if param is None or source is None or source.name not in ("ENVIRONMENT", "DEFAULT_MAP"):
        return None
    return str(param.envvar) if source.name == "ENVIRONMENT" else f"{config_file()}: {option_name(param)}"


def _add_variables(params: Sequence[Any]) -> None:
    for param in params:
        if param.param_type_name == "option":
            param.envvar, param.show_envvar = environment_name(param), False  # the epilog describes all of them


@contextlib.contextmanager
def _as_shown(params: Sequence[Any]) -> Iterator[None]:
    """Describe parameters by plain names while a help text is written."""
    before = [(param, dict(vars(param))) for param in params]
    for param in params:
        if param.param_type_name == "option":
            param.min = param.max = None
            param.rich_help_panel = param.rich_help_panel or OUTPUT
            if param.is_flag:
                param.metavar = ""
        else:
            param.display_type_rich = _no_type
    try:
        yield
    finally:
        for param, attributes in before:
            vars(param).clear()
            vars(param).update(attributes)


def _no_type(ctx: Any) -> None:
    """Describe an argument by its name alone."""


def _show_error(error: Exception, *, debug: bool, as_json: bool) -> None:
    if debug:
        traceback.print_exception(error)
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": str(error)}})
    # No markup, no wrapping: messages may contain brackets, and paths to copy.
    error_console().print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
