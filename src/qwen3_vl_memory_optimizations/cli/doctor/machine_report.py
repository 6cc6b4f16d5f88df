"""The profile and energy sections of `qwen3vl-mem doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ...hardware import HardwareProfile


def profile_report(profile: str, hardware: HardwareProfile, directory: Path) -> dict[str, Any]:
    """Return the profile chosen for this machine and why, or the problem: it must not hide the rest of the report."""
    from ...errors import ConfigurationError
    from ...profiles import choose, user_directory

    report: dict[str, Any] = {"asked_for": profile, "user_directory": str(user_directory()), "problem": None}
    try:
        return report | {"chosen": choose(profile, hardware, path=directory).to_dict()}
    except ConfigurationError as error:
        return report | {"chosen": None, "problem": str(error)}


def energy_report() -> dict[str, Any]:
    """Return this machine's energy counters, or why a part has none."""
    from ...energy import EnergyMeter

    meter = EnergyMeter()
    try:
        return meter.to_dict()
    finally:
        meter.close()


def show_profile(report: dict[str, Any], screen: Console, *, verbose: bool) -> None:
    """Print the profile and its settings; with `verbose` the conditions, and why the others were not chosen."""
    screen.print("\n[bold]Hardware profile[/bold]")
    chosen = report["chosen"]
    if chosen is None:
        _rows([("none", report["problem"])], screen)
        return
    sets = ", ".join(f"{key} = {_text(key, value)}" for key, value in chosen["settings"].items()) or "-"
    if not verbose:
        _rows([(chosen["name"], chosen["why"]), ("sets", sets)], screen)
        return
    conditions = [f"{each['wanted']} ({each['found']})" for each in chosen["conditions"] if each["met"]]
    unmet = [f"{each['wanted']} ({each['found']})" for each in chosen["conditions"] if not each["met"]]
    rows = [(chosen["name"], chosen["why"]), ("matches", "; ".join(conditions) or "any machine (it has no conditions)")]
    if unmet:
        rows.append(("does not match", f"{'; '.join(unmet)}; used because you requested it"))
    rows.append(("sets", sets))
    rows += [("ignored", f"{key}: {reason}") for key, reason in chosen["left_out"].items()]
    rows.append(("file", chosen["file"]))
    for other in chosen["considered"]:
        missed = [f"{each['wanted']} ({each['found']})" for each in other["conditions"] if not each["met"]]
        rows.append((f"not {other['name']}", "; ".join(missed) if missed else "also matches, but has a lower priority"))
    asked_for = report["asked_for"]
    rows.append(("command line", f"qwen3vl-mem generate MODEL -p QUESTION --profile {asked_for}"))
    rows.append(("Python", f'create_optimized_model(MODEL, {{"profile": "{asked_for}"}})'))
    rows.append(("add your own", f".toml file in {report['user_directory']}"))
    _rows(rows, screen)


def show_defaults(defaults: Sequence[dict[str, str]], path: Path, screen: Console) -> None:
    """Print the options that are set in the environment and in the config file."""
    screen.print("\n[bold]Defaults of options[/bold]")
    rows = [(each["option"], f"{each['value']} ({each['from']})") for each in defaults]
    _rows(rows or [("none", f"set in the environment or in {path}")], screen)


def show_energy(report: dict[str, Any], screen: Console) -> None:
    """Print the energy counters."""
    screen.print("\n[bold]Energy[/bold]")
    counted = {part: ", ".join(found["counters"]) for part, found in report.items()}
    _rows(
        [
            (part, f"measured by {counted[part]}" if counted[part] else found["absent"])
            for part, found in report.items()
        ],
        screen,
    )


def _rows(rows: list[tuple[str, str]], screen: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(Text(f"  {name}"), Text(text, overflow="fold"))  # paths and settings may contain brackets
    screen.print(table, highlight=False)


def _text(key: str, value: Any) -> str:
    """Format a setting."""
    from ...errors import format_bytes

    if isinstance(value, bool):
        return "on" if value else "off"
    is_size = isinstance(value, int) and key.endswith(("_size", "_budget"))
    return format_bytes(value) if is_size else str(value)
