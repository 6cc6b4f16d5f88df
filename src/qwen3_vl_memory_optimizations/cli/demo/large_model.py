"""The second act of the demonstration: a large model, in a budget far below its size and with plain transformers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MemoryOptimizationError, StorageError, format_bytes
from ..common.model_shapes import MODELS, ModelShape, SpecialTokens
from ..common.model_sizes import PROCESS_BYTES
from ..common.progress import progress_line, working
from ..common.random_checkpoint import weight_bytes, write_checkpoint

if TYPE_CHECKING:
    from rich.console import Console

    from ...model.checkpoint.packing import Progress

SHAPE = MODELS[0]
"""Qwen3-VL-2B."""
LAYERS = 16
"""All 28 take twice as long."""

_QUESTION = "what clothing item is this?"
_PREFIX = "demo-checkpoint-"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_EXTRA_DISK_BYTES = 100_000_000
"""Tokenizer, headers, and what the libraries keep."""


def check_disk(shape: ModelShape, base_dir: Path) -> None:
    """Check that a checkpoint can be written below a directory, and is not in memory there.

    Raises:
        StorageError: the directory is in memory, or its disk has too little room.
    """
    from ...storage import memory_file_system
    from ...storage.direct_io import disk_full_error, free_disk_bytes
    from ...storage.disks import nearest_existing

    _remove_abandoned(base_dir)
    remedy = "choose a directory on a disk with --cache-dir, or show the small model only with --quick"
    file_system = memory_file_system(base_dir)
    if file_system is not None:
        raise StorageError(f"{base_dir} is a {file_system}, whose files take memory; {remedy}", path=base_dir)
    required, available = weight_bytes(shape) + _EXTRA_DISK_BYTES, free_disk_bytes(nearest_existing(base_dir))
    if available < required:
        raise disk_full_error(base_dir, required, available, remedy=f"free some disk space, {remedy}")


def compare(
    shape: ModelShape, base_dir: Path, ram_budget_bytes: int, *, tokenizer_of: Path, image: Path, quiet: bool
) -> dict[str, Any]:
    """Ask a model of random weights one question, with plain transformers and within a budget, each in a process.

    Args:
        shape: of the model.
        base_dir: the checkpoint is written below it, and removed.
        ram_budget_bytes: for the process with managed weights.
        tokenizer_of: a checkpoint whose tokenizer is used.
        image: a file.
        quiet: show no progress.

    Returns:
        Sizes, and the figures of `plain` and `managed`. Where memory does not allow `plain`, it has `not_run`, the
        reason, and `needed_bytes`, an estimate.

    Raises:
        MemoryOptimizationError: the process with managed weights failed.
    """
    with _scratch_directory(base_dir) as directory:
        with progress_line(quiet=quiet) as line:
            write_model(shape, directory, tokenizer_of=tokenizer_of, progress=line.report)
        arguments = (directory, image, _QUESTION)
        with working("asking plain transformers", quiet=quiet):
            plain = _ask_plain(shape, arguments)
        with working(f"asking within {format_bytes(ram_budget_bytes)}", quiet=quiet):
            budget = (str(ram_budget_bytes), directory / "cache")
            managed = _ask(*arguments, *budget, label=f"the model within {format_bytes(ram_budget_bytes)}")
    return {
        "model": f"Qwen3-VL-{shape.name}",
        "layers": shape.layers,
        "weight_bytes": weight_bytes(shape),
        "ram_budget_bytes": ram_budget_bytes,
        "plain": plain,
        "managed": managed,
    }


def _ask_plain(shape: ModelShape, arguments: tuple[str | Path, ...]) -> dict[str, Any]:
    """Return the figures of plain transformers, or why there are none: it may need more memory than there is."""
    from ...process import usable_memory

    needed, available = weight_bytes(shape) + PROCESS_BYTES, usable_memory()[1]
    if needed > available:
        reason = f"{format_bytes(available)} of memory are available"
        return {"not_run": reason, "needed_bytes": needed}
    try:
        return _ask(*arguments, label="plain transformers")
    except MemoryOptimizationError as error:
        return {"not_run": str(error), "needed_bytes": needed}


def _ask(*arguments: str | Path, label: str) -> dict[str, Any]:
    from .child_process import run_module

    figures, peak = run_module("cli.demo.one_answer", *arguments, label=label)
    return figures | {"peak_rss_bytes": peak.rss_bytes, "peak_file_bytes": peak.file_bytes}


# --- files ---


def write_model(shape: ModelShape, directory: Path, *, tokenizer_of: Path, progress: Progress | None = None) -> None:
    """Write a checkpoint of random weights with the tokenizer and special tokens of another one.

    Nothing ends an answer: random weights would end it at a random place.
    """
    config = json.loads((tokenizer_of / "config.json").read_text(encoding="utf-8"))
    tokens = SpecialTokens(
        end_of_text=None,
        end_of_turn=None,
        pad=config["text_config"]["pad_token_id"],
        **{name: config[f"{name}_token_id"] for name in ("vision_start", "vision_end", "image", "video")},
    )
    for name in _TOKENIZER_FILES:
        shutil.copyfile(tokenizer_of / name, directory / name)
    write_checkpoint(
        shape,
        directory,
        tokens=tokens,
        shard_bytes=sys.maxsize,
        most_pixels=256**2,
        sorts=False,
        drops_cached=False,
        progress=progress,
    )


@contextlib.contextmanager
def _scratch_directory(base_dir: Path) -> Iterator[Path]:
    base_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=base_dir) as directory, _locked(Path(directory)):
        yield Path(directory)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory, which ends with the process, however it ends.

    Raises:
        BlockingIOError: a process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(base_dir: Path) -> None:
    """Remove what demonstrations left that were killed."""
    for directory in base_dir.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(directory):
            shutil.rmtree(directory)


# --- what is shown ---


def show_before(shape: ModelShape, screen: Console) -> None:
    """Say what comes."""
    size = format_bytes(weight_bytes(shape))
    n_all = SHAPE.layers
    layers = "all its layers" if shape.layers == n_all else f"{shape.layers} of its {n_all} layers"
    screen.print(f"\nThe sizes of Qwen3-VL-{shape.name} with {layers}: {size} of weights", highlight=False)
    note = "Its weights are random and its answer is meaningless: memory and speed count."
    screen.print(note, style="dim", highlight=False)


def show(report: dict[str, Any], screen: Console) -> None:
    """Show the figures of `compare`; the table comes last."""
    from rich.table import Table

    plain, managed = report["plain"], report["managed"]
    screen.print(_note(plain, managed) + "\n", style="dim", highlight=False)
    budget, size = format_bytes(report["ram_budget_bytes"]), format_bytes(report["weight_bytes"])
    table = Table(box=None)
    table.add_column(f"{size} of weights")
    table.add_column("plain transformers", justify="right")
    table.add_column(f"within a budget of {budget}", justify="right", style="bold green")
    table.add_row("peak memory of the process", *(_peak(each) for each in (plain, managed)))
    table.add_row("tokens per second", *(_figure(each.get("tokens_per_s"), ".2f") for each in (plain, managed)))
    table.add_row(
        "time to first token", *(_figure(each.get("first_token_s"), ".1f", " s") for each in (plain, managed))
    )
    screen.print(table, highlight=False)


def _note(plain: dict[str, Any], managed: dict[str, Any]) -> str:
    if "not_run" in plain:
        return f"Plain transformers did not run: {plain['not_run']}."
    pairs = list(zip(plain["token_ids"], managed["token_ids"], strict=False))
    same = sum(theirs == ours for theirs, ours in pairs)
    note = f"{same} of {len(pairs)} tokens are those of plain transformers."
    mapped = plain["peak_file_bytes"]
    if mapped > plain["peak_rss_bytes"] / 2:
        note += f"\nMost of its memory is the mapped weight file ({format_bytes(mapped)}), read for every token."
    return note


def _peak(figures: dict[str, Any]) -> str:
    if "peak_rss_bytes" in figures:
        return format_bytes(figures["peak_rss_bytes"])
    return f"needs about {format_bytes(figures['needed_bytes'])}"


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
