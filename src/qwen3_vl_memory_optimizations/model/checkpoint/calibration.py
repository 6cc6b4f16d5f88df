"""Collect inputs of a model's layers for a few texts and images, to judge codecs by their effect on the outputs."""

from __future__ import annotations

import hashlib
import textwrap
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import nn

from ...errors import CheckpointError, ConfigurationError
from ...paging import ManagedTensor
from ..inputs.processor import load_processor, load_tokenizer

_ASSETS = Path(__file__).resolve().parents[2] / "assets"
_IMAGES = ("demo/digits_0.png", "demo/fashion_2.png", "demo/vqa_1.png")
_TEXT = "text/pride_and_prejudice.txt"
_MIXED_TEXT = "text/mixed.txt"
"""Portuguese, tables and code."""
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_MOST_IMAGES = 4
_MOST_PIXELS = 512 * 512
_TEXT_CHARACTERS = 1600
"""About 400 tokens."""
_NOVEL_CHARACTERS = 24_000
_CHARACTERS_PER_TOKEN = 8
"""At most, about: text beyond is not even made into tokens."""
WINDOW_TOKENS = 512
_MOST_IMAGE_TOKENS = 256
_PICTURE_PIXELS, _LINE_CHARACTERS = 448, 48
INPUT_ROWS = 32
"""Rows kept per layer: with 256 outputs each, they determine an error to about 2 %."""


def calibration_batch(directory: Path, samples: Path | None = None) -> tuple[dict[str, torch.Tensor], str]:
    """Return the arguments of one forward over a few images and a text, and a description of them.

    Args:
        directory: a checkpoint, for its tokenizer and, if present, its image processor.
        samples: a directory with images and `.txt` files to use instead of the built-in ones.

    Raises:
        CheckpointError: the checkpoint has no tokenizer.
        ConfigurationError: `samples` holds nothing usable.
    """
    images, text = _shipped(_TEXT_CHARACTERS) if samples is None else _samples(samples, _TEXT_CHARACTERS)
    try:
        processor = load_processor(directory)
    except CheckpointError:
        if not text:
            raise ConfigurationError(
                f"{samples}: the model takes text only, and there is no .txt file; add one"
            ) from None
        ids = load_tokenizer(directory)(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return {"input_ids": ids}, f"{ids.shape[1]} tokens of text"
    batch = processor.prepare(text or "What is shown?", images, max_pixels=_MOST_PIXELS)
    return batch, f"{len(images)} images and text, {batch['input_ids'].shape[1]} tokens together"


def calibration_windows(directory: Path, samples: Path | None, most_tokens: int) -> tuple[dict[str, torch.Tensor], str]:
    """Return the arguments of one forward over several sequences of the same length, and a description of them.

    Each has `WINDOW_TOKENS` tokens: one of the images and then text, or text alone. Longer images make all longer. If
    the samples have too little text, the shipped one follows.

    Args:
        directory: a checkpoint, for its tokenizer and, if present, its image processor.
        samples: a directory with images and `.txt` files to use instead of the shipped ones.
        most_tokens: of all sequences together; there is at least one.

    Raises:
        CheckpointError: the checkpoint has no tokenizer.
        ConfigurationError: `samples` holds nothing usable.
    """
    characters = most_tokens * _CHARACTERS_PER_TOKEN
    pictures, novel = _shipped(_NOVEL_CHARACTERS)
    shipped = shipped_text()
    images: list[Any] = [*(_enlarged(path) for path in pictures), *_pages(novel, len(pictures))]
    text = shipped
    if samples is not None:
        images, given = _samples(samples, characters)
        text = f"{given}\n\n{shipped}" if given else shipped
    shown: list[dict[str, torch.Tensor]] = []
    try:
        processor = load_processor(directory)
    except CheckpointError:
        tokenizer = load_tokenizer(directory)
    else:
        tokenizer = processor.tokenizer
        settings = processor.image_processor
        most_pixels = _MOST_IMAGE_TOKENS * (settings.patch_size * settings.merge_size) ** 2
        shown = [processor.prepare("What is shown?", [image], max_pixels=most_pixels) for image in images]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    length = max([WINDOW_TOKENS, *(each["input_ids"].shape[1] for each in shown)])
    shown = shown[: max(1, most_tokens // length // 2)]
    windows: list[torch.Tensor] = []
    start = 0
    while len(windows) < max(1, most_tokens // length):
        first = shown[len(windows)]["input_ids"][0] if len(windows) < len(shown) else ids[:0]
        rest = ids[start : start + length - len(first)]
        start += len(rest)
        if len(first) + len(rest) < length:
            break
        windows.append(torch.cat([first, rest]))
    batch = {"input_ids": torch.stack(windows)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    shown = shown[: len(windows)]
    if shown:
        kinds = torch.zeros_like(batch["input_ids"])
        for row, each in zip(kinds, shown, strict=False):
            row[: each["input_ids"].shape[1]] = each["mm_token_type_ids"][0]
        batch |= {"mm_token_type_ids": kinds}
        batch |= {name: torch.cat([each[name] for each in shown]) for name in ("pixel_values", "image_grid_thw")}
    with_images = f"{len(shown)} images and text, " if shown else ""
    return batch, f"{with_images}{batch['input_ids'].numel()} tokens{' together' if shown else ' of text'}"


def _enlarged(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB").resize((_PICTURE_PIXELS, _PICTURE_PIXELS), Image.Resampling.BICUBIC)


def _pages(text: str, n: int) -> list[Image.Image]:
    """Return pictures of text, as of documents."""
    lines = textwrap.wrap(text[: n * _LINE_CHARACTERS * 40], _LINE_CHARACTERS)
    on_page = len(lines) // n
    pages = []
    for number in range(n):
        page = Image.new("RGB", (_PICTURE_PIXELS, _PICTURE_PIXELS), "white")
        shown = "\n".join(lines[number * on_page : (number + 1) * on_page])
        ImageDraw.Draw(page).multiline_text((16, 16), shown, fill="black")
        pages.append(page)
    return pages


def shipped_text() -> str:
    """Return the text that windows come from without samples."""
    return (_ASSETS / _MIXED_TEXT).read_text(encoding="utf-8") + _shipped(_NOVEL_CHARACTERS)[1]


def digest(directory: Path) -> str:
    """Return a digest of the files that `calibration_windows` may use of a directory."""
    content = hashlib.sha256()
    for path in sorted(each for each in directory.iterdir() if each.suffix.lower() in (".txt", *_IMAGE_SUFFIXES)):
        content.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        content.update(path.read_bytes())
    return content.hexdigest()[:12]


def _shipped(characters: int) -> tuple[list[Path], str]:
    # The end of the text, because accuracy is measured on its beginning.
    return [_ASSETS / name for name in _IMAGES], (_ASSETS / _TEXT).read_text(encoding="utf-8")[-characters:]


def _samples(directory: Path, characters: int) -> tuple[list[Path], str]:
    if not directory.is_dir():
        raise ConfigurationError(f"calibration: {directory} is not a directory")
    files = sorted(path for path in directory.iterdir() if path.is_file())
    images = [path for path in files if path.suffix.lower() in _IMAGE_SUFFIXES][:_MOST_IMAGES]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files if path.suffix.lower() == ".txt"]
    share = characters // max(1, len(texts))
    if not images and not any(texts):
        raise ConfigurationError(f"calibration: {directory} has neither images nor .txt files; add some")
    return images, "\n".join(text[:share] for text in texts)


def most_input_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the most bytes that `collect_inputs` keeps."""
    widths = sum(module.in_features for module in _layers(model).values())
    return widths * INPUT_ROWS * dtype.itemsize


def collect_inputs(model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Run one forward; return the name of each linear layer's weight -> input rows `[<= INPUT_ROWS, columns]`.

    The first of several tokens is skipped: in trained models its activations are unlike all others.
    """
    inputs: dict[str, torch.Tensor] = {}
    last: tuple[torch.Tensor, torch.Tensor] | None = None

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal last
            given = args[0]
            if last is None or last[0] is not given:  # q, k and v share one input
                last = (given, _some_rows(given))
            inputs[name] = last[1]

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in _layers(model).items()]
    # Compute few logits if the model supports it: they take more memory than all inputs.
    options = {"logits_to_keep": INPUT_ROWS} if "logits_to_keep" in signature(model.forward).parameters else {}
    try:
        with torch.no_grad():
            model(**batch, use_cache=False, **options)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers with managed weights, by the first name of the weight (tied ones have two)."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names.setdefault(id(parameter), name)
    return {
        names[id(module.weight)]: module
        for module in model.modules()
        if isinstance(module, nn.Linear) and isinstance(module.weight, ManagedTensor)
    }


def _some_rows(given: torch.Tensor) -> torch.Tensor:
    rows = given.detach().reshape(-1, given.shape[-1])
    first = 1 if len(rows) > 1 else 0
    count = min(INPUT_ROWS, len(rows) - first)
    return rows[torch.linspace(first, len(rows) - 1, count, dtype=torch.float64).round().long()].clone()
