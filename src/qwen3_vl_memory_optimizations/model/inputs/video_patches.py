"""Convert a video into patches: frame selection, size and order.

Frames are resized as they are decoded and written to their patches one by one. transformers' video processor needs
torchvision, and holds every frame at full size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ...errors import InputError
from .video_files import FrameSampling, VideoFrames

MAX_ASPECT_RATIO = 200


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VideoSettings:
    """Video preprocessing settings; keys and defaults are those of transformers' `Qwen3VLVideoProcessor`.

    Attributes:
        min_pixels: of the whole video, all frames together.
        max_pixels: of the whole video, all frames together.
        max_tokens_per_frame: upper limit per frame, regardless of `max_pixels`.
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 128 * 32 * 32
    max_pixels: int = 768 * 32 * 32
    max_tokens_per_frame: int = 768
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    sampling: FrameSampling = dataclasses.field(default_factory=FrameSampling)

    @classmethod
    def from_mapping(cls, found: dict[str, Any]) -> VideoSettings:
        """Return the settings from a checkpoint's preprocessor configuration."""
        size = found.get("size") or {}
        renamed = {
            "min_pixels": size.get("shortest_edge"),
            "max_pixels": size.get("longest_edge"),
            "max_tokens_per_frame": found.get("max_video_tokens"),
            "image_mean": _as_tuple(found.get("image_mean")),
            "image_std": _as_tuple(found.get("image_std")),
        }
        same = {key: found.get(key) for key in ("patch_size", "temporal_patch_size", "merge_size")}
        sampling = {
            "frames_per_second": found.get("fps"),
            "min_frames": found.get("min_frames"),
            "max_frames": found.get("max_frames"),
        }
        return cls(**_given(same | renamed), sampling=FrameSampling(**_given(sampling)))

    def limited_to(self, max_pixels: int | None) -> VideoSettings:
        """Return these settings with at most `max_pixels` per frame."""
        if max_pixels is None:
            return self
        tokens = max_pixels // (self.patch_size * self.merge_size) ** 2
        return dataclasses.replace(
            self,
            # `frame_size` allows a frame 1.05 times `min_pixels`.
            min_pixels=min(self.min_pixels, int(max_pixels / 1.05)),
            max_tokens_per_frame=min(self.max_tokens_per_frame, tokens),
        )

    def frame_size(self, n_frames: int, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to which each frame of a video is resized.

        This is transformers' rule with `cap_pixels_per_frame=True`, as used by the model's authors: without the cap a
        short clip costs as many tokens as a long one.

        Raises:
            InputError: one side is more than 200 times the other.
        """
        n_frames = max(n_frames, self.temporal_patch_size)
        factor = self.patch_size * self.merge_size
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise InputError(
                f"a frame of {width} x {height} is more than {MAX_ASPECT_RATIO} times as long as wide; crop the video"
            )
        if min(height, width) < factor:
            scale = factor / min(height, width)
            height, width = int(height * scale), int(width * scale)
        cap = min(self.max_tokens_per_frame * factor**2, self.max_pixels // n_frames)
        max_pixels = max(cap, int(self.min_pixels * 1.05)) * n_frames
        resized_height, resized_width = (round(side / factor) * factor for side in (height, width))
        pixels = round(n_frames / self.temporal_patch_size) * self.temporal_patch_size * resized_height * resized_width
        if pixels > max_pixels:
            shrink = math.sqrt(n_frames * height * width / max_pixels)
            return _sides(height / shrink, width / shrink, factor, math.floor)
        if pixels < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (n_frames * height * width))
            return _sides(height * grow, width * grow, factor, math.ceil)
        return resized_height, resized_width


def video_tensors(frames: VideoFrames, settings: VideoSettings) -> dict[str, torch.Tensor]:
    """Return `pixel_values_videos` (patches, values) and `video_grid_thw` (1, 3) of a video.

    The order of the values is that of transformers' video processor; an incomplete last group is padded with its last
    frame.
    """
    patch, merge, group = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    images = frames.images + frames.images[-1:] * (-len(frames.images) % group)
    rows, columns = images[0].height // patch, images[0].width // patch
    blocks = (rows // merge, columns // merge)
    values = np.empty((len(images) // group, *blocks, merge, merge, 3, group, patch, patch), dtype=np.float32)
    mean = np.array(settings.image_mean, dtype=np.float32)
    std = np.array(settings.image_std, dtype=np.float32)
    for index, image in enumerate(images):
        pixels = (np.asarray(image, dtype=np.float32) / 255 - mean) / std
        tiles = pixels.reshape(blocks[0], merge, patch, blocks[1], merge, patch, 3)
        values[index // group, ..., index % group, :, :] = tiles.transpose(0, 3, 1, 4, 6, 2, 5)
    grid = [len(values), rows, columns]
    return {
        "pixel_values_videos": torch.from_numpy(values.reshape(math.prod(grid), -1)),
        "video_grid_thw": torch.tensor([grid]),
    }


def group_seconds(frames: VideoFrames, settings: VideoSettings) -> list[float]:
    """Return the time of each frame group: the mean of its first and last frame."""
    group = settings.temporal_patch_size
    seconds = frames.seconds + frames.seconds[-1:] * (-len(frames.seconds) % group)
    return [(seconds[first] + seconds[first + group - 1]) / 2 for first in range(0, len(seconds), group)]


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _as_tuple(values: list[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)


def _sides(height: float, width: float, factor: int, rounded: Callable[[float], int]) -> tuple[int, int]:
    return max(factor, rounded(height / factor) * factor), max(factor, rounded(width / factor) * factor)
