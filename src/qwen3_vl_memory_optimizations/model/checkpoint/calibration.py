"""Collect inputs of a model's layers for a few texts and images, to judge codecs by their effect on the outputs."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError, ConfigurationError
from ...paging import ManagedTensor
from ..inputs.processor import load_processor, load_tokenizer

_ASSETS = Path(__file__).resolve().parents[2] / "assets"
_IMAGES = ("demo/digits_0.png", "demo/fashion_2.png", "demo/vqa_1.png")
_TEXT = "text/pride_and_prejudice.txt"
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_MOST_IMAGES = 4
_MOST_PIXELS = 512 * 512
_TEXT_CHARACTERS = 1600
"""About 400 tokens."""
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
    images, text = _shipped() if samples is None else _samples(samples)
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


def _shipped() -> tuple[list[Path], str]:
    # The end of the text, because accuracy is measured on its beginning.
    return [_ASSETS / name for name in _IMAGES], (_ASSETS / _TEXT).read_text(encoding="utf-8")[-_TEXT_CHARACTERS:]


def _samples(directory: Path) -> tuple[list[Path], str]:
    if not directory.is_dir():
        raise ConfigurationError(f"calibration: {directory} is not a directory")
    files = sorted(path for path in directory.iterdir() if path.is_file())
    images = [path for path in files if path.suffix.lower() in _IMAGE_SUFFIXES][:_MOST_IMAGES]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files if path.suffix.lower() == ".txt"]
    share = _TEXT_CHARACTERS // max(1, len(texts))
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
