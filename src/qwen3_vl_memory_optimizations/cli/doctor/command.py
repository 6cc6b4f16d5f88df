"""`qwen3vl-mem doctor`: which model, codec and budget to use on this machine, and what each would do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.defaults import active_defaults, config_file
from ..common.output import INPUT, MEMORY, OUTPUT, DebugOption, JsonOption, console, print_json
from ..common.progress import working

if TYPE_CHECKING:
    from rich.console import Console


def doctor(
    ctx: typer.Context,
    path: Annotated[
        Path | None,
        typer.Option(
            "--path",
            metavar="DIR",
            rich_help_panel=INPUT,
            help="Directory whose SSD is measured. (default: the cache directory)",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", rich_help_panel=INPUT, help="Measure for less time, with less precision.")
    ] = False,
    ram_budget: Annotated[
        str | None,
        typer.Option(
            "--ram-budget",
            metavar="SIZE",
            rich_help_panel=MEMORY,
            help="Estimate this memory limit alone. (default: up to the profile's, or the free memory if that is less)",
        ),
    ] = None,
    profile: Annotated[
        str,
        typer.Option("--profile", metavar="NAME|FILE", rich_help_panel=MEMORY, help="Hardware profile to explain."),
    ] = "auto",
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            rich_help_panel=OUTPUT,
            help="Also say why the model and the profile were chosen, the least budgets and the energy counters.",
        ),
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say which model, codec and budget to use on this machine, with the speed to expect.

    The table has the rest: for each model, codec and budget whether it fits,
    tokens per second, time to the first token per page, tokens that fit.

    Example: qwen3vl-mem doctor
             qwen3vl-mem doctor --ram-budget 4GB --verbose
    """
    from ...config import MemoryConfig, parse_size
    from ...errors import ConfigurationError

    budget_bytes = None if ram_budget is None else parse_size(ram_budget, key="ram_budget")
    if path is not None and not path.is_dir():
        raise ConfigurationError(f"--path: {path} is not a directory; name an existing one")
    directory = path or MemoryConfig().packed_dir.parent

    with working("measuring this machine", quiet=as_json):
        report = _examine(directory, budget_bytes, profile, quick=quick)
    report["defaults"] = [
        {"option": name, "value": value, "from": source}
        for name, value, source in active_defaults(ctx.find_root().command)
    ]
    if as_json:
        print_json(report)
    else:
        _show(report, console(), verbose=verbose)


def _examine(directory: Path, budget_bytes: int | None, profile: str, *, quick: bool) -> dict[str, Any]:
    from ...compression.kernels import fastest_dtype
    from ...hardware import detect_hardware
    from ...native import core
    from ..common.model_shapes import MODELS
    from ..common.model_sizes import encoded_bytes
    from .estimates import CODECS, estimate_all, least_budgets
    from .machine_report import energy_report, profile_report
    from .measurements import measure
    from .recommendation import recommend

    directory.mkdir(parents=True, exist_ok=True)
    native = core()
    hardware = detect_hardware(directory)
    chosen = profile_report(profile, hardware, directory)
    limit_bytes = budget_bytes or _limit_bytes(hardware.available_ram_bytes, chosen)
    measured = measure(directory, quick=quick)
    rows = estimate_all(measured, limit_bytes=limit_bytes, exact=budget_bytes is not None, cache_dir=None)
    return {
        "recommendation": dataclasses.asdict(recommend(rows, limit_bytes)),
        "estimates": [dataclasses.asdict(row) for row in rows],
        "ram_budget_bytes": limit_bytes,
        "hardware": hardware.to_dict(),
        "measured": {"ssd_directory": str(directory), **measured.to_dict()},
        "compute_dtype": str(fastest_dtype()).removeprefix("torch."),
        "kernels": "torch" if native is None else f"native, {native.isa}",
        "models": [
            {"name": shape.name, "parameters": shape.n_parameters}
            | {"decoder_bytes": {codec: encoded_bytes(shape.decoder_matrices(), codec) for codec in CODECS}}
            | {"vision_bytes": {codec: encoded_bytes(shape.vision_matrices(), codec) for codec in CODECS}}
            | {"least_ram_budget_bytes": least_budgets(shape)}
            for shape in MODELS
        ],
        "profile": chosen,
        "energy": energy_report(),
    }


def _limit_bytes(available_bytes: int, profile: dict[str, Any]) -> int:
    """Return the most memory to recommend: what the profile leaves to other programs is not for this one."""
    settings = profile["chosen"]["settings"] if profile["chosen"] else {}
    budget = settings.get("ram_budget")
    return min(available_bytes, budget) if isinstance(budget, int) else available_bytes


def _show(report: dict[str, Any], screen: Console, *, verbose: bool) -> None:
    from .machine_report import show_defaults, show_energy, show_profile
    from .recommendation import RULE
    from .show import show_answer, show_estimates, show_least, show_machine

    show_answer(report, screen)
    if verbose:
        screen.print(f"Rule: {RULE}.", style="dim", markup=False, highlight=False, soft_wrap=True)
    show_estimates(report["estimates"], screen)
    show_machine(report, screen)
    show_profile(report["profile"], screen, verbose=verbose)
    if verbose:
        show_defaults(report["defaults"], config_file(), screen)
        show_least(report["models"], report["compute_dtype"], screen)
        show_energy(report["energy"], screen)
