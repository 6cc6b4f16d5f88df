"""Pictures are let in when the budget has room for what they cost, told from their sizes before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import MemoryBudgetExceeded, format_bytes
from .activations import feature_bytes, text_bytes, vision_bytes, with_heap
from .media import ImageSource, VideoSource, decoded_bytes, load_image
from .processing import Processor

_USABLE = 0.8
"""Share of what is free that pictures may take: the estimates are not exact, and decoding wants some weights."""
_STEP = 1.05
_TEXT_TOKENS_OF_A_PICTURE = 2
_PIECE_TOKENS = 256
_VIDEO_BYTES = 128 << 20
"""Set aside for frames while they are read."""


@dataclass(frozen=True, slots=True)
class PictureCost:
    """What images or a video make the first pass cost.

    Attributes:
        patches: rows of the vision tower.
        tokens: positions of the prompt, its text included.
        n_bytes: the most that pixels, features, activations, keys and values take at a time.
    """

    patches: int
    tokens: int
    n_bytes: int


def picture_cost(config: Any, grids: Sequence[Sequence[int]], *, text_tokens: int, itemsize: int) -> PictureCost:
    """Return what pictures cost.

    Args:
        config: of the model.
        grids: for each image or video its groups of frames, rows and columns of patches.
        text_tokens: of the rest of the prompt.
        itemsize: bytes of an activation.
    """
    vision = config.vision_config
    patches = sum(math.prod(grid) for grid in grids)
    shown = patches // vision.spatial_merge_size**2
    tokens = shown + text_tokens
    pixels = patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * (4 + itemsize)
    features = feature_bytes(config, tokens=shown, itemsize=itemsize)
    # The tower runs before the decoder, not beside it; the prompt runs in pieces.
    piece = min(tokens, _PIECE_TOKENS)
    text = text_bytes(config, tokens=piece, logit_rows=1, itemsize=itemsize, cached_tokens=tokens)
    activations = with_heap(max(vision_bytes(config, patches=patches, itemsize=itemsize), text) + features)
    return PictureCost(patches, tokens, pixels + activations)


def prepare_within_budget(
    processor: Processor,
    model: Any,
    prompt: str,
    images: Sequence[ImageSource] = (),
    video: VideoSource | None = None,
    system: str | None = None,
    *,
    max_pixels: int | None = None,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return what `Processor.prepare` does, with pictures as large as the budget of the model has room for.

    Args:
        processor: of the checkpoint.
        model: of `create_optimized_model`; its setting `image_policy` says whether pictures that are too large are
            scaled down (`downsize`) or refused (`refuse`). Without `ram_budget` they are taken as they are.
        prompt, images, video, system, max_pixels: see `Processor.prepare`.

    Returns:
        The arguments of `generate`, and a sentence for each picture that was scaled down.

    Raises:
        InputError: a picture cannot be used.
        MemoryBudgetExceeded: too large, and the policy is `refuse`; or even the smallest form does not fit.
    """
    optimizer, config = model.memory_optimizer, model.config
    if not images and video is None:
        return processor.prepare(prompt, images, video, system, max_pixels=max_pixels), []
    _set_aside(optimizer, sum(decoded_bytes(source) for source in images))
    pictures = [load_image(source) for source in images]
    optimizer.measure_process()
    free = optimizer.free_for_activations()
    text_tokens = _text_tokens(processor, prompt, system)

    def cost(grids: Sequence[Sequence[int]]) -> PictureCost:
        tokens = text_tokens + _TEXT_TOKENS_OF_A_PICTURE * len(grids)
        return picture_cost(config, grids, text_tokens=tokens, itemsize=model.dtype.itemsize)

    def grids(limit: int | None) -> list[tuple[int, int, int]]:
        return [(1, *processor.image_grid(*picture.size, max_pixels=limit)) for picture in pictures]

    def fits(limit: int | None) -> bool:
        return free is None or cost(grids(limit)).n_bytes <= _USABLE * free

    limit = max_pixels
    if pictures and not fits(limit):
        limit = _largest_that_fits(processor, pictures, limit, fits)
        _require(limit, optimizer, cost(grids(max_pixels)), free)
    # Scaling and cutting into patches takes less than the forward that follows; a video is not known yet.
    _set_aside(optimizer, cost(grids(limit)).n_bytes + (0 if video is None else _VIDEO_BYTES))
    tensors = processor.prepare(prompt, pictures, video, system, max_pixels=limit)
    if video is not None and free is not None:
        tensors, limit = _with_smaller_video(processor, model, prompt, pictures, video, system, limit, tensors, free)
    notes = []
    for source, picture, before, after in zip(images, pictures, grids(max_pixels), grids(limit), strict=True):
        if after != before:
            patch = processor.image_processor.patch_size
            name = source if isinstance(source, str) or hasattr(source, "__fspath__") else "an image"
            notes.append(
                f"{name}: {picture.width} x {picture.height} is scaled to {after[2] * patch} x {after[1] * patch}: "
                "the memory budget has no room for more"
            )
    if video is not None and limit != max_pixels:
        notes.append(f"{video}: frames are scaled to {limit} pixels: the memory budget has no room for more")
    return tensors, notes


def _set_aside(optimizer: Any, n_bytes: int) -> None:
    """Have memory free before it is taken: weights fill all that nobody has set aside."""
    free = optimizer.free_for_activations()
    if free is not None:
        held = optimizer.pager.ledger.held_bytes("activations")
        optimizer.reserve_activations(max(held, min(n_bytes, free)))


def _text_tokens(processor: Processor, prompt: str, system: str | None) -> int:
    return int(processor.prepare(prompt or ".", (), None, system)["input_ids"].shape[1])


def _largest_that_fits(processor: Processor, pictures: Sequence[Any], limit: int | None, fits: Any) -> int | None:
    """Return the most pixels of an image, to a twentieth, with which all fit; `None`: not even with one token each."""
    least = processor.least_pixels
    pixels = max(picture.width * picture.height for picture in pictures)
    pixels = int(min(pixels, limit or pixels, processor.image_processor.size["longest_edge"]) / _STEP)
    while pixels >= least:
        if fits(pixels):
            return pixels
        pixels = int(pixels / _STEP)
    return None


def _require(limit: int | None, optimizer: Any, wanted: PictureCost, free: int | None) -> None:
    """Refuse pictures that the budget or the policy does not let in.

    Raises:
        MemoryBudgetExceeded: with what they take and what there is.
    """
    assert free is not None
    refuses = optimizer.config.image_policy == "refuse"
    if limit is not None and not refuses:
        return
    remedy = "raise the budget"
    if limit is not None:
        remedy = f"scale them to at most {limit} pixels (max_pixels), set image_policy='downsize', or raise the budget"
    raise MemoryBudgetExceeded(
        f"the pictures make {wanted.patches} patches and {wanted.tokens} tokens, which take "
        f"{format_bytes(wanted.n_bytes)}; {format_bytes(int(_USABLE * free))} of the budget of "
        f"{format_bytes(optimizer.config.ram_budget)} are free for them; {remedy}",
        requested_bytes=wanted.n_bytes,
        available_bytes=int(_USABLE * free),
        budget_bytes=optimizer.config.ram_budget,
        owner="activations",
    )


def _with_smaller_video(
    processor: Processor,
    model: Any,
    prompt: str,
    pictures: Sequence[Any],
    video: VideoSource,
    system: str | None,
    limit: int | None,
    tensors: dict[str, torch.Tensor],
    free: int,
) -> tuple[dict[str, torch.Tensor], int | None]:
    """Scale a video down until all fits. Its size is known once frames were chosen: they are read again, smaller."""
    while True:
        grids = [grid for name in ("image_grid_thw", "video_grid_thw") for grid in tensors.get(name, torch.empty(0, 3))]
        rows = [[int(extent) for extent in grid] for grid in grids]
        merged = model.config.vision_config.spatial_merge_size**2
        text_tokens = tensors["input_ids"].shape[1] - sum(math.prod(row) for row in rows) // merged
        cost = picture_cost(model.config, rows, text_tokens=text_tokens, itemsize=model.dtype.itemsize)
        if cost.n_bytes <= _USABLE * free:
            return tensors, limit
        frame = rows[-1][1] * rows[-1][2] * processor.video.patch_size**2
        smaller = int(frame * _USABLE * _USABLE * free / cost.n_bytes)
        fitting = smaller if smaller >= processor.least_pixels else None
        _require(fitting, model.memory_optimizer, cost, free)
        limit = min(smaller, limit or smaller)
        tensors = processor.prepare(prompt, pictures, video, system, max_pixels=limit)
