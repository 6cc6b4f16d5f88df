"""Remember the file names and the prompt that input tensors were made from, to label cached results (`name_inputs`).

The names are attributes of the tensors: they reach `generate` without an argument of their own. Tensors that a caller
derives from them have none.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch

from .documents import DocumentPage

_ATTRIBUTE = "_qwen3vl_mem_names"
MOST_TEXT = 60
"""Characters of a prompt that are kept in a label."""
_MOST_NAME = 80


def file_name(source: Any) -> str:
    """Return the file name of an image or video given as a path or a URL, or of a page; empty for other forms."""
    if isinstance(source, DocumentPage):
        return f"{file_name(source.name)} page {source.number}"
    source = getattr(source, "address", source)  # of bytes that were fetched
    if not isinstance(source, str | os.PathLike):
        return ""
    text = os.fsdecode(source)
    if text.lower().startswith("data:"):
        return ""
    if text.lower().startswith(("http:", "https:", "file:")):
        text = urllib.parse.unquote(urllib.parse.urlsplit(text).path)
    return PurePath(text).name[:_MOST_NAME]


def name_inputs(
    tensors: Mapping[str, torch.Tensor], *, images: Sequence[str] = (), video: str = "", prompt: str = ""
) -> None:
    """Attach names to the inputs of a model.

    Args:
        tensors: the arguments of `generate`.
        images: name of each image; `video`: of the video. Empty names are unknown.
        prompt: the question.
    """
    text = " ".join(prompt.split())
    shown = text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 3]}..."
    for key, names in (("pixel_values", list(images)), ("pixel_values_videos", [video]), ("input_ids", [shown])):
        if key in tensors and any(names):
            setattr(tensors[key], _ATTRIBUTE, names)


def names_of(tensor: Any) -> list[str]:
    """Return the names of a tensor; empty if it has none."""
    found = getattr(tensor, _ATTRIBUTE, None)
    return list(found) if isinstance(found, list) else []


def label_of(arguments: Mapping[str, Any]) -> str | None:
    """Return one line that tells a prompt from others: its files and the beginning of its text; `None` if unknown."""
    ids = arguments.get("input_ids", arguments.get("inputs"))
    files = [name for key in ("pixel_values", "pixel_values_videos") for name in names_of(arguments.get(key)) if name]
    text = "".join(names_of(ids))
    return ": ".join(part for part in (", ".join(files), text) if part) or None
