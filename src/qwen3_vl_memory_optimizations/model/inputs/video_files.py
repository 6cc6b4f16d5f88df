"""Videos to frames, as RGB pictures. Knows nothing of patches, tokens or the model."""

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
"""By a decoder: those that later ones refer to, and one a thread."""
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
    _require_rate(fps)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            raise InputError(f"{path}: there is no such video")
        if not path.is_dir():
            return _decode_file(path, sampling, frame_size)
        images: Sequence[ImageSource] = _images_in(path)
        name = str(path)
    elif isinstance(source, Sequence) and not isinstance(source, bytes | bytearray | memoryview):
        images, name = source, "the video"
    else:
        shown = repr(source)[:200]
        raise InputError(
            f"the video is a {type(source).__name__} ({shown}); give a file, a directory or a list of images"
        )
    if not images:
        raise InputError(f"{name} holds no images; a video needs at least one frame")
    # What transformers assumes of frames that come without a rate.
    fps = 24.0 if fps is None else fps
    indices = sampling.spread(len(images), len(images))
    frames = _resized((open_image(images[index], index + 1).decode() for index in indices), len(indices), frame_size)
    return VideoFrames(images=frames, seconds=[index / fps for index in indices])


def video_bytes(source: VideoSource) -> int:
    """Return about how many bytes reading a video takes beside the frames that are kept; 0 where that is not told.

    That is what a decoder holds (one frame for each of its threads, and those that others refer to), and the frame that
    is being resized.
    """
    try:
        if isinstance(source, str | os.PathLike) and not Path(source).is_dir():
            import av

            with av.open(str(source)) as container:
                context = container.streams.video[0].codec_context
                return int(context.width * context.height * (_FRAMES_HELD * 1.5 + 2 * 4))
        images = _images_in(Path(source)) if isinstance(source, str | os.PathLike) else source
        return max((open_image(image).decode_bytes() for image in images), default=0)
    except Exception:  # `load_video` says what is wrong
        return 0


def _require_rate(fps: float | None) -> None:
    if fps is not None and not (isinstance(fps, int | float) and math.isfinite(fps) and fps > 0):
        raise InputError(f"video_fps: {fps!r} is no number of frames a second above 0")


def _images_in(directory: Path) -> list[Path]:
    suffixes = Image.registered_extensions()
    # macOS lays a `._frame.png` beside each `frame.png` on disks of others.
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
        seconds: list[float] = []
        with av.open(str(path)) as container:
            images = _resized(_decoded(container, indices, fps, seconds), len(indices), frame_size)
    except av.FFmpegError as error:
        raise InputError(f"{path} is not a video that can be read, or is damaged ({error})") from error
    if not images:
        raise InputError(f"{path}: none of its frames could be decoded; it is damaged")
    # A container may promise more frames than it holds.
    return VideoFrames(images=images, seconds=seconds)


def _count_frames(av: Any, path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))


def _decoded(container: Any, indices: list[int], fps: float, seconds: list[float]) -> Iterator[Image.Image]:
    """Yield the frames with these indices, as they are shown; note in `seconds` when each is."""
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
        # Frames may follow each other at any pace; the first is shown at 0.
        seconds.append(max(0.0, shown_s - first_s))
        yield _upright(frame)
        following = next(wanted, None)
        if following is None:
            return
        target = following


def _upright(frame: Any) -> Image.Image:
    """Return a frame as its display matrix turns it: phones film upright lying on their side."""
    image = frame.to_image()
    quarters = round(getattr(frame, "rotation", 0) / 90) % 4
    turns = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    turn = turns[quarters]
    return image if turn is None else image.transpose(turn)
