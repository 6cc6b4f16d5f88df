"""`qwen3vl-mem demo`: the shipped model answers questions in less memory than its weights take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._output import (
    CacheDirOption,
    CodecOption,
    DebugOption,
    JsonOption,
    console,
    percent,
    print_json,
    progress_bar,
    working,
)
from ._recording import DashboardOption, RecordOption, check_watching, watched

if TYPE_CHECKING:
    from rich.console import Console

    from ..config import MemoryConfig

_PACKAGE = Path(__file__).resolve().parent.parent
_MODEL = _PACKAGE / "assets" / "tiny-qwen3vl"
_QUESTIONS = _PACKAGE / "assets" / "demo" / "questions.json"


def demo(
    codec: CodecOption = "auto",
    tensor_budget: Annotated[
        str | None,
        typer.Option("--tensor-budget", metavar="SIZE", help="(default: a third of the stored weights)"),
    ] = None,
    cache_dir: CacheDirOption = None,
    dashboard: DashboardOption = None,
    record: RecordOption = True,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the memory system at work on a small trained model; takes less than a minute.

    The same questions go to plain transformers, in a process of its own, and to the model with managed
    memory.

    Example: qwen3vl-mem demo --tensor-budget 2MB
    """
    from ..config import MemoryConfig

    check_watching(dashboard)
    budgets = {"tensor_budget": tensor_budget}
    config = MemoryConfig.from_mapping({**budgets, "codec": codec, "cache_dir": cache_dir})
    questions = json.loads(_QUESTIONS.read_text(encoding="utf-8"))
    with working("asking plain transformers", quiet=as_json):
        plain = _ask_plain_transformers()
    managed = _ask_managed(config, questions, quiet=as_json, dashboard=dashboard, record=record)
    rows = [
        question | {"answer": ours, "plain_answer": theirs, "correct": ours == question["expected"]}
        for question, ours, theirs in zip(questions, managed.pop("answers"), plain.pop("answers"), strict=True)
    ]
    report = {"questions": rows, "plain": plain, "managed": managed}
    if as_json:
        print_json(report)
    else:
        _show(report, console())


def _ask_plain_transformers() -> dict[str, Any]:
    """Run the questions in a process of its own, whose peak memory is then that of plain transformers.

    Raises:
        MemoryOptimizationError: the process failed.
    """
    from ..errors import MemoryOptimizationError

    # The process must find the package where this one did.
    search_path = os.pathsep.join(filter(None, (str(_PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}._plain", str(_MODEL), str(_QUESTIONS)],
        env=os.environ | {"PYTHONPATH": search_path},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise MemoryOptimizationError(f"plain transformers failed (exit code {done.returncode}): {last_line}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _ask_managed(
    config: MemoryConfig, questions: list[dict[str, str]], *, quiet: bool, dashboard: int | None, record: bool
) -> dict[str, Any]:
    import dataclasses

    from .. import create_optimized_model
    from ..model.inputs.processor import load_processor
    from ..planning import pack_model
    from ..storage import Checkpoint
    from ._plain_transformers import answer_all

    processor = load_processor(_MODEL)
    codec = config.weight_codec()
    with progress_bar(quiet=quiet) as progress:
        directory = pack_model(_MODEL, config, progress=progress)
        stored_bytes = Checkpoint.open(directory).total_bytes
        if config.tensor_budget is None:
            config = dataclasses.replace(config, tensor_budget=stored_bytes // 3)
        start = time.perf_counter()
        model = create_optimized_model(_MODEL, memory_config=config, progress=progress)
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

    answers = Table(title="A trained Qwen3-VL of 2.7 million weights", title_justify="left", box=None)
    for heading in ("question", "expected", "answer", "right"):
        answers.add_column(heading)
    for row in report["questions"]:
        expected, answer = (_compact(row["task"], row[key]) for key in ("expected", "answer"))
        answers.add_row(row["question"], expected, answer, _verdict(row))
    screen.print(answers, highlight=False)
    same = sum(row["answer"] == row["plain_answer"] for row in report["questions"])
    screen.print(f"{same} of {len(report['questions'])} answers are those of plain transformers.\n", style="dim")
    screen.print(_memory_table(report["plain"], report["managed"]), highlight=False)
    note = "With a model this small, the libraries are nearly all of the process; weights are what grows."
    screen.print(note, style="dim")


def _compact(task: str, text: str) -> str:
    return text.replace(" ", "") if task == "digits" else text


def _verdict(row: dict[str, Any]) -> str:
    if row["correct"]:
        return "[green]yes[/green]"
    wanted, given = row["expected"].split(), row["answer"].split()
    if len(wanted) == 1:
        return "[red]no[/red]"
    return f"[yellow]{sum(a == b for a, b in zip(wanted, given, strict=False))} of {len(wanted)}[/yellow]"


def _memory_table(plain: dict[str, Any], managed: dict[str, Any]) -> Any:
    from rich.table import Table

    from ..errors import format_bytes

    table = Table(title="Memory", title_justify="left", box=None)
    table.add_column("")
    table.add_column("plain transformers", justify="right")
    table.add_column(f"managed ({managed['codec']})", justify="right", style="green")
    table.add_row("weights, stored", format_bytes(plain["weight_bytes"]), format_bytes(managed["stored_weight_bytes"]))
    table.add_row("budget for weights in memory", "-", format_bytes(managed["tensor_budget_bytes"]))
    table.add_row(
        "weights in memory", format_bytes(plain["weight_bytes"]), format_bytes(managed["resident_weight_bytes"])
    )
    table.add_row(
        "whole process at its peak", format_bytes(plain["peak_rss_bytes"]), format_bytes(managed["peak_rss_bytes"])
    )
    table.add_row("read from the SSD a token", "-", format_bytes(managed["bytes_read_per_pass"] or 0))
    table.add_row("weights found in memory", "-", percent(managed["hit_rate"]))
    table.add_row("waits for the SSD", "-", f"{managed['faults']}, {managed['stall_s']:.2f} s")
    table.add_row("time for all questions", f"{plain['seconds']:.1f} s", f"{managed['seconds']:.1f} s")
    return table
