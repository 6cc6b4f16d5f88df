"""`qwen3vl-mem cache`: inspect and clear the cached results of images and prompts on the SSD."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._output import CacheDirOption, Command, DebugOption, JsonOption, console, print_json

if TYPE_CHECKING:
    from ..storage import ContentStore

EXIT_PROBLEMS = 1

app = typer.Typer(
    name="cache",
    help="List, verify and clear the cached results of images and prompts on the SSD.",
    epilog="Example: qwen3vl-mem cache ls",
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
    """List cached entries, most recently used first.

    Example: qwen3vl-mem cache ls --json
    """
    from ..errors import format_bytes

    store = _store(cache_dir)
    rows = [_row(key, entry.n_bytes, entry.facts) for key, entry in store.index().entries.items()]
    rows.sort(key=lambda row: row["used_at"] or 0, reverse=True)
    if as_json:
        print_json({"directory": str(store.directory), "entries": rows})
        return
    screen = console()
    if not rows:
        screen.print(f"the cache in {store.directory} is empty", markup=False, highlight=False, soft_wrap=True)
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2))
    for heading in ("key", "kind"):
        table.add_column(heading)
    for heading in ("size", "uses", "time saved", "last used"):
        table.add_column(heading, justify="right")
    for row in rows:
        used_at = row["used_at"]
        table.add_row(
            row["key"][:12],
            row["kind"],
            format_bytes(row["n_bytes"]),
            str(row["uses"]),
            "-" if row["saved_s"] is None else f"{row['saved_s']:.2f} s",
            "-" if used_at is None else datetime.datetime.fromtimestamp(used_at).strftime("%Y-%m-%d %H:%M"),
        )
    screen.print(table, highlight=False)


@app.command("stats", cls=Command)
def show_stats(
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the cache size by kind and its read bandwidth.

    Example: qwen3vl-mem cache stats
    """
    from ..errors import format_bytes

    store = _store(cache_dir)
    index = store.index()
    kinds: dict[str, dict[str, int]] = {}
    for entry in index.entries.values():
        row = kinds.setdefault(_kind(entry.facts), {"entries": 0, "n_bytes": 0, "uses": 0})
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
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
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


def _row(key: str, n_bytes: int, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "key": key,
        "kind": _kind(facts),
        "n_bytes": n_bytes,
        "uses": int(facts.get("uses", 0)),
        "saved_s": facts.get("saved_s"),
        "used_at": facts.get("used_at"),
    }


def _kind(facts: dict[str, Any]) -> str:
    return str(facts.get("kind") or "unknown")
