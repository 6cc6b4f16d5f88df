"""Levels of detail: how many pixels of each picture the model sees."""

from __future__ import annotations

from ...errors import ConfigurationError

AUTO = "auto"
DETAIL_PIXELS: dict[str, int | None] = {
    "low": 256 * 32 * 32,
    "medium": 1024 * 32 * 32,
    "document": 1536 * 32 * 32,
    "high": None,
}
"""The most pixels per picture at each level; a token of Qwen3-VL covers 32 x 32. `None`: the picture's own size, or 150
dots per inch for a page.
"""
AUTO_PIXELS = tuple(tokens * 32 * 32 for tokens in (3072, 2048, 1536, 1024, 768, 512, 384, 256))
"""What `auto` chooses among besides the own size: few steps, since a picture is known again only at its former size."""


def detail_pixels(detail: str) -> int | None:
    """Return the most pixels per picture at a level of detail; `None`: no limit.

    Raises:
        ConfigurationError: an unknown level, or `auto`, which depends on the model and on the machine.
    """
    if detail == AUTO:
        raise ConfigurationError("detail: 'auto' needs a model; use prepare_within_budget, or name a level")
    if detail not in DETAIL_PIXELS:
        raise ConfigurationError(f"detail: {detail!r} is not one of {', '.join(DETAIL_PIXELS)}, {AUTO}")
    return DETAIL_PIXELS[detail]
