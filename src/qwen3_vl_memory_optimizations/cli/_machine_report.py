"""What `qwen3vl-mem doctor` says of profiles and of energy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ..hardware import HardwareProfile


def profile_report(profile: str, hardware: HardwareProfile, directory: Path) -> dict[str, Any]:
    """Return which profile this machine gets and why, or what is wrong: that must not hide the rest of the report."""
    from ..errors import ConfigurationError
    from ..profiles import choose, user_directory

    report: dict[str, Any] = {"asked_for": profile, "user_directory": str(user_directory()), "problem": None}
    try:
        return report | {"chosen": choose(profile, hardware, path=directory).to_dict()}
    except ConfigurationError as error:
        return report | {"chosen": None, "problem": str(error)}


def energy_report() -> dict[str, Any]:
    """Return what of this machine's energy is counted, and why the rest is not."""
    from ..energy import EnergyMeter

    meter = EnergyMeter()
    try:
        return meter.to_dict()
    finally:
        meter.close()


def show_profile(report: dict[str, Any], screen: Console) -> None:
    """Print the profile, the conditions that it met, what it sets, and why it is none of the others."""
    screen.print("\n[bold]Profile[/bold]")
    chosen = report["chosen"]
    if chosen is None:
        _rows([("none", report["problem"])], screen)
        return
    conditions = [f"{each['wanted']} ({each['found']})" for each in chosen["conditions"] if each["met"]]
    unmet = [f"{each['wanted']} ({each['found']})" for each in chosen["conditions"] if not each["met"]]
    rows = [(chosen["name"], chosen["why"]), ("fits by", "; ".join(conditions) or "no condition at all")]
    if unmet:
        rows.append(("not by", f"{'; '.join(unmet)}; taken because it was asked for"))
    rows.append(("sets", ", ".join(f"{key} = {_text(key, value)}" for key, value in chosen["settings"].items()) or "-"))
    rows += [("leaves out", f"{key}: {reason}") for key, reason in chosen["left_out"].items()]
    rows.append(("file", chosen["file"]))
    for other in chosen["considered"]:
        missed = [f"{each['wanted']} ({each['found']})" for each in other["conditions"] if not each["met"]]
        rows.append((f"not {other['name']}", "; ".join(missed) if missed else "fits too, but comes after"))
    asked_for = report["asked_for"]
    rows.append(("to use it", f"qwen3vl-mem generate MODEL -p QUESTION --profile {asked_for}"))
    rows.append(("", f'create_optimized_model(MODEL, {{"profile": "{asked_for}"}})'))
    rows.append(("to add one", f"a .toml file in {report['user_directory']}"))
    _rows(rows, screen)


def show_energy(report: dict[str, Any], screen: Console) -> None:
    """Print what is counted."""
    screen.print("\n[bold]Energy[/bold]")
    counted = {part: ", ".join(found["counters"]) for part, found in report.items()}
    _rows(
        [(part, f"counted: {counted[part]}" if counted[part] else found["absent"]) for part, found in report.items()],
        screen,
    )


def _rows(rows: list[tuple[str, str]], screen: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(f"  {name}", Text(text, overflow="fold"))  # paths and settings may hold brackets
    screen.print(table, highlight=False)


def _text(key: str, value: Any) -> str:
    """Return a setting for people."""
    from ..errors import format_bytes

    if isinstance(value, bool):
        return "on" if value else "off"
    is_size = isinstance(value, int) and key.endswith(("_size", "_budget"))
    return format_bytes(value) if is_size else str(value)
