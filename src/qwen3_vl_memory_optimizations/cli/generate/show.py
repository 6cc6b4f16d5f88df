"""What `qwen3vl-mem generate` prints besides its answers: notes, the expected wait, figures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..common.output import error_console, percent

if TYPE_CHECKING:
    from ...model.inputs.processor import AnswerStreamer, Processor
    from ...model.run.estimate import Estimate, PromptEstimator

_LONG_S = 10.0
"""Only longer waits are announced."""


def note(text: str, style: str = "yellow") -> None:
    """Print a line to stderr."""
    error_console().print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def expected_wait(
    estimate: Estimate, processor: Processor, estimator: PromptEstimator, inputs: Mapping[str, Any]
) -> str | None:
    """Return a line about the wait for the first token and how to shorten it; `None` if it is short.

    Args:
        estimate: of these arguments of `generate`.
        processor, estimator: of the model.
        inputs: the arguments.
    """
    from ...errors import format_duration

    if estimate.seconds <= _LONG_S:
        return None
    images = inputs["image_grid_thw"].tolist() if inputs.get("image_grid_thw") is not None else []
    what = "this prompt" if not estimate.patches else "this picture" if len(images) == 1 else f"{len(images)} pictures"
    if estimate.patches and not images:
        what = "this video"
    source = "" if estimate.measured else " (a guess until this model has run here)"
    line = f"about {format_duration(estimate.seconds)} to the first token of {what}{source}"
    low = _at_low_detail(processor, estimator, inputs, images) if images and estimate.patches else None
    if low is None or low.seconds > estimate.seconds / 2:
        return line
    return f"{line}; --detail low: about {format_duration(low.seconds)}"


def _at_low_detail(
    processor: Processor, estimator: PromptEstimator, inputs: Mapping[str, Any], images: list[list[int]]
) -> Estimate:
    from ...model.inputs.detail import detail_pixels

    patch, merged = processor.image_processor.patch_size, processor.image_processor.merge_size**2
    limit = detail_pixels("low")
    smaller = [
        (1, *processor.image_grid(columns * patch, rows * patch, max_pixels=limit)) for _, rows, columns in images
    ]
    saved = sum(math.prod(grid) for grid in images) - sum(math.prod(grid) for grid in smaller)
    videos = inputs["video_grid_thw"].tolist() if inputs.get("video_grid_thw") is not None else []
    return estimator.of_sizes([*smaller, *videos], int(inputs["input_ids"].shape[1]) - saved // merged)


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
        from ...errors import format_bytes

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
