"""`qwen3vl-mem top`: follow a run in the terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common.output import OUTPUT, CacheDirOption, DebugOption, JsonOption, console, print_json
from .common.progress import status as progress_text
from .dashboard import RunArgument, _runs_dir

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..monitoring.recording.run_file import RunFile

_LOOK_S = 0.5
_MAP_ROWS = 4
_STATE_MARKS = {"r": "█", "p": "█", "l": "▓", "w": "▓", "s": "·", "f": " "}
_KIND_COLOURS = {
    "weights": "blue",
    "kv_cache": "yellow",
    "vision_features": "green",
    "text_embeddings": "magenta",
    "general": "white",
}

Sample = tuple[float, Mapping[str, Any]]


def top(
    run: RunArgument = None,
    once: Annotated[bool, typer.Option("--once", rich_help_panel=OUTPUT, help="Print one frame and exit.")] = False,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Follow a run in the terminal: phase with time left, speed, memory, data placement, caches, alerts.

    Ctrl-C stops the display, not the run. Without a terminal, or with --json,
    print one frame.

    Example: qwen3vl-mem top
    """
    from ..monitoring.recording.run_file import RunFile, find_run

    followed = RunFile(find_run(run, _runs_dir(cache_dir)), limit=4)
    if as_json:
        from ..monitoring.dashboard.source import newest

        print_json({"header": followed.header, **newest(followed)})
        return
    screen = console()
    if once or not screen.is_terminal:
        screen.print(frame(followed, None, screen.width))
        return
    _follow(followed)


def _follow(followed: RunFile) -> None:
    from rich.live import Live

    from ..monitoring.rendering.charts import RATE_S

    screen = console()
    recent = deque([(followed.state.t, followed.state.snapshot)])
    with Live(frame(followed, None, screen.width), console=screen, auto_refresh=False) as live:
        try:
            while followed.running:
                time.sleep(_LOOK_S)
                followed.poll()
                t = followed.state.t
                if t > recent[-1][0]:
                    recent.append((t, followed.state.snapshot))
                while len(recent) > 1 and recent[1][0] <= t - RATE_S:
                    recent.popleft()
                live.update(frame(followed, recent[0] if len(recent) > 1 else None, screen.width), refresh=True)
        except KeyboardInterrupt:
            pass  # the last frame stays on the screen


def frame(followed: RunFile, before: Sample | None, width: int) -> RenderableType:
    """Render the latest state.

    Args:
        followed: the run.
        before: the earlier sample that rates are relative to; `None`: the first sample of the run.
        width: terminal width.
    """
    from rich.console import Group
    from rich.text import Text

    state, snapshot = followed.state, followed.state.snapshot
    if not snapshot:
        return Text("no data yet", style="dim")
    header = followed.header
    status = "running" if followed.running else "ended"
    what = " · ".join(
        str(each) for each in (header.get("command"), header.get("model"), f"process {header['pid']}") if each
    )
    title = Text(f"{what}  {state.t:.0f} s  ", style="bold")
    title.append(status, style="green" if followed.running else "dim")
    return Group(
        title,
        _phase(followed),
        _figures(state.t, snapshot, before or state.first),
        _memory_map(followed, width),
        _alerts(snapshot),
    )


def _phase(followed: RunFile) -> RenderableType:
    """Render what is computed, with its rate and time left."""
    from rich.text import Text

    from ..model.run.progress import Progress

    now = followed.state.snapshot.get("progress")  # absent from runs of earlier versions
    if not followed.running or now is None:
        return Text("idle" if followed.running else "-", style="dim")
    text = Text(f"{now['phase']}  ", style="bold green")
    return text.append(progress_text(Progress(**now)), style="not bold")


def _figures(t: float, snapshot: Mapping[str, Any], before: Sample | None) -> RenderableType:
    from rich.table import Table

    from ..monitoring.rendering.charts import figure_at
    from ..monitoring.rendering.formatting import show

    def now(path: str, unit: str = "share") -> str:
        return show(figure_at(snapshot, path.split(".")), unit)

    def rate(path: str, unit: str) -> str:
        before_s, earlier = before or (t, {})
        value, start = figure_at(snapshot, path.split(".")), figure_at(earlier, path.split("."))
        known = value is not None and start is not None and t > before_s
        return show((value - start) / (t - before_s) if known else None, unit)  # type: ignore[operator]

    table = Table.grid(padding=(0, 2))
    rows = [
        (
            "tokens/s",
            now("responses.tokens_per_s", "plain"),
            "time to first token",
            now("responses.first_token_s", "s"),
        ),
        ("process memory", now("process.rss_bytes", "bytes"), "peak", now("process.peak_rss_bytes", "bytes")),
        ("budget", _budget(snapshot), "non-evictable memory", now("budget.undroppable_share")),
        ("weight hit rate", now("paging.hit_rate"), "prefetch accuracy", now("prediction.prefetch_accuracy")),
        ("SSD reads", rate("paging.bytes_read", "bytes/s"), "SSD writes", rate("paging.bytes_written", "bytes/s")),
        ("SSD stall time", rate("paging.stall_s", "share"), "CPU cores in use", rate("process.cpu_s", "cores")),
        ("cache hit rate", now("cache.hit_rate"), "cache size in memory", now("cache.levels.cpu.used_bytes", "bytes")),
        (
            "compression ratio",
            now("metrics.compression_ratio", "times"),
            "compression quality",
            now("metrics.compression_quality"),
        ),
        ("fragmentation", now("fragmentation"), "responses", now("responses.count", "count")),
    ]
    for left, value, right, other in rows:
        table.add_row(f"[dim]{left}[/dim]", value, f"[dim]{right}[/dim]", other)
    return table


def _budget(snapshot: Mapping[str, Any]) -> str:
    from ..errors import format_bytes

    budget = snapshot["budget"]
    if budget["ram_budget_bytes"] is not None:
        return f"{format_bytes(budget['ram_budget_bytes'])} for the process"
    if budget["tensor_budget_bytes"] is not None:
        return f"{format_bytes(budget['tensor_budget_bytes'])} for tensors"
    return "none"


def _memory_map(followed: RunFile, width: int) -> RenderableType:
    """Render the pages as marks in the order of use, and a table of bytes per tier by kind and codec."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ..errors import format_bytes

    pages = followed.state.memory_map
    letters = [
        (tensor.kind, letter)
        for key, states in pages.states().items()
        for tensor in (pages.tensors[key],)
        for letter in states
    ]
    step = max(1, -(-len(letters) // (width * _MAP_ROWS)))
    marks = Text()
    for kind, letter in letters[::step]:
        marks.append(_STATE_MARKS[letter], style=_KIND_COLOURS.get(kind, "white"))
    table = Table(box=None, padding=(0, 2))
    for heading in ("kind", "codec"):
        table.add_column(heading)
    for heading in ("GPU", "memory", "SSD only"):
        table.add_column(heading, justify="right")
    held: dict[tuple[str, str], dict[str, int]] = {}
    for row in followed.state.snapshot["memory_map"]:
        held.setdefault((row["kind"], row["codec"]), {})[row["tier"]] = row["bytes"]
    for (kind, codec), tiers in held.items():
        colour = _KIND_COLOURS.get(kind, "white")
        figures = (format_bytes(tiers.get(tier, 0)) for tier in ("cpu", "ssd"))
        table.add_row(f"[{colour}]█[/{colour}] {kind}", codec, "absent", *figures)
    return Group(Text("█ in memory  ▓ in transit  · on SSD only", style="dim"), marks, table)


def _alerts(snapshot: Mapping[str, Any]) -> RenderableType:
    from rich.text import Text

    active = [row["message"] for row in snapshot["alerts"] if row["active"]]
    return (
        Text("\n".join(f"! {text}" for text in active), style="bold red") if active else Text("no alerts", style="dim")
    )
