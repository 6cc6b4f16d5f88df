"""Open images from any source and decode them to RGB.

Opening reads only the header, so that the cost of decoding is known in advance. Values are scaled by what their format
declares, never by their actual range: no pixel affects the others.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import re
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ...errors import InputError
from .documents import is_document

ImageSource = Any
"""A path, `data:` or `file:` URL, `http(s):` URL (if fetching is enabled), bytes, an open file, a Pillow image, or a
numpy or torch array: `[height, width]`, `[height, width, channels]` or `[channels, height, width]` with 1, 3 or 4
channels; uint8, uint16, bool, or floats from 0 to 1. Also an image already opened, or a page of `document_pages`.
"""

_ADDRESS = re.compile(r"^(https?|data|file):", re.IGNORECASE)
_DATA = re.compile(r"^data:[^,]*?(;base64)?\s*,(.*)$", re.IGNORECASE | re.DOTALL)
_MOST_NAME = 200
_MOST_FETCHED_BYTES = 200 << 20
_FETCH_TIMEOUT_S = 30
_ORIENTATION = 0x0112
_TURNED = range(5, 9)
_VECTOR_FORMATS = ("EPS", "WMF", "EMF")
_DECODER_BYTES = {"WEBP": 8, "AVIF": 12, "HEIF": 12, "JPEG2000": 16, "GIF": 8, "TIFF": 4, "MPO": 0, "JPEG": 0, "PNG": 0}
"""Decoder memory per pixel, besides the image itself. A progressive JPEG holds all coefficients, at any scale."""
_PROGRESSIVE_BYTES = 6
_SCALES = (1, 2, 4, 8)
_CHECKED_PIXELS = 1 << 22


@dataclass(frozen=True, slots=True)
class OpenImage:
    """An image whose header was read.

    Attributes:
        name: for messages.
        width, height: as displayed, in pixels.
        mode, format: of Pillow; the format is `None` if the source was not a file.
        turned: the EXIF orientation rotates or mirrors it.
        progressive: a JPEG that is decoded whole before it is scaled.
    """

    name: str
    width: int
    height: int
    mode: str
    format: str | None
    turned: bool
    progressive: bool
    _opener: Callable[[], contextlib.AbstractContextManager[Image.Image]]

    def decode_bytes(self, at_least: tuple[int, int] | None = None) -> int:
        """Return the approximate peak memory of decoding, in bytes.

        Args:
            at_least: minimum width and height of the result; default: full size.
        """
        pixels = self.width * self.height
        scale = self._scale(at_least)
        stored = {"1": 1, "L": 1, "P": 1, "I;16": 2}.get(self.mode, 4)
        steps = [stored + (stored if self.turned else 0), 4 if self.mode == "RGB" else stored + 4]
        if "A" in self.mode or self.mode == "P":
            steps.append(4 + 4 + 1)
        decoder = _DECODER_BYTES.get(self.format or "PNG", 8)
        return (max(steps) + decoder) * pixels // scale**2 + (_PROGRESSIVE_BYTES * pixels if self.progressive else 0)

    def _scale(self, at_least: tuple[int, int] | None) -> int:
        """Return the factor by which decoding itself shrinks the image; only JPEG supports it."""
        if at_least is None or self.format not in ("JPEG", "MPO") or self.mode not in ("RGB", "L", "YCbCr"):
            return 1
        longer = max(at_least) if self.turned else 0  # width and height may be swapped
        width, height = (max(side, longer) for side in at_least)
        return max(
            scale for scale in _SCALES if scale == 1 or (self.width >= scale * width and self.height >= scale * height)
        )

    def decode(self, at_least: tuple[int, int] | None = None) -> Image.Image:
        """Return the image as RGB, with its orientation applied; transparency is composited on white.

        Args:
            at_least: required width and height; a JPEG is then decoded at a half, a quarter or an eighth.

        Raises:
            InputError: it cannot be decoded, or its value range is unknown.
        """
        with _explained(self.name), self._opener() as image:
            scale = self._scale(at_least)
            if scale > 1:
                image.draft(None, (-(-image.width // scale), -(-image.height // scale)))
            return _as_rgb(image, self.name)

    def limited_to(self, max_pixels: int | None) -> OpenImage:
        """Return the image itself: it has pixels of its own. The counterpart of `OpenPage.limited_to`."""
        return self

    def check(self) -> None:
        """Verify with little memory that the image can be decoded: whole, scaled down, or by its checksums.

        Raises:
            InputError: it cannot.
        """
        with _explained(self.name), self._opener() as image:
            if image.format == "PNG" and image.width * image.height > _CHECKED_PIXELS:
                image.verify()
                return
            if image.format in ("JPEG", "MPO"):
                image.draft(None, (image.width // 8, image.height // 8))
            if image.width * image.height <= _CHECKED_PIXELS:
                image.load()


def open_image(source: ImageSource, position: int | None = None, *, fetch: bool = False) -> OpenImage:
    """Read the header of an image.

    Args:
        source: the image.
        position: its index among the images of a call, from 1, for messages.
        fetch: fetch `http(s):` URLs (at most 30 s and 200 MB).

    Raises:
        InputError: missing, empty, damaged, of an unknown format, without pixels, or not an image.
    """
    if isinstance(source, OpenImage):
        return source
    name = _name(source, position)
    opener = _opener(source, name, fetch)
    with _explained(name), opener() as image:
        if not (image.width and image.height):
            raise InputError(f"{name} has no pixels ({image.width} x {image.height})")
        if image.format in _VECTOR_FORMATS:
            raise InputError(f"{name} is a vector drawing ({image.format}), not a pixel image; convert it to PNG")
        _require_range(image, name)
        # If a PNG does not declare EXIF early, Pillow would decode all of it to find out.
        is_told = image.format != "PNG" or "exif" in image.info
        orientation = image.getexif().get(_ORIENTATION, 1) if is_told else 1
        width, height = image.size
        if orientation in _TURNED:
            width, height = height, width
        progressive = bool(image.info.get("progressive"))
        return OpenImage(name, width, height, image.mode, image.format, orientation not in (0, 1), progressive, opener)


def load_image(source: ImageSource) -> Image.Image:
    """Return an image as RGB; see `open_image` and `OpenImage.decode`."""
    return open_image(source).decode()


def listed(images: Any) -> list[Any]:
    """Return images as a list; a single image becomes a list of one."""
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return list(images)
    if isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image | np.ndarray | torch.Tensor):
        return [images]
    if hasattr(images, "read") or not isinstance(images, Sequence):
        return [images]
    return list(images)


# --- image sources ----------------------------------------------------------------------------------------------------


def _name(source: Any, position: int | None) -> str:
    if isinstance(source, str | os.PathLike) and not (isinstance(source, str) and source.lower().startswith("data:")):
        text = os.fsdecode(source)
        return text if len(text) <= _MOST_NAME else f"{text[: _MOST_NAME - 3]}..."
    return "the image" if position is None else f"image {position}"


def _opener(source: Any, name: str, fetch: bool) -> Callable[[], contextlib.AbstractContextManager[Image.Image]]:
    """Return a function that opens an image, any number of times."""
    if isinstance(source, Image.Image):
        return lambda: contextlib.nullcontext(source)
    if isinstance(source, np.ndarray | torch.Tensor):
        image = _of_array(source, name)
        return lambda: contextlib.nullcontext(image)
    if isinstance(source, str) and _ADDRESS.match(source) and not Path(source).exists():
        source = _of_address(source, name, fetch)
    if isinstance(source, str | os.PathLike):
        path = Path(os.fsdecode(source))
        if "\0" in str(path):
            raise InputError(f"{name!r}: no such image; check the path")
        return lambda: _opened(path)
    if hasattr(source, "read"):
        with _explained(name):
            if hasattr(source, "seek"):
                source.seek(0)
            source = source.read()
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        if not data:
            raise InputError(f"{name} is empty; copy or export it again")
        return lambda: _opened(io.BytesIO(data))
    shown = repr(source)
    shown = shown if len(shown) <= _MOST_NAME else f"{shown[: _MOST_NAME - 3]}..."
    raise InputError(
        f"{name} is a {type(source).__name__} ({shown}); pass a path, bytes, a file, a Pillow image or an array"
    )


def _opened(file: Path | io.BytesIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decode memory is accounted for
        return Image.open(file)


def _of_address(address: str, name: str, fetch: bool) -> Any:
    """Return the path that a `file:` URL names, or the bytes behind any other URL."""
    kind = address.split(":", 1)[0].lower()
    if kind == "file":
        parts = urllib.parse.urlsplit(address)
        if parts.netloc not in ("", "localhost"):
            raise InputError(f"{name}: the file is on another machine ({parts.netloc}); copy it here")
        return urllib.request.url2pathname(parts.path)
    if kind == "data":
        found = _DATA.match(address)
        if found is None:
            raise InputError(f"{name}: a data: URL without a comma; put one before the bytes")
        text = urllib.parse.unquote_to_bytes(found[2])
        if found[1] is None:
            return text
        text = re.sub(rb"\s+", b"", text).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        try:
            return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"{name}: its data: URL is not base64 ({error})") from None
    if not fetch:
        raise InputError(
            f"{name} is a network URL, which is fetched only with --fetch or fetch=True; enable it, or download the "
            "image first"
        )
    return _fetched(address, name)


class Fetched(bytes):
    """The bytes behind a URL.

    Attributes:
        address: the URL, whose file name labels cached results.
    """

    address: str


def fetched(source: str) -> str | bytes:
    """Return the bytes behind an `http(s):` URL (at most 30 s and 200 MB), and any other source unchanged.

    Raises:
        InputError: the URL cannot be fetched.
    """
    is_address = source.lower().startswith(("http://", "https://")) and not Path(source).exists()
    if not is_address:
        return source
    data = Fetched(_fetched(source, source[:_MOST_NAME]))
    data.address = source
    return data


def _fetched(address: str, name: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=_FETCH_TIMEOUT_S) as answer:
            data: bytes = answer.read(_MOST_FETCHED_BYTES + 1)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise InputError(f"{name} cannot be fetched ({error}); download it and pass its path") from error
    if len(data) > _MOST_FETCHED_BYTES:
        raise InputError(f"{name} has more than {_MOST_FETCHED_BYTES >> 20} MB; download it and scale it down")
    return data


def _of_array(source: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    first = isinstance(source, torch.Tensor)  # if both ends could be channels
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    shape = f"{source.dtype} of shape {list(source.shape)}"
    if source.ndim not in (2, 3):
        raise InputError(f"{name} is an array, {shape}; pass one of two or three dimensions")
    if 0 in source.shape:
        raise InputError(f"{name} has no pixels ({shape})")
    if source.ndim == 3:
        at_start, at_end = source.shape[0] in (1, 3, 4), source.shape[2] in (1, 3, 4)
        if not (at_start or at_end):
            raise InputError(f"{name} is an array, {shape}; pass one with 1, 3 or 4 channels first or last")
        if at_start and (first or not at_end):
            source = source.transpose(1, 2, 0)
        source = source[..., 0] if source.shape[2] == 1 else source
    if source.dtype == np.uint16:
        source = source >> 8
    elif source.dtype == np.bool_:
        source = source * np.uint8(255)
    elif source.dtype.kind == "f":
        low, high = float(source.min()), float(source.max())
        if not (low >= 0 and high <= 1):  # also true for NaN
            raise InputError(
                f"{name} is an array, {shape}, with values from {low:g} to {high:g}; scale floats to 0 to 1"
            )
        source = np.round(source * np.float32(255))
    elif source.dtype != np.uint8:
        raise InputError(f"{name} is an array, {shape}, of unknown value range; pass uint8, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(source.astype(np.uint8)))


# --- decoding ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Translate errors of image decoders into `InputError`s."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: no such image; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a directory; pass an image in it") from None
    except UnidentifiedImageError:
        if os.path.isfile(name) and os.path.getsize(name) == 0:
            raise InputError(f"{name} is empty; copy or export it again") from None
        if is_document(name):
            raise InputError(f"{name} is a PDF document; pass its pages, document_pages({name!r})") from None
        raise InputError(f"{name} is not an image that can be read; convert it to PNG or JPEG") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large to decode safely ({error}); scale it down first") from error
    except OSError as error:
        if error.errno is not None:
            raise InputError(f"{name}: cannot be read: {error.strerror}") from error
        raise InputError(f"{name} is damaged or truncated ({error}); copy or export it again") from error
    # Decoders raise almost anything (struct.error, EOFError, SyntaxError, ...) on a damaged file.
    except Exception as error:
        if "closed" in str(error):
            raise InputError(f"{name} was closed; pass it open, or pass its path") from error
        raise InputError(f"{name} is damaged or truncated ({error}); copy or export it again") from error


def _require_range(image: Image.Image, name: str) -> None:
    """Reject values whose range the format does not declare."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise InputError(f"{name} holds {kind} (mode {image.mode}) of unknown range; convert it to 8 or 16 bits")


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    _require_range(image, name)
    if image.getexif().get(_ORIENTATION, 1) not in (0, 1):
        image = ImageOps.exif_transpose(image)
    else:
        image.load()
    if image.mode.startswith("I"):
        # 16-bit gray: Pillow's own conversion clips it to white.
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        shown = Image.new("RGB", image.size, "white")
        shown.paste(image, mask=image.getchannel("A"))
        return shown
    return image if image.mode == "RGB" else image.convert("RGB")  # Pillow would copy an RGB image
