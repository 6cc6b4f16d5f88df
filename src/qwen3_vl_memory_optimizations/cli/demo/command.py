"""`qwen3vl-mem demo`: models answer questions about images in less memory than their weights take."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.output import (
    INPUT,
    MEMORY,
    CacheDirOption,
    CodecOption,
    DebugOption,
    JsonOption,
    console,
    print_json,
)
from ..common.progress import progress_line, working
from ..common.recording import DashboardOption, RecordOption, check_watching, watched
from . import large_model

if TYPE_CHECKING:
    from rich.console import Console

    from ...config import MemoryConfig

_PACKAGE = Path(__file__).resolve().parents[2]
_MODEL = _PACKAGE / "assets" / "tiny-qwen3vl"
_QUESTIONS = _PACKAGE / "assets" / "demo" / "questions.json"
_LARGE_MODEL_IMAGE = "fashion_0.png"


def demo(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", rich_help_panel=INPUT, help="The small model only: no gigabytes are written to the disk."
        ),
    ] = False,
    ram_budget: Annotated[
        str,
        typer.Option(
            "--ram-budget",
            metavar="SIZE",
            rich_help_panel=MEMORY,
            help="Memory limit for the process of the large model.",
        ),
    ] = "1GB",
    layers: Annotated[
        int,
        typer.Option(
            "--layers",
            min=4,
            max=large_model.SHAPE.layers,
            metavar="N",
            rich_help_panel=INPUT,
            help="Layers of the large model, from 4 to 28.",
        ),
    ] = large_model.LAYERS,
    codec: CodecOption = "auto",
    tensor_budget: Annotated[
        str | None,
        typer.Option(
            "--tensor-budget",
            metavar="SIZE",
            rich_help_panel=MEMORY,
            help="Memory limit for the weights of the small model. (default: a third of the stored weights)",
        ),
    ] = None,
    cache_dir: CacheDirOption = None,
    dashboard: DashboardOption = None,
    record: RecordOption = True,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the memory system at work on two models; takes about a minute.

    First a small trained model answers questions about images. Then a model with the sizes of Qwen3-VL-2B, whose
    random weights are made on the spot, runs in a fraction of their size. Both are compared with plain transformers.

    Example: qwen3vl-mem demo --layers 28
    """
    from ...config import MemoryConfig, parse_size

    check_watching(dashboard)
    budgets = {"tensor_budget": tensor_budget}
    config = MemoryConfig.from_mapping({**budgets, "codec": codec, "cache_dir": cache_dir})
    budget_bytes = parse_size(ram_budget, key="ram_budget")
    shape = dataclasses.replace(large_model.SHAPE, layers=layers)
    if not quick:
        large_model.check_disk(shape, config.base_dir)
    questions = json.loads(_QUESTIONS.read_text(encoding="utf-8"))
    with working("asking plain transformers", quiet=as_json):
        plain = _ask_plain_transformers()
    managed = _ask_managed(config, questions, quiet=as_json, dashboard=dashboard, record=record)
    rows = [
        question | {"answer": ours, "plain_answer": theirs, "correct": ours == question["expected"]}
        for question, ours, theirs in zip(questions, managed.pop("answers"), plain.pop("answers"), strict=True)
    ]
    report: dict[str, Any] = {"questions": rows, "plain": plain, "managed": managed, "large_model": None}
    if not as_json:
        _show(report, console())
    if not quick:
        if not as_json:
            large_model.show_before(shape, console())
        report["large_model"] = large_model.compare(
            shape,
            config.base_dir,
            budget_bytes,
            tokenizer_of=_MODEL,
            image=_QUESTIONS.parent / _LARGE_MODEL_IMAGE,
            quiet=as_json,
        )
    if as_json:
        print_json(report)
    elif not quick:
        large_model.show(report["large_model"], console())


def _ask_plain_transformers() -> dict[str, Any]:
    """Run the questions in a process of its own, whose peak memory is then that of plain transformers.

    Raises:
        MemoryOptimizationError: the process failed.
    """
    from .child_process import run_module

    result: dict[str, Any]
    result, peak = run_module("cli.demo.plain_transformers", _MODEL, _QUESTIONS, label="plain transformers")
    return result | {"peak_rss_bytes": peak.rss_bytes}


def _ask_managed(
    config: MemoryConfig, questions: list[dict[str, str]], *, quiet: bool, dashboard: int | None, record: bool
) -> dict[str, Any]:
    from ... import create_optimized_model
    from ...model.inputs.processor import load_processor
    from ...planning import pack_model
    from ...storage import Checkpoint
    from .plain_transformers import answer_all

    processor = load_processor(_MODEL)
    codec = config.weight_codec()
    with progress_line(quiet=quiet) as line:
        directory = pack_model(_MODEL, config, progress=line.report)
        stored_bytes = Checkpoint.open(directory).total_bytes
        if config.tensor_budget is None:
            config = dataclasses.replace(config, tensor_budget=stored_bytes // 3)
        start = time.perf_counter()
        model = create_optimized_model(_MODEL, memory_config=config, progress=line.report)
    optimizer = model.memory_optimizer
    try:
        with watched(optimizer, dashboard=dashboard, record=record, command="demo", model=_MODEL.name):
            with working("asking within the budget", quiet=quiet):
                answers = answer_all(model, processor, questions, _QUESTIONS.parent)
        seconds = time.perf_counter() - start
        memory = optimizer.get_memory_efficiency_stats()
    finally:
        optimizer.close()
    paging = memory["paging"]
    return {
        "answers": answers,
        "codec": codec,
        "tensor_budget_bytes": config.tensor_budget,
        "stored_weight_bytes": stored_bytes,
        "resident_weight_bytes": memory["kinds"]["weights"]["resident_bytes"],
        "peak_rss_bytes": memory["budget"]["process_peak_rss_bytes"],
        "seconds": seconds,
        **{key: paging[key] for key in ("faults", "stall_s", "hit_rate", "prefetch_accuracy", "bytes_read")},
        "bytes_read_per_pass": paging["bytes_read_per_pass"],
    }


def _show(report: dict[str, Any], screen: Console) -> None:
    from rich.table import Table

    from ...errors import format_bytes

    answers = Table(title="A trained Qwen3-VL of 2.7 million weights", title_justify="left", box=None)
    for heading in ("question", "expected", "answer", "right"):
        answers.add_column(heading)
    for row in report["questions"]:
        expected, answer = (_compact(row["task"], row[key]) for key in ("expected", "answer"))
        answers.add_row(row["question"], expected, answer, _verdict(row))
    screen.print(answers, highlight=False)
    same = sum(row["answer"] == row["plain_answer"] for row in report["questions"])
    plain, managed = report["plain"], report["managed"]
    resident, stored, theirs = map(
        format_bytes, (managed["resident_weight_bytes"], managed["stored_weight_bytes"], plain["weight_bytes"])
    )
    note = (
        f"{same} of {len(report['questions'])} answers are those of plain transformers.\n"
        f"Weights in memory: {resident} of {stored} ({managed['codec']}); plain transformers: {theirs}."
    )
    screen.print(note, style="dim", highlight=False)


def _compact(task: str, text: str) -> str:
    return text.replace(" ", "") if task == "digits" else text


def _verdict(row: dict[str, Any]) -> str:
    if row["correct"]:
        return "[green]yes[/green]"
    wanted, given = row["expected"].split(), row["answer"].split()
    if len(wanted) == 1:
        return "[red]no[/red]"
    return f"[yellow]{sum(a == b for a, b in zip(wanted, given, strict=False))} of {len(wanted)}[/yellow]"
