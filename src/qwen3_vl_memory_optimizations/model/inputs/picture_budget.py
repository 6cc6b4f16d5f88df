"""Admit images and videos by their memory cost, estimated from their sizes before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from PIL import Image

from ...errors import MemoryBudgetExceeded, format_bytes, format_duration
from ..layers.forward_memory import feature_bytes, text_bytes, vision_bytes, with_heap
from .detail import AUTO, AUTO_PIXELS, detail_pixels
from .documents import OpenPage
from .images import ImageSource, OpenImage, listed
from .names import file_name, name_inputs
from .processor import Processor
from .video_files import VideoSource, video_bytes

_USABLE = 0.8
"""Share of free memory for images and videos: the estimates are approximate, and decoding needs some weights."""
_STEP = 1.05
_TEXT_TOKENS_OF_A_PICTURE = 2
_PIECE_TOKENS = 256
_VIDEO_BYTES = 64 << 20
"""Reserved for frames that are kept while others are read."""
_PROCESSED_BYTES = 12
"""Per pixel: an image of four bytes, plus scaling it and cutting it into patches."""


@dataclass(frozen=True, slots=True)
class PictureCost:
    """The cost of images or a video in the first pass.

    Attributes:
        patches: rows of the vision tower's input.
        tokens: positions of the prompt, including its text.
        n_bytes: peak of pixels, features, activations, keys and values.
    """

    patches: int
    tokens: int
    n_bytes: int


def picture_cost(config: Any, grids: Sequence[Sequence[int]], *, text_tokens: int, itemsize: int) -> PictureCost:
    """Return the cost of images and videos.

    Args:
        config: of the model.
        grids: frame groups, rows and columns of patches per image or video.
        text_tokens: tokens of the rest of the prompt.
        itemsize: bytes per activation.
    """
    vision = config.vision_config
    patches = sum(math.prod(grid) for grid in grids)
    shown = patches // vision.spatial_merge_size**2
    tokens = shown + text_tokens
    pixels = patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * (4 + itemsize)
    features = feature_bytes(config, tokens=shown, itemsize=itemsize)
    # The tower runs before the decoder, not at the same time; the prompt runs in pieces.
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
    detail: str | None = None,
    fetch: bool = False,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Prepare a prompt as `Processor.prepare` does, with images and frames as large as the budget allows.

    Args:
        processor: of the checkpoint.
        model: from `create_optimized_model`; its `image_policy` decides whether images that are too large are scaled
            down (`downsize`) or rejected (`refuse`). Without `ram_budget` they keep their size.
        prompt, images, video, system, max_pixels, fetch: see `Processor.prepare`.
        detail: a level that stands for `max_pixels`, if that is not set; `auto` takes the most pixels with which the
            first token is expected within the model's setting `first_token_s`. Default: the model's setting `detail`.

    Returns:
        The arguments of `generate`, and a message per image that was scaled down.

    Raises:
        InputError: an image or video cannot be used.
        MemoryBudgetExceeded: too large, and the policy is `refuse`; or even the smallest size does not fit.
    """
    optimizer, config = model.memory_optimizer, model.config
    images = listed(images)
    if not images and video is None:
        return processor.prepare(prompt, images, video, system, max_pixels=max_pixels), []
    opened = processor.open_images(images, max_pixels=max_pixels, fetch=fetch)
    notes: list[str] = []
    text_tokens = _text_tokens(processor, prompt, system)
    if max_pixels is None:
        detail = optimizer.config.detail if detail is None else detail
        if detail == AUTO:
            max_pixels = _pixels_in_time(processor, optimizer, opened, text_tokens, notes)
        else:
            max_pixels = detail_pixels(detail)
        opened = processor.open_images([each.limited_to(max_pixels) for each in opened])
    optimizer.measure_process()
    free = optimizer.free_for_activations()

    def cost(grids: Sequence[Sequence[int]]) -> PictureCost:
        tokens = text_tokens + _TEXT_TOKENS_OF_A_PICTURE * len(grids)
        return picture_cost(config, grids, text_tokens=tokens, itemsize=model.dtype.itemsize)

    def grids(limit: int | None) -> list[tuple[int, int, int]]:
        return [(1, *processor.image_grid(each.width, each.height, max_pixels=limit)) for each in opened]

    def fits(limit: int | None) -> bool:
        return free is None or cost(grids(limit)).n_bytes <= _USABLE * free

    limit = max_pixels
    if opened and not fits(limit):
        optimizer.measure_process(release=True)
        free = optimizer.free_for_activations()
    if opened and not fits(limit):
        limit = _largest_that_fits(processor, opened, limit, fits)
        _require(limit, optimizer, cost(grids(max_pixels)), free)
    patch = processor.image_processor.patch_size
    sizes = [(columns * patch, rows * patch) for _, rows, columns in grids(limit)]
    shown = opened if limit == max_pixels else [each.limited_to(limit) for each in opened]
    pictures = _decoded(optimizer, shown, sizes, free, notes)
    wanted = cost(grids(limit)).n_bytes
    if video is not None:
        wanted += _room_for_video(optimizer, video, free)
    _set_aside(optimizer, wanted)
    tensors = processor.prepare(prompt, pictures, video, system, max_pixels=limit)
    if video is not None and free is not None:
        tensors, limit = _with_smaller_video(processor, model, prompt, pictures, video, system, limit, tensors, free)
    name_inputs(tensors, images=[file_name(each) for each in images])
    for each, before, after in zip(opened, grids(max_pixels), grids(limit), strict=True):
        if after != before:
            notes.append(
                f"{each.name}: scaled from {each.width} x {each.height} to {after[2] * patch} x {after[1] * patch} "
                "to fit the memory budget"
            )
    if video is not None and limit != max_pixels:
        notes.append(f"{video}: frames scaled to {limit} pixels to fit the memory budget")
    return tensors, notes


def _set_aside(optimizer: Any, n_bytes: int) -> None:
    """Reserve memory before it is used; otherwise weights fill it."""
    free = optimizer.free_for_activations()
    if free is not None:
        held = optimizer.pager.ledger.held_bytes("activations")
        optimizer.reserve_activations(max(held, min(n_bytes, free)))


def _pixels_in_time(
    processor: Processor, optimizer: Any, opened: Sequence[OpenImage | OpenPage], text_tokens: int, notes: list[str]
) -> int | None:
    """Return the most pixels per picture with which the first token is expected in time; `None`: all of them."""
    if not opened:
        return None
    target_s = optimizer.config.first_token_s
    merged = processor.image_processor.merge_size**2

    def seconds(limit: int | None) -> tuple[float, bool]:
        sizes = [each.limited_to(limit) for each in opened]
        grids = [(1, *processor.image_grid(each.width, each.height, max_pixels=limit)) for each in sizes]
        shown = sum(math.prod(grid) for grid in grids) // merged
        tokens = text_tokens + _TEXT_TOKENS_OF_A_PICTURE * len(grids) + shown
        estimate = optimizer.estimator.of_sizes(grids, tokens)
        return estimate.seconds, estimate.measured

    for limit in (None, *AUTO_PIXELS):
        expected_s, measured = seconds(limit)
        if expected_s <= target_s:
            break
    size = "all pixels" if limit is None else f"at most {limit / 1e6:.2g} million pixels"
    source = "" if measured else " (a guess until this model has run here)"
    late = "" if expected_s <= target_s else f"; {format_duration(target_s)} cannot be reached"
    notes.append(
        f"detail auto: {size} per picture; first token after about {format_duration(expected_s)}{source}{late}"
    )
    return limit


def _decoded(
    optimizer: Any,
    opened: Sequence[OpenImage | OpenPage],
    sizes: Sequence[tuple[int, int]],
    free: int | None,
    notes: list[str],
) -> list[Any]:
    """Return the images, to be decoded at full size one at a time; if one does not fit so, decoded and scaled.

    Args:
        optimizer: owns the budget.
        opened: the images.
        sizes: width and height of each at the model's input.
        free: bytes; `None`: unlimited.
        notes: receives a message per image that was not decoded at full size.

    Raises:
        MemoryBudgetExceeded: an image cannot be decoded in the free memory.
    """
    most = max((_bytes_to_decode(each, None) for each in opened), default=0)
    most += max((each.width * each.height for each in opened), default=0) * 4
    if free is None or most <= _USABLE * free:
        _set_aside(optimizer, most)
        return list(opened)
    usable = int(_USABLE * free) - sum(width * height for width, height in sizes) * 4
    pictures = []
    for each, (width, height) in zip(opened, sizes, strict=True):
        # Twice the size if it fits: scaling from there is as good as from the full image.
        choices = ((width, height),) if isinstance(each, OpenPage) else (None, (2 * width, 2 * height), (width, height))
        fitting = [choice for choice in choices if _bytes_to_decode(each, choice) <= usable]
        if not fitting:
            _refuse(each, _bytes_to_decode(each, choices[-1]), usable, optimizer)
        _set_aside(optimizer, int(_USABLE * free) - usable + _bytes_to_decode(each, fitting[0]))
        picture = each.decode(fitting[0])
        if picture.width * picture.height < each.width * each.height:
            notes.append(
                f"{each.name}: decoded at {picture.width} x {picture.height} instead of {each.width} x {each.height} "
                "to fit the memory budget"
            )
        if (picture.width > picture.height) == (
            each.width > each.height
        ):  # otherwise decoding applied an orientation missing from the header
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        pictures.append(picture)
        del picture
    return pictures


def _bytes_to_decode(opened: OpenImage | OpenPage, at_least: tuple[int, int] | None) -> int:
    """Return the memory for decoding an image and then scaling it."""
    pixels = opened.width * opened.height
    decoded = opened.decode_bytes(at_least)
    return max(decoded, _PROCESSED_BYTES * pixels) if at_least is None else decoded


def _refuse(opened: OpenImage | OpenPage, n_bytes: int, usable: int, optimizer: Any) -> NoReturn:
    pixels = opened.width * opened.height
    least = int(pixels * max(usable, 0) / n_bytes)
    raise MemoryBudgetExceeded(
        f"{opened.name}: decoding its {opened.width} x {opened.height} pixels needs {format_bytes(n_bytes)}; "
        f"{format_bytes(max(usable, 0))} of the budget of {format_bytes(optimizer.config.ram_budget)} are free for it; "
        f"scale it down to {least} pixels, or raise the budget",
        requested_bytes=n_bytes,
        available_bytes=max(usable, 0),
        budget_bytes=optimizer.config.ram_budget,
        owner="image",
    )


def _room_for_video(optimizer: Any, video: VideoSource, free: int | None) -> int:
    """Return the memory for reading a video.

    Raises:
        MemoryBudgetExceeded: its frames cannot be decoded in the free memory.
    """
    n_bytes = video_bytes(video)
    if free is not None and n_bytes > _USABLE * free:
        raise MemoryBudgetExceeded(
            f"{str(video)[:200]}: decoding its frames needs {format_bytes(n_bytes)}; "
            f"{format_bytes(int(_USABLE * free))} of the budget of {format_bytes(optimizer.config.ram_budget)} are "
            "free for it; scale it down, or raise the budget",
            requested_bytes=n_bytes,
            available_bytes=int(_USABLE * free),
            budget_bytes=optimizer.config.ram_budget,
            owner="video",
        )
    return _VIDEO_BYTES + n_bytes


def _text_tokens(processor: Processor, prompt: str, system: str | None) -> int:
    return int(processor.prepare(prompt or ".", (), None, system)["input_ids"].shape[1])


def _largest_that_fits(
    processor: Processor, pictures: Sequence[OpenImage | OpenPage], limit: int | None, fits: Any
) -> int | None:
    """Return the most pixels per image, within 5 %, at which all fit; `None`: not even at one token each."""
    least = processor.least_pixels
    pixels = max(picture.width * picture.height for picture in pictures)
    pixels = int(min(pixels, limit or pixels, processor.image_processor.size["longest_edge"]) / _STEP)
    while pixels >= least:
        if fits(pixels):
            return pixels
        pixels = int(pixels / _STEP)
    return None


def _require(limit: int | None, optimizer: Any, wanted: PictureCost, free: int | None) -> None:
    """Reject images and videos that do not fit the budget or the policy.

    Raises:
        MemoryBudgetExceeded: reports the bytes needed and available.
    """
    assert free is not None
    refuses = optimizer.config.image_policy == "refuse"
    if limit is not None and not refuses:
        return
    remedy = "raise the budget"
    if limit is not None:
        remedy = f"scale them to at most {limit} pixels (max_pixels), set image_policy='downsize', or raise the budget"
    raise MemoryBudgetExceeded(
        f"the images or video make {wanted.patches} patches and {wanted.tokens} tokens, which need "
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
    """Scale a video down until everything fits. Its size is known once frames are chosen, so they are read again,
    smaller.
    """
    while True:
        grids = [grid for name in ("image_grid_thw", "video_grid_thw") for grid in tensors.get(name, ())]
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
