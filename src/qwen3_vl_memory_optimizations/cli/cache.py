"""`qwen3vl-mem cache`: inspect, remove and clear the cached results of images and prompts on the SSD."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common.commands import Command, CommandGroup
from .common.output import OUTPUT, CacheDirOption, DebugOption, JsonOption, console, print_json

if TYPE_CHECKING:
    from ..cache import KeptResult
    from ..storage import ContentStore

EXIT_PROBLEMS = 1

app = typer.Typer(
    name="cache",
    cls=CommandGroup,
    help="""List, verify and remove the cached results of images and prompts on the SSD.

Example: qwen3vl-mem cache ls

qwen3vl-mem cache clear --yes
""",
    no_args_is_help=True,
)


def _store(cache_dir: Path | None) -> ContentStore:
    from ..config import MemoryConfig
    from ..storage import ContentStore

    return ContentStore(MemoryConfig(cache_dir=cache_dir).reuse_dir)


@app.command("ls", cls=Command)
def list_entries(
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List cached results, most recently used first, and what the cache directory holds in all.

    A result is a picture, or the keys and values of prompts that begin
    alike. It is named after the file and the prompt that it was made from.

    Example: qwen3vl-mem cache ls --json
    """
    from ..cache import kept_results
    from ..errors import format_bytes

    store = _store(cache_dir)
    results = kept_results(store)
    totals = _totals(cache_dir, results)
    if as_json:
        rows = [dataclasses.asdict(result) | {"entries": len(result.keys)} for result in results]
        print_json({"directory": str(store.directory), "results": rows, "totals": totals})
        return
    screen = console()
    if not results:
        screen.print(f"the cache in {store.directory} is empty", markup=False, highlight=False, soft_wrap=True)
    else:
        screen.print(_results_table(results), highlight=False)
        screen.print()
    for kind, total in totals.items():
        text = f"{kind}: {total['count']}, {format_bytes(total['n_bytes'])}"
        screen.print(text, markup=False, highlight=False, soft_wrap=True)


def _results_table(results: list[KeptResult]) -> Any:
    from rich.table import Table

    from ..errors import format_bytes

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("id", no_wrap=True)
    table.add_column("made from", overflow="fold")
    table.add_column("kind")
    for heading in ("size", "hits", "saves", "last use"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in results:
        table.add_row(
            each.key[:12],
            each.label or "-",
            each.kind,
            format_bytes(each.n_bytes),
            str(each.hits),
            "-" if each.saved_s is None else f"{each.saved_s:.2f} s",
            "-" if each.used_at is None else datetime.datetime.fromtimestamp(each.used_at).strftime("%Y-%m-%d %H:%M"),
        )
    return table


def _totals(cache_dir: Path | None, results: list[KeptResult]) -> dict[str, dict[str, int]]:
    """Return number and bytes of results by kind, of packed models and of recorded runs."""
    from ..config import MemoryConfig
    from ..model.sources.inventory import packed_forms
    from ..monitoring.recording.run_file import recorded_runs, runs_dir

    config = MemoryConfig(cache_dir=cache_dir)
    sizes: dict[str, list[int]] = {}
    for result in results:
        sizes.setdefault(result.kind, []).append(result.n_bytes)
    sizes = dict(sorted(sizes.items()))
    sizes["packed models"] = [model.n_bytes for model in packed_forms(config)]
    sizes["recorded runs"] = []
    for path in recorded_runs(runs_dir(config)):
        with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
            sizes["recorded runs"].append(path.stat().st_size)
    return {kind: {"count": len(each), "n_bytes": sum(each)} for kind, each in sizes.items()}


@app.command("rm", cls=Command)
def remove(
    key: Annotated[str, typer.Argument(metavar="ID", help="Id of a result, as cache ls shows it.")],
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove one result; it is computed again when it is needed. Packed models: models rm.

    Example: qwen3vl-mem cache rm 3f9a61c20b7d
    """
    from ..cache import find_result, remove_result
    from ..errors import format_bytes

    store = _store(cache_dir)
    result = find_result(store, key)
    remove_result(store, result)
    if as_json:
        print_json({"removed": result.key, "entries": len(result.keys), "freed_bytes": result.n_bytes})
        return
    line = f"removed {result.label or result.key[:12]} ({result.kind}, {format_bytes(result.n_bytes)})"
    console().print(line, markup=False, highlight=False, soft_wrap=True)


@app.command("stats", cls=Command)
def show_stats(
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the cache size by kind and its read bandwidth.

    Example: qwen3vl-mem cache stats
    """
    from ..cache import kind_of
    from ..errors import format_bytes

    store = _store(cache_dir)
    index = store.index()
    kinds: dict[str, dict[str, int]] = {}
    for entry in index.entries.values():
        row = kinds.setdefault(kind_of(entry.facts), {"entries": 0, "n_bytes": 0, "uses": 0})
        row["entries"] += 1
        row["n_bytes"] += entry.n_bytes
        row["uses"] += int(entry.facts.get("uses", 0))
    rate = index.state.get("read_bytes_per_s")
    if as_json:
        print_json(
            {
                "directory": str(store.directory),
                "entries": len(index.entries),
                "n_bytes": index.used_bytes,
                "read_bytes_per_s": rate,
                "kinds": kinds,
            }
        )
        return
    screen = console()
    screen.print(f"{len(index.entries)} entries, {format_bytes(index.used_bytes)}", highlight=False)
    for name, row in sorted(kinds.items()):
        text = f"  {name}: {row['entries']} entries, {format_bytes(row['n_bytes'])}, used {row['uses']} times"
        screen.print(text, markup=False, highlight=False)
    screen.print("read bandwidth: " + ("not measured yet" if rate is None else f"{format_bytes(rate)}/s"))
    screen.print(str(store.directory), markup=False, highlight=False, soft_wrap=True)


@app.command("verify", cls=Command)
def verify(
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Verify the checksum of every entry; exit with 1 if one is damaged.

    Damaged entries are never used: a lookup is a miss and removes the entry.

    Example: qwen3vl-mem cache verify
    """
    store = _store(cache_dir)
    problems = [{"path": path, "problem": problem} for path, problem in store.verify()]
    n_entries = len(store.index().entries)
    if as_json:
        print_json({"directory": str(store.directory), "entries": n_entries, "problems": problems})
    else:
        screen = console()
        for each in problems:
            screen.print(each["problem"], style="red", markup=False, highlight=False, soft_wrap=True)
        good = n_entries - len(problems) if problems else n_entries
        screen.print(f"{n_entries} entries are intact" if not problems else f"{max(good, 0)} entries are intact")
    if problems:
        raise typer.Exit(EXIT_PROBLEMS)


@app.command("clear", cls=Command)
def clear(
    cache_dir: CacheDirOption = None,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", "-y", allow_from_autoenv=False, rich_help_panel=OUTPUT, help="Do not ask for confirmation."
        ),
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove all cached entries.

    Example: qwen3vl-mem cache clear --yes
    """
    from ..errors import format_bytes

    store = _store(cache_dir)
    index = store.index()
    n_entries, n_bytes = len(index.entries), index.used_bytes
    if n_entries and not yes and not as_json:
        typer.confirm(f"Remove {n_entries} entries ({format_bytes(n_bytes)}) from {store.directory}?", abort=True)
    removed = store.clear()
    if as_json:
        print_json({"directory": str(store.directory), "removed": removed, "freed_bytes": n_bytes})
    else:
        console().print(f"removed {removed} entries ({format_bytes(n_bytes)})", highlight=False)
