"""`qwen3vl-mem models`: list the models on this machine, and remove one."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Annotated, Any

import typer

from .common.commands import Command, CommandGroup
from .common.output import OUTPUT, CacheDirOption, DebugOption, JsonOption, console, print_json

app = typer.Typer(
    name="models",
    cls=CommandGroup,
    help="""List the models on this machine: downloaded checkpoints and their packed forms; remove one.

Example: qwen3vl-mem models

qwen3vl-mem models rm Qwen/Qwen3-VL-2B-Instruct
""",
    no_args_is_help=False,
    invoke_without_command=True,
)


@app.callback()
def models(
    ctx: typer.Context,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    # Without a subcommand: `models ls`; the help text is passed to `Typer`.
    if ctx.invoked_subcommand is None:
        list_all(cache_dir, as_json, debug)


@app.command("ls", cls=Command)
def list_all(
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List models with their size and last use.

    Checkpoints are those in the hub cache, and those used from other
    directories. Packed forms are what a run reads.

    Example: qwen3vl-mem models
    """
    from ..config import MemoryConfig
    from ..errors import format_bytes
    from ..model.sources.hub import hub_cache
    from ..model.sources.inventory import PACKED, list_models

    config = MemoryConfig(cache_dir=cache_dir)
    found = list_models(config)
    if as_json:
        places = {"hub_cache": str(hub_cache()), "packed_directory": str(config.packed_dir)}
        print_json(places | {"models": [dataclasses.asdict(each) for each in found]})
        return
    screen = console()
    if not found:
        screen.print("no models yet; download one: qwen3vl-mem pull Qwen/Qwen3-VL-2B-Instruct", highlight=False)
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("model", overflow="fold")
    table.add_column("form")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("last use", justify="right", no_wrap=True)
    for each in found:
        form = f"packed, {each.codec}" if each.kind == PACKED else "checkpoint"
        table.add_row(
            each.name,
            form if each.complete else f"{form}, incomplete",
            format_bytes(each.n_bytes),
            "-" if each.used_at is None else datetime.datetime.fromtimestamp(each.used_at).strftime("%Y-%m-%d %H:%M"),
        )
    screen.print(table, highlight=False)
    total = sum(each.n_bytes for each in found if each.removable)
    screen.print(
        f"{format_bytes(total)} in {hub_cache()} and {config.packed_dir}", markup=False, highlight=False, soft_wrap=True
    )


@app.command("rm", cls=Command)
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a model as `models` shows it.")],
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", "-y", allow_from_autoenv=False, rich_help_panel=OUTPUT, help="Do not ask for confirmation."
        ),
    ] = False,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove a downloaded checkpoint or a packed form.

    A packed form is made again at the next use of its checkpoint. A model
    that a running process uses is not removed.

    Example: qwen3vl-mem models rm Qwen/Qwen3-VL-2B-Instruct
    """
    from ..config import MemoryConfig
    from ..errors import format_bytes
    from ..model.sources.inventory import find_model, remove_model, require_removable

    config = MemoryConfig(cache_dir=cache_dir)
    model = find_model(name, config)
    require_removable(model)
    if not yes and not as_json:
        typer.confirm(f"Remove {model.name} ({format_bytes(model.n_bytes)}) from {model.directory.parent}?", abort=True)
    freed = remove_model(model, config)
    report: dict[str, Any] = {"removed": model.name, "directory": str(model.directory), "freed_bytes": freed}
    if as_json:
        print_json(report)
    else:
        line = f"removed {model.name} ({format_bytes(freed)})"
        console().print(line, markup=False, highlight=False, soft_wrap=True)
