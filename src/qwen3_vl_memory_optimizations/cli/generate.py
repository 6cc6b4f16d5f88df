"""`qwen3vl-mem generate`: ask one question and stream the answer."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._output import (
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
    error_console,
    percent,
    print_json,
    progress_bar,
    typed,
)
from ._recording import DashboardOption, RecordOption, check_watching, watched

if TYPE_CHECKING:
    from ..model.inputs.processor import AnswerStreamer
    from ..monitoring import MetricsExporter
    from ..optimizer import MemoryOptimizer


def generate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Checkpoint directory or Hugging Face model id.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", rich_help_panel=INPUT, help="Question or instruction.")],
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", metavar="PATH", rich_help_panel=INPUT, help="Image file; repeatable."),
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", rich_help_panel=INPUT, help="Download images given as http(s) URLs.")
    ] = False,
    video: Annotated[
        Path | None, typer.Option("--video", rich_help_panel=INPUT, help="Video file or directory of frames.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", rich_help_panel=INPUT, help="System prompt.")] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            "--max-pixels",
            min=1,
            rich_help_panel=INPUT,
            help="Scale larger images and frames down to this many pixels.",
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
        typer.Option("--max-new-tokens", min=1, rich_help_panel=GENERATION, help="Maximum answer length in tokens."),
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", min=0.0, rich_help_panel=GENERATION, help="Sampling temperature; 0 is greedy decoding."
        ),
    ] = 0.0,
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
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Answer a question about images or a video within a memory budget.

    Ctrl-C stops the answer and keeps the text so far.

    Example:

    qwen3vl-mem generate Qwen/Qwen3-VL-2B-Instruct -i photo.jpg -p "What is this?"

    Speculative decoding with a draft model:

    qwen3vl-mem generate Qwen/Qwen3-VL-8B-Instruct --assistant Qwen/Qwen3-VL-2B-Instruct -p "Tell a story."

    Live dashboard:

    qwen3vl-mem generate Qwen/Qwen3-VL-2B-Instruct --ram-budget 2GB -p "Tell a story." --dashboard 8080
    """
    from ..errors import ConfigurationError
    from ..profiles import configure

    # Check before slow work.
    if assistant and prompt_lookup:
        raise ConfigurationError("--assistant and --prompt-lookup both draft tokens; use only one of them")
    check_watching(dashboard)
    budgets = typed(ctx, profile=profile, ram_budget=ram_budget, tensor_budget=tensor_budget)
    settings = typed(ctx, codec=codec, cache_dir=cache_dir, image_policy=image_policy, private=private)
    config = configure({**budgets, **settings})

    from .. import create_optimized_model
    from ..energy import Cost, EnergyMeter
    from ..factory import local_directory as local_directory
    from ..model.inputs.images import fetched
    from ..model.inputs.picture_budget import prepare_within_budget
    from ..model.inputs.processor import load_processor

    directory = local_directory(model)
    processor = load_processor(directory)
    images = [fetched(each) if fetch else each for each in image or []]
    processor.check(prompt, images, video, system, max_pixels=max_pixels)
    with progress_bar(quiet=as_json) as progress:
        optimized = create_optimized_model(directory, memory_config=config, assistant=assistant, progress=progress)
    optimizer = optimized.memory_optimizer
    exporter = None
    watching = contextlib.ExitStack()
    try:
        if metrics is not None:
            exporter = _serve_metrics(optimizer, metrics)
        watching.enter_context(
            watched(optimizer, dashboard=dashboard, record=record, command="generate", model=Path(model).resolve().name)
        )
        inputs, notes = prepare_within_budget(
            processor, optimized, prompt, images, video, system, max_pixels=max_pixels
        )
    except BaseException:
        watching.close()
        if exporter is not None:
            exporter.close()
        optimizer.close()
        raise
    for note in notes:
        error_console().print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)

    pieces: list[str] = []

    def on_text(text: str) -> None:
        pieces.append(text)
        if not as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    streamer = processor.streamer(on_text)
    choices: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        choices["temperature"] = temperature
    if prompt_lookup:
        choices["prompt_lookup_num_tokens"] = prompt_lookup
        # Without this, transformers also drafts image placeholder tokens and fails when it counts them.
        choices["suppress_tokens"] = [processor.tokens.image_id, processor.tokens.video_id]
    interrupted = False
    read_before = optimizer.get_memory_efficiency_stats()["paging"]["bytes_read"]
    meter = EnergyMeter() if stats or as_json else None
    if meter is not None:
        meter.start()
    start_s, before = time.perf_counter(), Cost.now(meter)
    try:
        try:
            optimized.generate(**inputs, **choices, max_new_tokens=max_new_tokens, streamer=streamer)
        except KeyboardInterrupt:
            interrupted = True
            streamer.end()  # flush the last, incomplete word
        after = Cost.now(meter)
        memory = optimizer.get_memory_efficiency_stats()
    finally:
        watching.close()
        if exporter is not None:
            exporter.close()
        optimizer.close()
        if meter is not None:
            meter.close()

    figures = Figures.of(streamer, start_s, memory, read_before, before.per_token(after, streamer.n_tokens))
    if as_json:
        answer = {
            "answer": "".join(pieces).strip(),
            "interrupted": interrupted,
            "prompt_tokens": inputs["input_ids"].shape[1],
            "notes": notes,
            **dataclasses.asdict(figures),
        }
        print_json(answer | ({"memory": memory} if stats else {}))
    else:
        sys.stdout.write("\n")
        sys.stdout.flush()
        if stats:
            error_console().print(figures.line(), style="dim", highlight=False, soft_wrap=True)
    if interrupted:
        if not as_json:
            error_console().print("stopped", style="yellow")
        raise typer.Exit(EXIT_INTERRUPTED)


def _serve_metrics(optimizer: MemoryOptimizer, port: int) -> MetricsExporter:
    from ..monitoring import MetricsExporter

    exporter = MetricsExporter(optimizer)
    text = f"metrics: {exporter.serve(port)}"
    error_console().print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
    return exporter


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The cost of one answer; `None` where nothing was measured.

    Attributes:
        tokens_per_s: excludes the first token, or the first tokens where several arrive at once.
        bytes_read_per_token: SSD reads.
        hit_rate: share of used weight bytes that were already in memory.
        cpu_s_per_token: processor time of all threads, prefill included.
        joules_per_token: energy of the whole machine, prefill included.
    """

    new_tokens: int
    time_to_first_token_s: float | None
    tokens_per_s: float | None
    peak_rss_bytes: int
    bytes_read_per_token: float | None
    hit_rate: float | None
    cpu_s_per_token: float | None
    joules_per_token: float | None

    @classmethod
    def of(
        cls,
        streamer: AnswerStreamer,
        start_s: float,
        memory: dict[str, Any],
        read_before: int,
        costs: dict[str, float | None],
    ) -> Figures:
        """Return the figures of an answer that started at `start_s` (`time.perf_counter()`)."""
        tokens, first_s, last_s = streamer.n_tokens, streamer.first_token_s, streamer.last_token_s
        rate = None
        if first_s is not None and last_s is not None and last_s > first_s:
            rate = (tokens - streamer.n_first_tokens) / (last_s - first_s)
        return cls(
            new_tokens=tokens,
            time_to_first_token_s=None if first_s is None else first_s - start_s,
            tokens_per_s=rate,
            peak_rss_bytes=memory["budget"]["process_peak_rss_bytes"],
            bytes_read_per_token=(memory["paging"]["bytes_read"] - read_before) / tokens if tokens else None,
            hit_rate=memory["paging"]["hit_rate"],
            **costs,
        )

    def line(self) -> str:
        """Format the figures as one line."""
        from ..errors import format_bytes

        read, first = self.bytes_read_per_token, self.time_to_first_token_s
        cpu_s, joules = self.cpu_s_per_token, self.joules_per_token
        return " | ".join(
            (
                f"{self.new_tokens} tokens",
                "-" if self.tokens_per_s is None else f"{self.tokens_per_s:.2f} tokens/s",
                "-" if first is None else f"first token after {first:.2f} s",
                f"peak memory {format_bytes(self.peak_rss_bytes)}",
                "-" if read is None else f"SSD reads per token {format_bytes(read)}",
                f"hit rate {percent(self.hit_rate)}",
                "-" if cpu_s is None else f"{cpu_s:.3g} CPU s per token",
                *(() if joules is None else (f"{joules:.3g} J per token",)),
            )
        )
