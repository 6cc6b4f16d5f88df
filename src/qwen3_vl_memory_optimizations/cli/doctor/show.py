"""Print the report of `qwen3vl-mem doctor`: the answer, the estimates, then the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import format_bytes, format_duration

if TYPE_CHECKING:
    from rich.console import Console

_NOTED_SPREAD = 0.2


def show_answer(report: dict[str, Any], screen: Console) -> None:
    """Print the recommendation."""
    for number, line in enumerate(report["recommendation"]["lines"]):
        style = "bold" if not number else None
        screen.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def show_estimates(rows: Sequence[dict[str, Any]], screen: Console) -> None:
    """Print what each model does with each codec in a budget."""
    from rich.table import Table

    screen.print("\n[bold]Qwen3-VL on this machine[/bold]; a page is A4 at --detail document")
    table = Table(box=None, padding=(0, 1))
    table.add_column("  model")
    table.add_column("codec", no_wrap=True)
    for heading in ("budget", "weights", "tokens/s", "per page", "tokens (pages)"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"  {row['model']}",
            row["codec"],
            format_bytes(row["budget_bytes"]),
            _fit(row),
            "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.2g}",
            "-" if row["page_s"] is None else format_duration(row["page_s"]),
            f"{row['tokens']:,} ({row['pages']:,})" if row["tokens"] else "-",
        )
    screen.print(table, highlight=False)
    source = (
        "measured in runs"
        if any(row["measured"] for row in rows)
        else "estimated from the rates below, until models run here"
    )
    for note in (
        f"Speeds: {source}.",
        "SSD: read from it per token. Tokens: what fits in memory beside all weights.",
    ):
        screen.print(f"  {note}", style="dim", highlight=False)


def show_machine(report: dict[str, Any], screen: Console) -> None:
    """Print the hardware and the measured rates."""
    from rich.table import Table

    from .measurements import PROMPT_ROWS

    measured = report["measured"]
    screen.print("\n[bold]This machine[/bold]")
    facts = Table.grid(padding=(0, 2))
    for name, text in _facts(report):
        facts.add_row(f"  {name}", text)
    screen.print(facts, highlight=False)
    screen.print("\n[bold]Matrix products[/bold], billion operations per second")
    speeds = Table(box=None, padding=(0, 2))
    speeds.add_column("")
    kinds = measured["decode_operations_per_s"]
    for kind in kinds:
        speeds.add_column(kind, justify="right")
    for name, figures in (
        ("decode (1 row)", kinds),
        (f"prompt ({PROMPT_ROWS} rows)", measured["prompt_operations_per_s"]),
    ):
        spreads = [measured["spreads"].get(f"{name.split()[0]} {kind}", 0.0) for kind in kinds]
        cells = (f"{figures[kind] / 1e9:.1f}{_spread(spread)}" for kind, spread in zip(kinds, spreads, strict=True))
        speeds.add_row(f"  {name}", *cells)
    screen.print(speeds, highlight=False)
    prompt = measured["prompt_operations_per_s"]
    ratio = f"bf16 runs at {prompt['bfloat16'] / prompt['float32']:.2g} times the speed of fp32"
    screen.print(f"  compute dtype: [green]{report['compute_dtype']}[/green]; {ratio} on this machine", highlight=False)
    if report["kernels"] == "torch":
        kernels = "[yellow]torch's, which are slower[/yellow]: the native core was not compiled (no C++ compiler)"
    else:
        kernels = f"[green]{report['kernels']}[/green]"
    screen.print(f"  kernels: {kernels}", highlight=False, soft_wrap=True)
    if max(measured["spreads"].values(), default=0.0) > _NOTED_SPREAD:
        screen.print(
            "  ±: readings differ by more than 20 %; other programs are running, without them it is faster.",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def show_least(models: Sequence[dict[str, Any]], compute_dtype: str, screen: Console) -> None:
    """Print the least budgets by prompt."""
    from rich.table import Table

    screen.print(f"\n[bold]Minimum --ram-budget[/bold] by prompt, in {compute_dtype}; smaller budgets are refused")
    table = Table(box=None, padding=(0, 2))
    table.add_column("  model")
    for heading in models[0]["least_ram_budget_bytes"]:
        table.add_column(heading, justify="right")
    for row in models:
        table.add_row(f"  {row['name']}", *(format_bytes(each) for each in row["least_ram_budget_bytes"].values()))
    screen.print(table, highlight=False)


def _fit(row: dict[str, Any]) -> str:
    if not row["fits"]:
        return f"needs {format_bytes(row['least_bytes'])}"
    return "in memory" if row["in_memory"] else f"SSD {format_bytes(row['read_bytes_per_token'])}"


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    hardware, measured = report["hardware"], report["measured"]
    gpu, ssd, spreads = hardware["gpu"], measured["ssd_bytes_per_s"], measured["spreads"]
    read = None if ssd is None else f"read at {format_bytes(ssd)}/s{_spread(spreads.get('storage', 0.0))}"
    cores = f"{hardware['physical_cores']} cores, {hardware['logical_cores']} threads"
    memory = f"{format_bytes(hardware['ram_bytes'])}, {format_bytes(hardware['available_ram_bytes'])} free"
    rate = f"{format_bytes(measured['memory_bytes_per_s'])}/s{_spread(spreads.get('memory', 0.0))}"
    return [
        ("processor", f"{hardware['cpu_model']} ({cores}, {hardware['cpu_capability']})"),
        ("memory", f"{memory}; read at {rate}"),
        ("GPU", "none" if gpu is None else f"{gpu['name']}, {format_bytes(gpu['total_bytes'])}"),
        ("storage", f"{hardware['storage_type']}, {read}" if read else f"not measured: {measured['ssd_problem']}"),
        ("", f"in {measured['ssd_directory']}"),
    ]


def _spread(spread: float) -> str:
    """Return the spread of readings as text if it is worth a note."""
    return f" ±{50 * spread:.0f} %" if spread > _NOTED_SPREAD else ""
