"""`qwen3vl-mem evaluate`: the accuracy and size of each codec."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common.output import (
    INPUT,
    MEMORY,
    CacheDirOption,
    DebugOption,
    JsonOption,
    TensorBudgetOption,
    console,
    print_json,
)
from .common.progress import QuietOption, progress_line
from .common.recording import DashboardOption, check_watching, watched

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluation import CodecResult, Task

_SHIPPED_IMAGES = 14
_IMAGES, _TOKENS = 8, 1024
_FULL_IMAGES, _FULL_TOKENS = _SHIPPED_IMAGES, 4096
_CODECS = ("int8_rotated", "int8", "int4")
"""Those that a user chooses among; the others are for weights that suit them, or for half the bytes of fp32."""
_SMALL_BYTES = 64 << 20
"""Products of a smaller checkpoint are computed by one thread: several would mostly wait for each other."""
_WORST_LAYERS = 3
_ALONE = ("perplexity", "accuracy", "f1")
_MEANINGS = (
    ("perplexity", "how unsure the model is of the right tokens; 1 is certain, lower is better"),
    ("accuracy", "share of tokens predicted right; macro F1 counts each token value alike"),
    ("same top-1", "share of predictions with the unmodified model's first choice"),
    ("KL", "distance of the predicted probabilities from its own, in nats; 0 is equal"),
    ("layer error", "largest relative error of a layer's output"),
    ("vs. 16-bit", "stored bytes over those of 16 bits per weight"),
)
_COMPARED = ("top1_agreement", "kl_divergence", "layer_relative_error")


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or Hugging Face model id.")],
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            rich_help_panel=INPUT,
            help="Text file to predict. (default for a language model: a novel)",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=2,
            metavar="N",
            rich_help_panel=INPUT,
            help=f"Number of text tokens to predict. (default: {_TOKENS:,}; with --full {_FULL_TOKENS:,})",
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            "--images",
            min=1,
            metavar="N",
            rich_help_panel=INPUT,
            help=f"Number of images to ask about; above {_SHIPPED_IMAGES}, test images of easy-VQA, up to 1000. "
            f"(default for a vision model: {_IMAGES}; with --full {_FULL_IMAGES})",
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", rich_help_panel=INPUT, help="Evaluate all codecs on more images and text; takes minutes."
        ),
    ] = False,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            "--codec",
            metavar="CODEC",
            rich_help_panel=MEMORY,
            help=f"Codec to evaluate; repeatable. (default: {', '.join(_CODECS)}; with --full all)",
        ),
    ] = None,
    tensor_budget: TensorBudgetOption = None,
    cache_dir: CacheDirOption = None,
    dashboard: DashboardOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare codecs with the unmodified model and recommend one: accuracy, perplexity, layer errors, size.

    Without a budget, the whole model is loaded alongside each codec; with
    --tensor-budget, both stay within it. With --dashboard, the page shows one
    codec at a time: reload it when a run has ended.

    Example: qwen3vl-mem evaluate ~/models/Qwen3-VL-2B-Instruct --codec int8 --text novel.txt --tensor-budget 1GB
    """
    from ..config import MemoryConfig

    check_watching(dashboard)
    config = MemoryConfig.from_mapping({"tensor_budget": tensor_budget, "cache_dir": cache_dir})

    with progress_line(quiet=quiet or as_json) as line:
        from transformers.utils.logging import disable_progress_bar

        from ..compression import codec_names
        from ..evaluation.codecs import evaluate_codecs
        from ..evaluation.recommendation import recommend
        from ..model.sources.hub import local_path

        directory = local_path(model, line.report)
        disable_progress_bar()  # our own line is enough
        tasks = _tasks(directory, text, tokens, images, full=full)
        codecs = codec or (codec_names() if full else _CODECS)

        def watch(optimized: Any, name: str) -> AbstractContextManager[Any]:
            shown = f"{Path(model).name}, {name}"
            return watched(
                optimized.memory_optimizer, dashboard=dashboard, record=False, command="evaluate", model=shown
            )

        with _few_threads_if_small(directory):
            found = evaluate_codecs(directory, codecs, tasks, config=config, progress=line.report, watch=watch)
            results = list(found)
    advice = recommend(results)
    if as_json:
        print_json(report(results) | {"recommendation": dataclasses.asdict(advice)})
    else:
        _show(results)
        console().print(f"\n{advice.text}", style="bold", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _few_threads_if_small(directory: Path) -> Iterator[None]:
    import torch

    from ..model.checkpoint.formats import open_checkpoint

    before = torch.get_num_threads()
    if open_checkpoint(directory).total_bytes < _SMALL_BYTES:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def report(results: list[CodecResult]) -> dict[str, Any]:
    """Return results ready for JSON; non-finite figures are null."""
    rows = []
    for result in results:
        tasks = {}
        for name, impact in result.impacts.items():
            figures: dict[str, Any] = {"positions": impact.n_positions, "difference": _finite(impact)}
            figures |= {"baseline": _finite(impact.baseline), "optimized": _finite(impact.optimized)}
            tasks[name] = figures | {"layer_relative_errors": _finite(impact.layers)}
        rows.append(
            {
                "codec": result.codec,
                "weight_bytes": result.weight_bytes,
                "share_of_16_bit": result.share_of_half,
                "weights_stored_as": result.stored_as,
                "seconds": result.seconds,
                "bits_per_weight": result.bits,
                "tokens_per_s": result.tokens_per_s,
                "whole_bytes": result.whole_bytes,
                "tasks": tasks,
            }
        )
    return {"baseline": results[0].baseline, "weight_bytes_16_bit": results[0].half_bytes, "codecs": rows}


def _tasks(directory: Path, text: Path | None, tokens: int | None, images: int | None, *, full: bool) -> list[Task]:
    """Return the evaluation tasks for this checkpoint.

    Raises:
        ConfigurationError: images for a model without vision.
        InputError: the text cannot be read.
    """
    from ..errors import ConfigurationError, InputError
    from ..evaluation.codecs import Task
    from ..evaluation.data import SHIPPED_TEXT, QuestionBatches, questions, text_windows
    from ..model.checkpoint.formats import open_checkpoint
    from ..model.inputs.processor import load_tokenizer

    sees = "vision_config" in open_checkpoint(directory).config
    if images is not None and not sees:
        raise ConfigurationError(f"--images: {directory} is a language model; use --text instead")
    tasks = []
    if images is not None or (sees and text is None):
        from ..model.inputs.processor import load_processor

        chosen = questions(images or (_FULL_IMAGES if full else _IMAGES))
        tasks.append(Task("images", QuestionBatches(load_processor(directory), chosen)))
    if text is not None or not sees:
        path = text or SHIPPED_TEXT
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot read this text ({error}); name a UTF-8 text file") from error
        limit = tokens or (_FULL_TOKENS if full else _TOKENS)
        tasks.append(Task("text", text_windows(load_tokenizer(directory), content, max_tokens=limit)))
    return tasks


def _show(results: list[CodecResult]) -> None:
    from ..errors import format_bytes

    screen = console()
    screen.print(f"Compared with {results[0].baseline}.\n", style="dim", highlight=False)
    for task, first in results[0].impacts.items():
        title = f"{task}: {first.n_positions:,} predictions"
        table = _table(title, "perplexity", "accuracy", "macro F1", "same top-1", "KL", "layer error")
        table.add_row("unmodified", *(figure(first.baseline[key]) for key in _ALONE))
        for result in results:
            impact = result.impacts[task]
            shown = [impact.optimized[key] for key in _ALONE] + [impact.get(key, math.nan) for key in _COMPARED]
            table.add_row(result.codec, *map(figure, shown))
        screen.print(table, highlight=False)
        screen.print()
    table = _table("weights", "size", "vs. 16-bit", "weights by codec")
    for result in results:
        kinds = ", ".join(f"{count} {codec}" for codec, count in result.stored_as.items())
        table.add_row(result.codec, format_bytes(result.weight_bytes), f"{result.share_of_half:.3f}", kinds)
    screen.print(table, highlight=False)
    for result in results:
        errors = ((error, name) for impact in result.impacts.values() for name, error in impact.layers.items() if error)
        worst = sorted(errors, reverse=True)[:_WORST_LAYERS]
        if worst:
            named = ", ".join(f"{name} {figure(error)}" for error, name in worst)
            screen.print(
                f"\n{result.codec}: largest layer errors: {named}", style="dim", highlight=False, soft_wrap=True
            )
    screen.print()
    for result in results:
        screen.print(in_one_line(result), highlight=False, soft_wrap=True)
    screen.print()
    for name, meaning in _MEANINGS:
        screen.print(f"{name}: {meaning}", style="dim", highlight=False, soft_wrap=True)


def in_one_line(result: CodecResult) -> str:
    """Return what a user wants to know of a codec."""
    from ..errors import format_bytes

    parts = [f"{result.codec}: {format_bytes(result.weight_bytes)}", f"{result.bits:.1f} bits per weight"]
    for task, impact in result.impacts.items():
        if task == "text":
            ratio = impact.optimized["perplexity"] / impact.baseline["perplexity"]
            parts.append(f"perplexity {100 * (ratio - 1):+.1f} %")
        else:
            points = 100 * (impact.optimized["accuracy"] - impact.baseline["accuracy"])
            parts.append(f"accuracy {points:+.1f} points about {task}")
    parts.append(f"fits whole in {format_bytes(result.whole_bytes)}")
    return ", ".join(parts) + f", {result.tokens_per_s:.3g} tokens per second here"


def _table(title: str, *headings: str) -> Table:
    """Return a table whose first column is the codec."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None)
    table.add_column("codec", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def figure(value: float) -> str:
    """Format a figure with four significant digits; NaN is a dash."""
    return "-" if math.isnan(value) else f"{value:.4g}"


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in values.items()}
