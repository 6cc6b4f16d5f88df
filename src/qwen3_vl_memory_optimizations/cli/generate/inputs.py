"""Turn what the user names into pictures: files, folders, globs, URLs, and pages of documents."""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.commands import Command

if TYPE_CHECKING:
    from ...model.inputs.documents import DocumentPage
    from ...model.inputs.processor import Processor

MOST_PAGES = 10
"""Pages of one document that are used if `--pages` is not given."""
_IMAGES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".tga", ".ico", ".mpo"),
)
_DOCUMENTS = (".pdf",)
_PICTURE_OPTION = "--image"


class GenerateCommand(Command):
    """Accepts several pictures after one `-i`: the first bare word is the model, every further one a picture."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line."""
        options = [each for each in self.get_params(ctx) if each.param_type_name == "option"]
        valued = {name for each in options if not getattr(each, "is_flag", False) for name in each.opts}
        result: list[str] = super().parse_args(ctx, pictures_as_options(args, valued))
        return result


def pictures_as_options(args: Sequence[str], valued: Collection[str]) -> list[str]:
    """Return a command line with `--image` before each picture that stands alone, in their order.

    Args:
        args: of the command.
        valued: the names of options that take a value.
    """
    found: list[str] = []
    model: list[str] = []
    rest, is_option = iter(args), True
    for word in rest:
        if is_option and word == "--":
            is_option = False
        elif is_option and word.startswith("-") and word != "-":
            found.append(word)
            if word in valued:
                found += [value for value in (next(rest, None),) if value is not None]
        elif not model:
            model = ["--", word]
        else:
            found += [_PICTURE_OPTION, word]
    return found + model


def is_picture_file(word: str) -> bool:
    """Return whether a word names an existing image or document."""
    return Path(word).suffix.lower() in _IMAGES + _DOCUMENTS and Path(word).is_file()


@dataclasses.dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures of a run.

    Attributes:
        sources: for `Processor.prepare`, in order.
        notes: what was found in folders, globs and documents.
    """

    sources: list[Any]
    notes: list[str]


def collect(
    words: Iterable[str], *, pages: str | None, fetch: bool, processor: Processor, max_pixels: int | None
) -> Pictures:
    """Return the pictures that words name.

    Args:
        words: paths, folders, globs, and `http(s):`, `data:` and `file:` URLs.
        pages: pages of each document, such as `1-3,7`; default: the first `MOST_PAGES`.
        fetch: download `http(s):` URLs.
        processor: counts the tokens of a page.
        max_pixels: per page.

    Raises:
        InputError: a picture, folder or page does not exist.
        ConfigurationError: the extra `documents` is not installed.
    """
    from ...errors import InputError
    from ...model.inputs.documents import document_pages, is_document
    from ...model.inputs.images import fetched

    sources: list[Any] = []
    notes: list[str] = []
    n_documents = 0
    for word in (each for given in words for each in _expanded(given, notes)):
        source = fetched(word) if fetch else word
        if not is_document(source):
            sources.append(source)
            continue
        n_documents += 1
        found = document_pages(source, pages)
        if pages is None and len(found) > MOST_PAGES:
            tokens = _page_tokens(processor, found[0], max_pixels)
            notes.append(
                f"{word}: {len(found)} pages; the first {MOST_PAGES} are used, about {tokens:,} tokens each; choose "
                f"others with --pages {MOST_PAGES + 1}-{min(2 * MOST_PAGES, len(found))}"
            )
            found = found[:MOST_PAGES]
        sources += found
    if pages is not None and not n_documents:
        raise InputError(f"--pages {pages}: none of the pictures is a PDF document; name one with -i")
    return Pictures(sources, notes)


def _page_tokens(processor: Processor, page: DocumentPage, max_pixels: int | None) -> int:
    (opened,) = processor.open_images([page], max_pixels=max_pixels)
    rows, columns = processor.image_grid(opened.width, opened.height, max_pixels=max_pixels)
    return rows * columns // int(processor.image_processor.merge_size) ** 2


def _expanded(word: str, notes: list[str]) -> list[str]:
    """Return the files that a folder or a glob names; any other word stays.

    Raises:
        InputError: it names none.
    """
    from ...errors import InputError

    path = Path(word)
    if path.is_dir():
        return _of_folder(path, notes)
    if not glob.has_magic(word) or path.exists() or re.match(r"^[a-z]+:", word, re.IGNORECASE):
        return [word]
    matches = sorted(glob.glob(word, recursive=True), key=_natural)
    files = [
        each for match in matches for each in (_of_folder(Path(match), notes) if Path(match).is_dir() else [match])
    ]
    if not files:
        raise InputError(f"{word}: no file matches; check the pattern, and quote it if the shell expands it")
    notes.append(f"{word}: {_counted(files)}")
    return files


def _of_folder(folder: Path, notes: list[str]) -> list[str]:
    """Return the images and documents of a folder in natural order, hidden files left out."""
    from ...errors import InputError

    names = sorted((each.name for each in folder.iterdir() if each.is_file()), key=_natural)
    files = [
        str(folder / name)
        for name in names
        if not name.startswith(".") and Path(name).suffix.lower() in _IMAGES + _DOCUMENTS
    ]
    if not files:
        raise InputError(f"{folder}: no images or PDF documents in this folder; check the path")
    notes.append(f"{folder}: {_counted(files)}")
    return files


def _counted(files: Sequence[str]) -> str:
    documents = sum(Path(each).suffix.lower() in _DOCUMENTS for each in files)
    counts = ((len(files) - documents, "image"), (documents, "PDF document"))
    return " and ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts if count)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts `page 2` before `page 10`."""
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in re.split(r"([0-9]+)", name)]
