"""Pages of PDF documents as pictures, rendered one at a time at the size that the model uses (extra `documents`)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from ...errors import ConfigurationError, InputError

DOTS_PER_INCH = 150
"""Resolution of a page if no number of pixels is set."""
_MOST_DOTS_PER_INCH = 300
_POINTS_PER_INCH = 72
_RENDERED_BYTES = 7
"""Per pixel: the bitmap of PDFium, and its copy in Pillow's four bytes."""
_EMBEDDED_BYTES = 8
"""Per pixel of the pictures on a page, which PDFium decodes: in four bytes, twice."""
_MAGIC = b"%PDF-"
_HEADER_BYTES = 1024
_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+)?)?")
_PDFIUM = threading.RLock()  # PDFium is not thread-safe


@dataclasses.dataclass(frozen=True, slots=True)
class DocumentPage:
    """A page of a PDF document; an image source.

    Attributes:
        name: of the document, for messages.
        number: from 1.
    """

    name: str
    number: int
    _source: str | bytes = dataclasses.field(repr=False)

    def open(self, max_pixels: int | None = None) -> OpenPage:
        """Read the size of the page.

        Args:
            max_pixels: number of pixels to render, at most at 300 dots per inch. Default: 150 dots per inch.

        Raises:
            InputError: it cannot be read.
        """
        with _opened(self._source, self.name) as document:
            page = document[self.number - 1]
            width, height = page.get_size()
            embedded = _largest_picture(page)
        if not (math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0):
            raise InputError(f"{self.name}, page {self.number}: has no area ({width:g} x {height:g} points)")
        opened = OpenPage(f"{self.name}, page {self.number}", 1, 1, self, (width, height), embedded)
        return opened.limited_to(max_pixels)


@dataclasses.dataclass(frozen=True, slots=True)
class OpenPage:
    """A page whose size is known; the counterpart of `OpenImage`.

    Attributes:
        name: for messages.
        width, height: in pixels, as rendered.
    """

    name: str
    width: int
    height: int
    _page: DocumentPage
    _points: tuple[float, float]
    _embedded_pixels: int

    def limited_to(self, max_pixels: int | None) -> OpenPage:
        """Return the page at another size; see `DocumentPage.open`."""
        width, height = self._points
        scale = DOTS_PER_INCH / _POINTS_PER_INCH
        if max_pixels is not None:
            scale = min(_MOST_DOTS_PER_INCH / _POINTS_PER_INCH, math.sqrt(max_pixels / (width * height)))
        return dataclasses.replace(self, width=max(1, round(width * scale)), height=max(1, round(height * scale)))

    def at_most(self, pixels: int) -> OpenPage:
        """Return the page with about this many pixels, if it has more."""
        shrink = min(1.0, math.sqrt(pixels / (self.width * self.height)))
        width, height = max(1, round(self.width * shrink)), max(1, round(self.height * shrink))
        return dataclasses.replace(self, width=width, height=height)

    def decode_bytes(self, at_least: tuple[int, int] | None = None) -> int:
        """Return the approximate peak memory of rendering, in bytes; see `decode`."""
        width, height = self._size(at_least)
        return width * height * _RENDERED_BYTES + self._embedded_pixels * _EMBEDDED_BYTES

    def decode(self, at_least: tuple[int, int] | None = None) -> Image.Image:
        """Render the page as RGB on white, with its annotations and filled form fields.

        Args:
            at_least: the smallest width and height of the result; default: `width` and `height`, which are not
                exceeded.

        Raises:
            InputError: it cannot be rendered.
        """
        width, height = self._size(at_least)
        with _opened(self._page._source, self._page.name, forms=True) as document:
            page = document[self._page.number - 1]
            scale = min(width / self._points[0], height / self._points[1])
            image: Image.Image = page.render(scale=scale * (1 - 1e-6), rev_byteorder=True).to_pil()  # it rounds up
            return image if image.mode == "RGB" else image.convert("RGB")

    def check(self) -> None:
        """Do nothing: opening has read the page."""

    def _size(self, at_least: tuple[int, int] | None) -> tuple[int, int]:
        if at_least is None:
            return self.width, self.height
        scale = min(1.0, max(at_least[0] / self.width, at_least[1] / self.height))
        return max(1, round(self.width * scale)), max(1, round(self.height * scale))


def document_pages(source: str | os.PathLike[str] | bytes, pages: str | None = None) -> list[DocumentPage]:
    """Return pages of a PDF document as image sources for `Processor.prepare` and `prepare_within_budget`.

    Args:
        source: a path, or the bytes of the document.
        pages: page numbers and ranges from 1, such as `"1-3,7"` or `"5-"`, in the order wanted. Default: all.

    Raises:
        ConfigurationError: the extra `documents` is not installed.
        InputError: the document is missing, empty, encrypted or damaged, or lacks a page.
    """
    name = "the document" if isinstance(source, bytes) else os.fspath(source)
    given = source if isinstance(source, bytes) else os.fspath(source)
    with _opened(given, name) as document:
        n_pages = len(document)
    if not n_pages:
        raise InputError(f"{name}: has no pages; export it again")
    numbers = range(1, n_pages + 1) if pages is None else parse_pages(pages, n_pages, name)
    return [DocumentPage(name, number, given) for number in numbers]


def parse_pages(pages: str, n_pages: int, name: str = "the document") -> list[int]:
    """Return the page numbers that a text such as `1-3,7` or `5-` names, each once, in its order.

    Args:
        pages: numbers and ranges, from 1.
        n_pages: pages of the document.
        name: of the document, for messages.

    Raises:
        InputError: not page numbers, or the document lacks one.
    """
    found: dict[int, None] = {}
    for part in pages.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise InputError(f"pages: {pages!r} is not a list of page numbers; write it as 1-3,7 or 5-")
        first = int(match[1])
        last = first if "-" not in part else int(match[2]) if match[2] else max(first, n_pages)
        for number in (first, last):
            if not 1 <= number <= n_pages:
                has = "1 page" if n_pages == 1 else f"{n_pages} pages"
                raise InputError(f"{name}: page {number} does not exist; it has {has}")
        if last < first:
            raise InputError(f"pages: {part.strip()!r} runs backwards; write {last}-{first}")
        found.update(dict.fromkeys(range(first, last + 1)))
    return list(found)


def is_document(source: Any) -> bool:
    """Return whether a path or bytes hold a PDF document, by their first bytes."""
    if isinstance(source, bytes | bytearray | memoryview):
        return _MAGIC in bytes(source[:_HEADER_BYTES])
    if not isinstance(source, str | os.PathLike):
        return False
    try:
        with Path(source).open("rb") as file:
            return _MAGIC in file.read(_HEADER_BYTES)
    except (OSError, ValueError):
        return False


def _pdfium() -> ModuleType:
    try:
        import pypdfium2
    except ImportError:
        raise ConfigurationError(
            "PDF documents need pypdfium2; install it: pip install 'qwen3-vl-memory-optimizations[documents]'"
        ) from None
    return pypdfium2


@contextlib.contextmanager
def _opened(source: str | bytes, name: str, *, forms: bool = False) -> Iterator[Any]:
    """Open a document for a short time, so that what PDFium caches of a page goes with it."""
    pdfium = _pdfium()
    if isinstance(source, str):
        if not os.path.isfile(source):
            raise InputError(f"{name}: no such document; check the path")
        if os.path.getsize(source) == 0:
            raise InputError(f"{name} is empty; copy or export it again")
    elif not source:
        raise InputError(f"{name} is empty; copy or export it again")
    with _PDFIUM:
        document = None
        try:
            document = pdfium.PdfDocument(source)
            if forms:
                document.init_forms()
            yield document
        except pdfium.PdfiumError as error:
            if getattr(error, "err_code", None) == pdfium.raw.FPDF_ERR_PASSWORD:
                raise InputError(f"{name} is encrypted; save a copy without password (qpdf --decrypt IN OUT)") from None
            raise InputError(f"{name} is damaged, or not a PDF that can be read ({error}); export it again") from None
        finally:
            if document is not None:
                document.close()


def _largest_picture(page: Any) -> int:
    """Return the pixels of the largest picture on a page."""
    import pypdfium2

    kinds = [pypdfium2.raw.FPDF_PAGEOBJ_IMAGE]
    sizes = [0]
    for picture in page.get_objects(filter=kinds, max_depth=2):
        width, height = picture.get_px_size()
        sizes.append(width * height)
    return max(sizes)
