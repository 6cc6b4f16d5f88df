"""Decode videos into RGB frames. Independent of patches, tokens and the model."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import InputError
from .images import ImageSource, open_image

VideoSource = str | os.PathLike[str] | Sequence[ImageSource]
_THREADS = 2
_FRAMES_HELD = 12
"""Frames that a decoder holds: reference frames, and one per thread."""
# (frames, height, width) -> (height, width) to which each frame is resized as soon as it is decoded.
FrameSize = Callable[[int, int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FrameSampling:
    """Selects the frames of a video.

    Attributes:
        frames_per_second: frames per second of video, evenly spaced.
        min_frames: minimum number, if the video has that many.
        max_frames: maximum number.
    """

    frames_per_second: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    def indices(self, total_frames: int, video_fps: float) -> list[int]:
        """Return the frames to take from a video of `total_frames` at `video_fps` frames per second."""
        wanted = int(total_frames / video_fps * self.frames_per_second)
        return self.spread(total_frames, max(wanted, self.min_frames))

    def spread(self, total_frames: int, n_frames: int) -> list[int]:
        """Return at most `n_frames` frames, evenly spaced from the first to the last."""
        n_frames = min(n_frames, self.max_frames, total_frames)
        return [int(index) for index in np.linspace(0, total_frames - 1, n_frames).round()]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VideoFrames:
    """Frames of one video, all of equal size, and the display time of each in seconds."""

    images: list[Image.Image]
    seconds: list[float]


def load_video(
    source: VideoSource, sampling: FrameSampling, frame_size: FrameSize, *, fps: float | None = None
) -> VideoFrames:
    """Return the frames of a video, each resized as soon as it is decoded, so that only small frames are held.

    Args:
        source: a video file, a directory of images (ordered by name), or images.
        sampling: selects the frames of a file. Of images all are used, up to its `max_frames`.
        frame_size: returns the size to which frames are resized.
        fps: the frame rate of images; a file declares its own.

    Raises:
        InputError: missing, damaged, not a video, or `av` is not installed.
    """
    _require_rate(fps)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            raise InputError(f"{path}: no such video; check the path")
        if not path.is_dir():
            return _decode_file(path, sampling, frame_size)
        images: Sequence[ImageSource] = _images_in(path)
        name = str(path)
    elif isinstance(source, Sequence) and not isinstance(source, bytes | bytearray | memoryview):
        images, name = source, "the video"
    else:
        shown = repr(source)[:200]
        raise InputError(
            f"the video is a {type(source).__name__} ({shown}); pass a file, a directory or a list of images"
        )
    if not images:
        raise InputError(f"{name} contains no images; a video needs at least one frame")
    # The default of transformers for frames without a rate.
    fps = 24.0 if fps is None else fps
    indices = sampling.spread(len(images), len(images))
    frames = _resized((open_image(images[index], index + 1).decode() for index in indices), len(indices), frame_size)
    return VideoFrames(images=frames, seconds=[index / fps for index in indices])


def video_bytes(source: VideoSource) -> int:
    """Return the approximate memory of reading a video, besides the kept frames; 0 if unknown.

    This is what a decoder holds (one frame per thread, and reference frames) plus the frame being resized.
    """
    try:
        if isinstance(source, str | os.PathLike) and not Path(source).is_dir():
            import av

            with av.open(str(source)) as container:
                context = container.streams.video[0].codec_context
                return int(context.width * context.height * (_FRAMES_HELD * 1.5 + 2 * 4))
        images = _images_in(Path(source)) if isinstance(source, str | os.PathLike) else source
        return max((open_image(image).decode_bytes() for image in images), default=0)
    except Exception:  # `load_video` reports the error
        return 0


def _require_rate(fps: float | None) -> None:
    if fps is not None and not (isinstance(fps, int | float) and math.isfinite(fps) and fps > 0):
        raise InputError(f"video_fps: {fps!r} is not a positive number; pass frames per second above 0")


def _images_in(directory: Path) -> list[Path]:
    suffixes = Image.registered_extensions()
    # macOS puts a `._frame.png` beside each `frame.png` on foreign disks.
    shown = (path for path in directory.iterdir() if not path.name.startswith("."))
    paths = [path for path in shown if path.suffix.lower() in suffixes]
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
            raise InputError(f"the frames of a video must have one size; {first} is followed by {frame.size}")
        same = (frame.width, frame.height) == (width, height)
        resized.append(frame if same else frame.resize((width, height), Image.Resampling.BICUBIC))
    return resized


def _decode_file(path: Path, sampling: FrameSampling, frame_size: FrameSize) -> VideoFrames:
    try:
        import av
    except ImportError:
        raise InputError(
            f"{path}: reading video files needs PyAV; run: "
            "pip install 'qwen3-vl-memory-optimizations[video]' (or pass a directory of frames)"
        ) from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} contains no video stream")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 24)
            total = stream.frames
        # Some containers (WebM from browsers, raw streams) do not store their frame count.
        total = total or _count_frames(av, path)
        if not total:
            raise InputError(f"{path} contains no video frames")
        indices = sampling.indices(total, fps)
        seconds: list[float] = []
        with av.open(str(path)) as container:
            images = _resized(_decoded(container, indices, fps, seconds), len(indices), frame_size)
    except av.FFmpegError as error:
        raise InputError(f"{path} is not a video that can be read, or is damaged ({error}); copy it again") from error
    if not images:
        raise InputError(f"{path}: none of its frames could be decoded; it is damaged")
    # A container may declare more frames than it holds.
    return VideoFrames(images=images, seconds=seconds)


def _count_frames(av: Any, path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))


def _decoded(container: Any, indices: list[int], fps: float, seconds: list[float]) -> Iterator[Image.Image]:
    """Yield the frames with these indices, in display orientation; append their display times to `seconds`."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = _THREADS
    wanted = iter(indices)
    target = next(wanted)
    first_s: float | None = None
    for index, frame in enumerate(container.decode(stream)):
        shown_s = index / fps if frame.time is None else float(frame.time)
        first_s = shown_s if first_s is None else first_s
        if index < target:
            continue
        # Frame intervals may vary; the first frame is shown at 0.
        seconds.append(max(0.0, shown_s - first_s))
        yield _upright(frame)
        following = next(wanted, None)
        if following is None:
            return
        target = following


def _upright(frame: Any) -> Image.Image:
    """Return a frame with its display matrix applied: phones store upright videos sideways."""
    image = frame.to_image()
    quarters = round(getattr(frame, "rotation", 0) / 90) % 4
    turns = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    turn = turns[quarters]
    return image if turn is None else image.transpose(turn)
