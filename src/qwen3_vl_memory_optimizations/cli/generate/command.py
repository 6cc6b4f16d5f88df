"""`qwen3vl-mem generate`: ask questions about pictures and documents, and stream the answers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import MemoryOptimizationError
from ..common.output import (
    EXIT_EMPTY,
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    GENERATION,
    INPUT,
    MEMORY,
    OUTPUT,
    CacheDirOption,
    CodecOption,
    DebugOption,
    JsonOption,
    ProfileOption,
    RamBudgetOption,
    TensorBudgetOption,
    print_json,
    typed,
)
from ..common.progress import INPUT as READING_INPUT
from ..common.progress import ProgressLine, QuietOption, progress_line
from ..common.recording import DashboardOption, RecordOption, check_watching, watched
from .inputs import collect, is_picture_file
from .options import decoding_options, detail_options, known_pixels
from .questions import Answer, Asker, read_questions
from .show import expected_wait, note

if TYPE_CHECKING:
    from ...optimizer import MemoryOptimizer


def generate(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Checkpoint directory, .gguf file, or Hugging Face model id.")
    ],
    prompt: Annotated[
        list[str],
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            allow_from_autoenv=False,
            rich_help_panel=INPUT,
            help="Question; repeat it for several, answered in turn. -: all of standard input, as one question.",
        ),
    ],
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "-i",
            metavar="PATH...",
            allow_from_autoenv=False,
            rich_help_panel=INPUT,
            help="Images, PDF documents, folders of them, or quoted globs; shown to the model in this order.",
        ),
    ] = None,
    pages: Annotated[
        str | None,
        typer.Option(
            "--pages",
            metavar="PAGES",
            rich_help_panel=INPUT,
            help="Pages of each PDF document, such as 1-3,7 or 5-. (default: the first 10)",
        ),
    ] = None,
    fetch: Annotated[
        bool,
        typer.Option("--fetch", rich_help_panel=INPUT, help="Download images and documents given as http(s) URLs."),
    ] = False,
    video: Annotated[
        Path | None,
        typer.Option("--video", metavar="PATH", rich_help_panel=INPUT, help="Video file or directory of frames."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", rich_help_panel=INPUT, help="System prompt.")
    ] = None,
    detail: Annotated[
        str | None,
        typer.Option(
            "--detail",
            metavar="LEVEL",
            rich_help_panel=INPUT,
            help="Pixels per picture. low (0.26 million): subjects and colours; print is lost. medium (1.0): charts "
            "and large print. document (1.6): a printed page. high: the picture's own size; small print; slowest. "
            "auto: as many as --first-token allows. (default: high)",
        ),
    ] = None,
    first_token: Annotated[
        str | None,
        typer.Option(
            "--first-token",
            metavar="TIME",
            rich_help_panel=INPUT,
            help="Aim of --detail auto, by the measured speed of this machine, such as 30s or 2min. (default: 30s)",
        ),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            "--max-pixels",
            min=1,
            metavar="N",
            rich_help_panel=INPUT,
            help="Most pixels per picture and video frame, instead of --detail.",
        ),
    ] = None,
    ram_budget: RamBudgetOption = None,
    tensor_budget: TensorBudgetOption = None,
    profile: ProfileOption = None,
    codec: CodecOption = "auto",
    cache_dir: CacheDirOption = None,
    image_policy: Annotated[
        str,
        typer.Option(
            "--image-policy",
            metavar="downsize|refuse",
            rich_help_panel=MEMORY,
            help="Images too large for the budget: downsize or refuse them.",
        ),
    ] = "downsize",
    private: Annotated[
        bool,
        typer.Option("--private", rich_help_panel=MEMORY, help="Keep no data derived from images or prompts on disk."),
    ] = False,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", min=1, metavar="N", rich_help_panel=GENERATION, help="Maximum answer length in tokens."
        ),
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            min=0.0,
            metavar="X",
            rich_help_panel=GENERATION,
            help="Sampling temperature; 0 is greedy decoding.",
        ),
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            min=0.0,
            max=1.0,
            metavar="X",
            rich_help_panel=GENERATION,
            help="Sample among the likeliest tokens with this total probability; needs --temperature.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            metavar="N",
            rich_help_panel=GENERATION,
            help="Make sampling repeatable: each answer starts from this seed.",
        ),
    ] = None,
    prompt_lookup: Annotated[
        int,
        typer.Option(
            "--prompt-lookup",
            min=0,
            metavar="N",
            rich_help_panel=GENERATION,
            help="Speculate with up to N tokens copied from the prompt.",
        ),
    ] = 0,
    assistant: Annotated[
        str | None,
        typer.Option(
            "--assistant",
            metavar="MODEL",
            rich_help_panel=GENERATION,
            help="Smaller draft model for speculative decoding, within the same budget.",
        ),
    ] = None,
    metrics: Annotated[
        int | None,
        typer.Option(
            "--metrics",
            metavar="PORT",
            min=0,
            max=65535,
            rich_help_panel=OUTPUT,
            help="Serve Prometheus metrics on 127.0.0.1 during the run (0: any free port).",
        ),
    ] = None,
    dashboard: DashboardOption = None,
    record: RecordOption = True,
    stats: Annotated[
        bool, typer.Option("--stats", rich_help_panel=OUTPUT, help="Print speed and memory use at the end, to stderr.")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Answer questions about images, documents or a video within a memory budget.

    Ctrl-C stops the answer and keeps the text so far. Exit codes: 0 success, 1 empty answer, 2 error, 130 stopped.

    Example:

    qwen3vl-mem generate Qwen/Qwen3-VL-2B-Instruct -i photo.jpg -p "What is this?"

    Pages of a document, two questions; the second does not read the pages again:

    qwen3vl-mem generate MODEL -i report.pdf --pages 1-3,7 -p "What is the total?" -p "Who signed it?"

    Several pictures, a folder, a first token in about 30 seconds:

    qwen3vl-mem generate MODEL -i a.png b.png scans/ --first-token 30s -p "Which page has a table?"

    Speculative decoding with a draft model:

    qwen3vl-mem generate Qwen/Qwen3-VL-8B-Instruct --assistant Qwen/Qwen3-VL-2B-Instruct -p "Tell a story."

    Live dashboard:

    qwen3vl-mem generate Qwen/Qwen3-VL-2B-Instruct --ram-budget 2GB -p "Tell a story." --dashboard 8080
    """
    line = ctx.with_resource(progress_line(quiet=quiet or as_json))
    from ...errors import ConfigurationError
    from ...profiles import configure

    # Check before slow work.
    if assistant and prompt_lookup:
        raise ConfigurationError("--assistant and --prompt-lookup both draft tokens; use only one of them")
    if top_p is not None and not temperature:
        raise ConfigurationError("--top-p has no effect on greedy decoding; set --temperature above 0 too")
    level = detail_options(detail=detail, first_token_s=first_token, max_pixels=max_pixels)
    if is_picture_file(model):
        raise ConfigurationError(f"{model} is a picture, not a model; name the model before the pictures")
    check_watching(dashboard)
    questions = read_questions(prompt)
    budgets = typed(ctx, profile=profile, ram_budget=ram_budget, tensor_budget=tensor_budget)
    settings = typed(ctx, codec=codec, cache_dir=cache_dir, image_policy=image_policy, private=private)
    config = configure({**budgets, **settings, **level})

    from ... import create_optimized_model
    from ...energy import EnergyMeter
    from ...model.inputs.picture_budget import prepare_within_budget
    from ...model.inputs.processor import load_processor
    from ...model.sources.hub import local_path
    from ...monitoring.rendering.formatting import breach_text

    directory = local_path(model, line.report)
    processor = load_processor(directory)
    most_pixels = max_pixels or known_pixels(config.detail)
    pictures = collect(image or [], pages=pages, fetch=fetch, processor=processor, max_pixels=most_pixels)
    for text in pictures.notes:
        note(text, "dim")
    for position, question in enumerate(questions):
        sources = pictures.sources if not position else []
        processor.check(question, sources, video, system, max_pixels=max_pixels)
    optimized = create_optimized_model(directory, memory_config=config, assistant=assistant, progress=line.report)
    line.begin(READING_INPUT)
    answers: list[Answer] = []
    failure: MemoryOptimizationError | None = None
    with contextlib.ExitStack() as stack:
        optimizer = stack.enter_context(optimized.memory_optimizer)
        if metrics is not None:
            stack.enter_context(_served_metrics(optimizer, metrics))
        name = Path(model).resolve().name
        alerts = stack.enter_context(
            watched(optimizer, dashboard=dashboard, record=record, command="generate", model=name, watch_alerts=stats)
        )
        meter = EnergyMeter() if stats or as_json else None
        if meter is not None:
            stack.callback(meter.close)
            meter.start()
        inputs, notes = prepare_within_budget(
            processor, optimized, questions[0], pictures.sources, video, system, max_pixels=max_pixels
        )
        for text in notes:
            note(text)
        options = decoding_options(processor, temperature, top_p, prompt_lookup) | {"max_new_tokens": max_new_tokens}
        asker = Asker(model=optimized, processor=processor, options=options, meter=meter, seed=seed)
        for position, question in enumerate(questions):
            try:
                if position:
                    line = ctx.with_resource(progress_line(quiet=quiet or as_json, first=READING_INPUT))
                    inputs = asker.inputs_of(question, inputs, system)
                estimate = optimizer.estimator.of_inputs(inputs)
                wait = expected_wait(estimate, processor, optimizer.estimator, inputs)
                if wait is not None:
                    note(wait, "dim")
                if len(questions) > 1 and not as_json:
                    note(f"> {question}", "dim")
                line.follow(optimizer.figures.responses.progress.now)
                answer = asker.ask(question, inputs, estimate, _ignore if as_json else partial(_write, line))
                line.close()
            except MemoryOptimizationError as error:
                if not (as_json and answers):
                    raise
                failure = error  # the answers before it are not lost
                break
            answers.append(answer)
            if not as_json:
                _write(line, "\n")
                if stats:
                    note(answer.figures.line(), "dim")
            if answer.interrupted:
                break
        peak_bytes = optimizer.figures.peak_bytes()
    if as_json:
        over_bytes = None if config.ram_budget is None else max(0, peak_bytes - config.ram_budget)
        about = {
            "notes": pictures.notes + notes,
            "over_budget_bytes": over_bytes,
            "alerts": list(alerts.texts.values()),
        }
        _print_answers(answers, len(questions), about, failure, with_memory=stats)
    else:
        if stats:
            for name, text in alerts.texts.items():
                if name != "budget":
                    note(f"alert: {text}", "dim")
        breach = breach_text(peak_bytes, config.ram_budget)
        if breach is not None:
            note(breach, "bold red")
    _leave(answers, failure, as_json=as_json)


def _write(line: ProgressLine, text: str) -> None:
    """Print a part of an answer; the progress line ends before the first."""
    line.answer_begins()
    sys.stdout.write(text)
    sys.stdout.flush()


def _ignore(text: str) -> None:
    pass


def _print_answers(
    answers: list[Answer], n_questions: int, about: dict[str, Any], failure: Exception | None, *, with_memory: bool
) -> None:
    """Print an object for one question, and a list of them for several."""
    rows = [{**each.to_dict(), **about, **({"memory": each.memory} if with_memory else {})} for each in answers]
    if failure is not None:
        rows.append({"error": {"type": type(failure).__name__, "message": str(failure)}})
    print_json(rows[0] if n_questions == 1 else rows)


def _leave(answers: list[Answer], failure: Exception | None, *, as_json: bool) -> None:
    """End with the exit code of the run, and the reason where it is not 0.

    Raises:
        typer.Exit: it was interrupted or failed, or an answer is empty.
    """
    if failure is not None:
        note(f"error: {failure}", "bold red")
        raise typer.Exit(EXIT_ERROR)
    if any(each.interrupted for each in answers):
        if not as_json:
            note("stopped")
        raise typer.Exit(EXIT_INTERRUPTED)
    empty = [each for each in answers if not each.text]
    for each in empty:
        tokens = "1 token" if each.figures.new_tokens == 1 else f"{each.figures.new_tokens} tokens"
        note(f"the answer to {each.question[:60]!r} is empty: {tokens} without text; ask differently")
    if empty:
        raise typer.Exit(EXIT_EMPTY)


@contextlib.contextmanager
def _served_metrics(optimizer: MemoryOptimizer, port: int) -> Iterator[None]:
    from ...monitoring import MetricsExporter

    exporter = MetricsExporter(optimizer)
    try:
        note(f"metrics: {exporter.serve(port)}", "dim")
        yield
    finally:
        exporter.close()
