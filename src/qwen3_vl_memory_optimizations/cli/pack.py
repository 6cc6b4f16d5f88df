"""`qwen3vl-mem pack`: encode a checkpoint before its first use."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common.output import (
    INPUT,
    MEMORY,
    CacheDirOption,
    CodecOption,
    DebugOption,
    JsonOption,
    ProfileOption,
    RamBudgetOption,
    console,
    print_json,
    typed,
)
from .common.progress import QuietOption, progress_line

if TYPE_CHECKING:
    from ..model.checkpoint.plan import CompressionPlan
    from ..planning import Need

_MOST_NAMED = 12


def pack(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Checkpoint directory, .gguf file, or Hugging Face model id.")
    ],
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="DIR",
            rich_help_panel=INPUT,
            help="Calibrate with the images and .txt files in DIR instead of the shipped ones; codecs auto and int4.",
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            rich_help_panel=INPUT,
            help="Codec int4: encode without calibration, in a tenth of the time; loses several times more.",
        ),
    ] = False,
    codec: CodecOption = "auto",
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            rich_help_panel=MEMORY,
            help="Use this compression plan, such as an edited one; replaces a checkpoint packed with auto.",
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE",
            rich_help_panel=MEMORY,
            help="Codec auto: mix 4, 8 and 16 bits so that the weights take at most SIZE, such as 2.4GB.",
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            metavar="N",
            rich_help_panel=MEMORY,
            help="The same, as an average number of bits per weight, such as 6.",
        ),
    ] = None,
    tolerance: Annotated[
        str | None,
        typer.Option(
            "--tolerance",
            metavar="PERCENT",
            rich_help_panel=MEMORY,
            help="Codec auto: the largest error of a layer's output, such as 5%; from there on, 4 bits are admitted. "
            "(default: 2%)",
        ),
    ] = None,
    profile: ProfileOption = None,
    ram_budget: RamBudgetOption = None,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Encode a checkpoint once for fast reads from the SSD.

    With codec auto, calibration images and a text first run through the model
    to choose a codec per weight; the plan is saved next to the packed
    checkpoint. With codec int4 they determine how each weight is encoded, which
    takes minutes. The first `generate` does the same. An interrupted pack resumes.

    Example: qwen3vl-mem pack ~/models/Qwen3-VL-2B-Instruct --fit 1.8GB
    """
    line = ctx.with_resource(progress_line(quiet=quiet or as_json))
    from ..errors import ConfigurationError
    from ..profiles import configure

    config = configure(typed(ctx, profile=profile, codec=codec, cache_dir=cache_dir, ram_budget=ram_budget))
    codec = config.codec
    from ..compression import create_codec  # imports torch, which mistakes above need not wait for

    if codec != "auto" and plan:
        raise ConfigurationError(f"--plan requires codec auto, not {codec!r}; drop one of them")
    if calibration and fast:
        raise ConfigurationError("--fast encodes without calibration; drop it or --calibration")
    if calibration and codec != "auto" and not create_codec(codec).compensates:
        raise ConfigurationError(
            f"--calibration requires codec auto, or int4 and the native core, not {codec!r}; drop one of them"
        )

    need = _need(fit, bits, tolerance, given=plan is not None or codec != "auto")

    from ..model.checkpoint.formats import needs_packing, open_checkpoint
    from ..model.checkpoint.packing import CALIBRATION_KEY, packed_directory, plan_path
    from ..model.checkpoint.plan import CompressionPlan
    from ..planning import pack_model
    from ..storage import Checkpoint

    source = open_checkpoint(model)
    if config.weight_codec() == "none" and not needs_packing(source):
        raise ConfigurationError(
            "codec 'none' needs no packing: this checkpoint is read directly; use it with generate"
        )
    given = None if plan is None else CompressionPlan.load(plan)
    packed = packed_directory(source, config.weight_codec(), config)
    before = packed.stat().st_ino if packed.is_dir() else None
    start = time.perf_counter()
    directory = pack_model(
        source, config, plan=given, calibration=calibration, fast=fast, need=need, progress=line.report
    )
    line.close()
    seconds = time.perf_counter() - start
    was_there = before is not None and directory.stat().st_ino == before
    report: dict[str, Any] = {
        "directory": str(directory),
        "codec": config.weight_codec(),
        "already_packed": was_there,
        "source_bytes": source.total_bytes,
        "packed_bytes": Checkpoint.open(directory).total_bytes,
        "seconds": None if was_there else seconds,
    }
    path = plan_path(source, config)
    used = CompressionPlan.load(path) if codec == "auto" and path.is_file() else None
    if used is not None:
        report |= {"plan": str(path), "calibrated_on": used.calibrated_on, "codecs": _by_codec(used)}
    elif codec != "auto" and create_codec(codec).compensates:
        report["calibrated_on"] = Checkpoint.open(directory).metadata.get(CALIBRATION_KEY)
    if as_json:
        print_json(report)
        return
    _show(report, used)


def _need(fit: str | None, bits: float | None, tolerance: str | None, *, given: bool) -> Need | None:
    """Return what the options ask of a new plan.

    Args:
        fit, bits, tolerance: as given.
        given: the codecs are given by other options.

    Raises:
        ConfigurationError: they contradict each other, or a value cannot be used.
    """
    from ..config import parse_size
    from ..errors import ConfigurationError
    from ..planning import Need

    named = [
        name for name, value in (("--fit", fit), ("--bits", bits), ("--tolerance", tolerance)) if value is not None
    ]
    if not named:
        return None
    if given:
        raise ConfigurationError(f"{named[0]} requires codec auto without --plan; drop one of them")
    if len(named) > 1:
        raise ConfigurationError(f"{named[0]} and {named[1]} exclude each other; drop one of them")
    if bits is not None and not 0 < bits <= 32:
        raise ConfigurationError(f"--bits: {bits:g} is not a number of bits per weight; use such as 4.6")
    share = None
    if tolerance is not None:
        try:
            share = float(tolerance.strip().removesuffix("%")) / 100
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise ConfigurationError(f"--tolerance: {tolerance!r} is not a percentage; use such as 5%")
    return Need(None if fit is None else parse_size(fit, key="--fit"), bits, share)


def _show(report: dict[str, Any], plan: CompressionPlan | None) -> None:
    from ..errors import format_bytes

    before_bytes, after_bytes = report["source_bytes"], report["packed_bytes"]
    share = f"{100 * after_bytes / before_bytes:.0f} %"
    done = "already packed" if report["already_packed"] else f"packed in {report['seconds']:.1f} s"
    screen = console()
    sizes = f"{format_bytes(before_bytes)} -> {format_bytes(after_bytes)} ({share}, {report['codec']})"
    screen.print(f"[green]{done}[/green]: {sizes}", highlight=False)
    if plan is None and "calibrated_on" in report:
        inputs = report["calibrated_on"]
        text = f"calibrated on {inputs}" if inputs else "not calibrated, which loses more: pack without --fast"
        screen.print(text, markup=False, highlight=False, soft_wrap=True)
    if plan is not None:
        screen.print(_plan_table(plan), highlight=False)
        if plan.most_bytes is not None:
            for line in _steps(plan):
                screen.print(line, markup=False, highlight=False, soft_wrap=True)
        usual = max(report["codecs"], key=lambda name: report["codecs"][name]["weights"])
        fitted = plan.most_bytes is not None  # then all have one reason
        others = [(name, weight) for name, weight in plan.weights.items() if weight.codec != usual and not fitted]
        for name, weight in others[:_MOST_NAMED]:
            line = f"  {name}: {weight.codec}; {weight.why_not(usual)}"
            screen.print(line, markup=False, highlight=False, soft_wrap=True)
        if len(others) > _MOST_NAMED:
            screen.print(f"  and {len(others) - _MOST_NAMED} more: see the plan")
        screen.print(f"plan: {report['plan']}", markup=False, highlight=False, soft_wrap=True)
    screen.print(report["directory"], markup=False, highlight=False, soft_wrap=True)


def _by_codec(plan: CompressionPlan) -> dict[str, dict[str, Any]]:
    """Return the number of weights, bytes and largest measured error for each codec of a plan."""
    result: dict[str, dict[str, Any]] = {}
    for weight in plan.weights.values():
        row = result.setdefault(weight.codec, {"weights": 0, "bytes": 0, "largest_error": None})
        row["weights"] += 1
        row["bytes"] += weight.n_bytes
        if weight.relative_error is not None:
            row["largest_error"] = max(weight.relative_error, row["largest_error"] or 0.0)
    return result


def _steps(plan: CompressionPlan) -> list[str]:
    """Return what one step more or less than a plan would cost and gain."""
    from ..errors import format_bytes
    from ..model.checkpoint.fitting import loss_of, next_steps

    whole = loss_of(plan.weights) or 1.0
    lines = []
    for name, step in zip(("up", "down"), next_steps(plan.weights), strict=True):
        if step is not None:
            size = f"{'+' if step.n_bytes > 0 else '-'}{format_bytes(abs(step.n_bytes))}"
            loss = f"{100 * step.loss / whole:+.2f} %"
            lines.append(f"  one step {name}: {size}, summed error {loss} ({step.weight}: {step.codec})")
    return lines


def _plan_table(plan: CompressionPlan) -> Any:
    from rich.table import Table

    from ..errors import format_bytes

    title = f"Calibrated on {plan.calibrated_on}; tolerance {100 * plan.tolerance:g} %"
    table = Table(title=title, title_justify="left", box=None)
    for heading in ("codec", "weights", "size", "largest error"):
        table.add_column(heading, justify="left" if heading == "codec" else "right")
    for name, row in sorted(_by_codec(plan).items()):
        error = row["largest_error"]
        shown = "-" if error is None else f"{100 * error:.2f} %"
        table.add_row(name, str(row["weights"]), format_bytes(row["bytes"]), shown)
    return table
