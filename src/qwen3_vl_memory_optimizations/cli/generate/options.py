"""Options of `qwen3vl-mem generate` that stand for others, and settings made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...model.inputs.processor import Processor


def detail_options(
    *, detail: str | None = None, first_token_s: str | None = None, max_pixels: int | None = None
) -> dict[str, Any]:
    """Return the settings of the given options; `--first-token` alone means `--detail auto`.

    Raises:
        ConfigurationError: options that contradict each other.
    """
    from ...errors import ConfigurationError

    if max_pixels is not None and (detail is not None or first_token_s is not None):
        raise ConfigurationError("--max-pixels and --detail both set the size of pictures; use only one of them")
    if first_token_s is None:
        return {} if detail is None else {"detail": detail}
    if detail not in (None, "auto"):
        raise ConfigurationError(f"--first-token is the aim of --detail auto, not of {detail}; use only one of them")
    return {"detail": "auto", "first_token_s": first_token_s}


def known_pixels(detail: str) -> int | None:
    """Return the maximum pixels per picture; `None` if they depend on the loaded model."""
    from ...model.inputs.detail import AUTO, detail_pixels

    return None if detail == AUTO else detail_pixels(detail)


def decoding_options(
    processor: Processor, temperature: float, top_p: float | None, prompt_lookup: int
) -> dict[str, Any]:
    """Return how `generate` chooses tokens."""
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
        if top_p is not None:
            options["top_p"] = top_p
    if prompt_lookup:
        options["prompt_lookup_num_tokens"] = prompt_lookup
        # Without this, transformers also drafts image placeholder tokens and fails when it counts them.
        options["suppress_tokens"] = [processor.tokens.image_id, processor.tokens.video_id]
    return options
