"""Files to frames: images and videos as RGB pictures. Knows nothing of patches, tokens or the model."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError

ImageSource = str | os.PathLike[str] | Image.Image
VideoSource = str | os.PathLike[str] | Sequence[ImageSource]
# (frames, height, width) -> (height, width) to which each frame is resized as soon as it is decoded.
FrameSize = Callable[[int, int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FrameSampling:
    """Which frames of a video are looked at.

    Attributes:
        frames_per_second: how many of each second, evenly spaced.
        min_frames: at least so many, where the video has them.
        max_frames: never more.
    """

    frames_per_second: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    def indices(self, total_frames: int, video_fps: float) -> list[int]:
        """Return the frames to take of a video that plays `total_frames` at `video_fps` a second."""
        wanted = int(total_frames / video_fps * self.frames_per_second)
        return self.spread(total_frames, max(wanted, self.min_frames))

    def spread(self, total_frames: int, n_frames: int) -> list[int]:
        """Return at most `n_frames` frames, evenly spaced from the first to the last."""
        n_frames = min(n_frames, self.max_frames, total_frames)
        return [int(index) for index in np.linspace(0, total_frames - 1, n_frames).round()]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VideoFrames:
    """Frames of one video, all of one size, and the second at which each is shown."""

    images: list[Image.Image]
    seconds: list[float]


def load_image(source: ImageSource) -> Image.Image:
    """Return an image as RGB, turned as its EXIF orientation says; transparency is laid on white.

    Raises:
        InputError: missing, empty, damaged, of no known format, or without pixels.
    """
    if isinstance(source, Image.Image):
        return _as_rgb(source, "the image")
    path = Path(source)
    try:
        with Image.open(path) as image:
            return _as_rgb(image, str(path))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such image") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory; name an image in it") from None
    except UnidentifiedImageError:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty; copy or export it again") from None
        raise InputError(f"{path} is not an image that can be read; convert it to PNG or JPEG") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large to be decoded safely ({error}); scale it down first") from error
    # The decoders raise nearly anything (struct.error, EOFError, SyntaxError, ...) on a damaged file.
    except Exception as error:
        raise InputError(f"{path} is damaged or truncated ({error}); copy or export it again") from error


def decoded_bytes(source: ImageSource) -> int:
    """Return about how many bytes decoding an image takes, told from its header; 0 where it cannot be read."""
    try:
        if isinstance(source, Image.Image):
            width, height = source.size
        else:
            with Image.open(Path(source)) as image:
                width, height = image.size
    except Exception:  # `load_image` says what is wrong
        return 0
    return width * height * 4 * 3  # four bytes a pixel; turned and converted, it is there three times


def load_video(
    source: VideoSource, sampling: FrameSampling, frame_size: FrameSize, *, fps: float | None = None
) -> VideoFrames:
    """Return the frames of a video, each resized as soon as it is decoded, so that only small ones are held.

    Args:
        source: a video file, a directory of images (in the order of their names), or images.
        sampling: which frames of a file are taken. Of images all are, up to its `max_frames`.
        frame_size: gives the size to which frames are resized.
        fps: the rate at which images were taken; a file knows its own.

    Raises:
        InputError: missing, damaged, not a video, or `av` is not installed.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            raise InputError(f"{path}: there is no such video")
        if not path.is_dir():
            return _decode_file(path, sampling, frame_size)
        images: Sequence[ImageSource] = _images_in(path)
        name = str(path)
    else:
        images, name = source, "the video"
    if not images:
        raise InputError(f"{name} holds no images; a video needs at least one frame")
    # What transformers assumes of frames that come without a rate.
    fps = 24.0 if fps is None else fps
    indices = sampling.spread(len(images), len(images))
    frames = _resized((load_image(images[index]) for index in indices), len(indices), frame_size)
    return VideoFrames(images=frames, seconds=[index / fps for index in indices])


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    if not (image.width and image.height):
        raise InputError(f"{name} has no pixels ({image.width} x {image.height})")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips it to white.
        levels = np.asarray(image).astype(np.int64)
        image = Image.fromarray((levels // (256 if levels.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _images_in(directory: Path) -> list[Path]:
    suffixes = Image.registered_extensions()
    paths = [path for path in directory.iterdir() if path.suffix.lower() in suffixes]
    # frame_10 comes after frame_9.
    return sorted(paths, key=lambda path: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", path.name)])


def _resized(frames: Iterator[Image.Image], n_frames: int, frame_size: FrameSize) -> list[Image.Image]:
    resized: list[Image.Image] = []
    first: tuple[int, int] | None = None
    for frame in frames:
        if first is None:
            first = frame.size
            height, width = frame_size(n_frames, frame.height, frame.width)
        if frame.size != first:
            raise InputError(f"the frames of a video have one size: {first} is followed by {frame.size}")
        same = (frame.width, frame.height) == (width, height)
        resized.append(frame if same else frame.resize((width, height), Image.Resampling.BICUBIC))
    return resized


def _decode_file(path: Path, sampling: FrameSampling, frame_size: FrameSize) -> VideoFrames:
    try:
        import av
    except ImportError:
        raise InputError(
            f"{path}: reading video files needs PyAV; run: "
            "pip install 'qwen3-vl-memory-optimizations[video]' (or give a directory of frames)"
        ) from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 24)
            total = stream.frames
        # Some containers (WebM of browsers, raw streams) do not say how many frames they hold.
        total = total or _count_frames(av, path)
        if not total:
            raise InputError(f"{path} holds no video frames")
        indices = sampling.indices(total, fps)
        with av.open(str(path)) as container:
            images = _resized(_decoded(container, indices), len(indices), frame_size)
    except av.FFmpegError as error:
        raise InputError(f"{path} is not a video that can be read, or is damaged ({error})") from error
    if not images:
        raise InputError(f"{path}: none of its frames could be decoded; it is damaged")
    # A container may promise more frames than it holds.
    return VideoFrames(images=images, seconds=[index / fps for index in indices[: len(images)]])


def _count_frames(av: Any, path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))


def _decoded(container: Any, indices: list[int]) -> Iterator[Image.Image]:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    wanted = iter(indices)
    target = next(wanted)
    for index, frame in enumerate(container.decode(stream)):
        if index < target:
            continue
        yield frame.to_image()
        following = next(wanted, None)
        if following is None:
            return
        target = following
