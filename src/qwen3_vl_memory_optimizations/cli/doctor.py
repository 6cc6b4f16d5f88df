"""`qwen3vl-mem doctor`: describe and measure this machine, and estimate the speed of each model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._output import DebugOption, JsonOption, console, print_json, working

if TYPE_CHECKING:
    from rich.console import Console

_CODECS = ("none", "int8")
_PROMPT_ROWS = 128


def doctor(
    path: Annotated[
        Path | None,
        typer.Option("--path", metavar="DIR", help="Directory whose SSD is measured. (default: the cache directory)"),
    ] = None,
    ram_budget: Annotated[
        str | None,
        typer.Option("--ram-budget", metavar="SIZE", help="Memory limit of the process. (default: free memory)"),
    ] = None,
    profile: Annotated[
        str, typer.Option("--profile", metavar="NAME|FILE", help="Hardware profile to explain.")
    ] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Measure for less time, with less precision.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Describe this machine, its best hardware profile, and the estimated speed of each model.

    Example: qwen3vl-mem doctor --ram-budget 4GB
    """
    from ..config import MemoryConfig, parse_size
    from ..errors import ConfigurationError

    budget_bytes = None if ram_budget is None else parse_size(ram_budget, key="ram_budget")
    if path is not None and not path.is_dir():
        raise ConfigurationError(f"--path: {path} is not a directory; name an existing one")
    directory = path or MemoryConfig().packed_dir.parent

    with working("measuring this machine", quiet=as_json):
        report = _examine(directory, budget_bytes, profile, quick=quick)
    if as_json:
        print_json(report)
    else:
        _show(report, console())


def _examine(directory: Path, budget_bytes: int | None, profile: str, *, quick: bool) -> dict[str, Any]:
    from ..compression.kernels import fastest_dtype
    from ..figures import memory_bandwidth
    from ..hardware import detect_hardware
    from ._machine_report import energy_report, profile_report
    from ._measure import product_speeds
    from ._sizes import MODELS, encoded_bytes, estimate, least_budgets

    directory.mkdir(parents=True, exist_ok=True)
    hardware = detect_hardware(directory)
    budget_bytes = budget_bytes or hardware.available_ram_bytes
    ssd, ssd_problem = _ssd_bandwidth(directory, (64 if quick else 512) << 20)
    memory = memory_bandwidth((64 if quick else 256) << 20)
    runs = 3 if quick else 10
    return {
        "hardware": hardware.to_dict(),
        "profile": profile_report(profile, hardware, directory),
        "energy": energy_report(),
        "measured": {
            "ssd_directory": str(directory),
            "ssd_bytes_per_s": ssd,
            "ssd_problem": ssd_problem,
            "memory_bytes_per_s": memory,
            "decode_operations_per_s": product_speeds(1, runs=runs),
            "prompt_operations_per_s": product_speeds(_PROMPT_ROWS, runs=runs),
        },
        "compute_dtype": str(fastest_dtype()).removeprefix("torch."),
        "ram_budget_bytes": budget_bytes,
        "models": [
            {"name": shape.name, "parameters": shape.n_parameters}
            | {"vision_bytes": {codec: encoded_bytes(shape.vision_matrices(), codec) for codec in _CODECS}}
            | {"least_ram_budget_bytes": least_budgets(shape, fastest_dtype().itemsize)}
            for shape in MODELS
        ],
        "estimates": [
            dataclasses.asdict(
                estimate(
                    shape,
                    codec,
                    ram_budget_bytes=budget_bytes,
                    ssd_bytes_per_s=ssd,
                    memory_bytes_per_s=memory,
                )
            )
            for shape in MODELS
            for codec in _CODECS
        ],
    }


def _ssd_bandwidth(directory: Path, total_bytes: int) -> tuple[float | None, str | None]:
    """Return the bandwidth in bytes/s, or the problem, so that a full disk does not hide the rest of the report."""
    from ..errors import StorageError
    from ..storage.probe import measure_scratch_bandwidth

    try:
        return measure_scratch_bandwidth(directory, total_bytes=total_bytes), None
    except StorageError as error:
        return None, str(error)


def _show(report: dict[str, Any], screen: Console) -> None:
    from rich.table import Table

    from ._machine_report import show_energy, show_profile

    measured = report["measured"]
    screen.print("[bold]This machine[/bold]")
    facts = Table.grid(padding=(0, 2))
    for name, text in _facts(report):
        facts.add_row(f"  {name}", text)
    screen.print(facts, highlight=False)
    show_energy(report["energy"], screen)
    show_profile(report["profile"], screen)

    screen.print("\n[bold]Matrix products[/bold], billion operations per second")
    speeds = Table(box=None, padding=(0, 2))
    speeds.add_column("")
    kinds = measured["decode_operations_per_s"]
    for kind in kinds:
        speeds.add_column(kind, justify="right")
    for name, figures in (
        ("  decode (1 row)", kinds),
        (f"  prompt ({_PROMPT_ROWS} rows)", measured["prompt_operations_per_s"]),
    ):
        speeds.add_row(name, *(f"{figures[kind] / 1e9:.1f}" for kind in kinds))
    screen.print(speeds, highlight=False)
    prompt = measured["prompt_operations_per_s"]
    ratio = f"bf16 runs at {prompt['bfloat16'] / prompt['float32']:.2g} times the speed of fp32"
    screen.print(f"  compute dtype: [green]{report['compute_dtype']}[/green]; {ratio} on this machine", highlight=False)

    _show_estimates(report, screen)


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    from ..errors import format_bytes

    hardware, measured = report["hardware"], report["measured"]
    gpu = hardware["gpu"]
    ssd = measured["ssd_bytes_per_s"]
    ssd_text = f"not measured: {measured['ssd_problem']}" if ssd is None else f"{format_bytes(ssd)}/s"
    cores = f"{hardware['physical_cores']} cores, {hardware['logical_cores']} threads"
    memory = f"{format_bytes(hardware['ram_bytes'])}, {format_bytes(hardware['available_ram_bytes'])} free"
    return [
        ("processor", f"{hardware['cpu_model']} ({cores}, {hardware['cpu_capability']})"),
        ("memory", f"{memory}; read at {format_bytes(measured['memory_bytes_per_s'])}/s"),
        ("GPU", "none" if gpu is None else f"{gpu['name']}, {format_bytes(gpu['total_bytes'])}"),
        ("storage", f"{hardware['storage_type']}, read at {ssd_text}" if ssd else ssd_text),
        ("", f"in {measured['ssd_directory']}"),
    ]


def _show_estimates(report: dict[str, Any], screen: Console) -> None:
    from rich.table import Table

    from ..errors import format_bytes

    budget = format_bytes(report["ram_budget_bytes"])
    screen.print(f"\n[bold]Qwen3-VL within {budget}[/bold] (estimate from the measured bandwidths)")
    table = Table(box=None, padding=(0, 2))
    table.add_column("  model")
    table.add_column("codec")
    for heading in ("decoder", "in memory", "SSD reads per token", "tokens/s"):
        table.add_column(heading, justify="right")
    for row in report["estimates"]:
        rate = row["tokens_per_s"]
        table.add_row(
            f"  {row['model']}",
            "none (bf16)" if row["codec"] == "none" else row["codec"],
            format_bytes(row["decoder_bytes"]),
            format_bytes(row["resident_bytes"]),
            "-" if not row["read_bytes_per_token"] else format_bytes(row["read_bytes_per_token"]),
            "-" if rate is None else f"{rate:.2g}",
        )
    screen.print(table, highlight=False)
    screen.print("  An upper bound: only weight reads are assumed to take time.", style="dim")
    _show_least(report, screen)


def _show_least(report: dict[str, Any], screen: Console) -> None:
    from rich.table import Table

    from ..errors import format_bytes

    if not report.get("models"):
        return
    screen.print(
        f"\n[bold]Minimum --ram-budget[/bold] by prompt, in {report['compute_dtype']}; smaller budgets are refused"
    )
    table = Table(box=None, padding=(0, 2))
    table.add_column("  model")
    for heading in report["models"][0]["least_ram_budget_bytes"]:
        table.add_column(heading, justify="right")
    for row in report["models"]:
        table.add_row(f"  {row['name']}", *(format_bytes(each) for each in row["least_ram_budget_bytes"].values()))
    screen.print(table, highlight=False)
