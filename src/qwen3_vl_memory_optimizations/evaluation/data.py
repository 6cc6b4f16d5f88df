"""What accuracy is measured on: text in windows, and images with questions whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigurationError, InputError
from .metrics import IGNORED_LABEL

if TYPE_CHECKING:
    from ..model.inputs.processor import Processor

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED_TEXT = _ASSETS / "text" / "pride_and_prejudice.txt"
"""The first chapters of a novel in the public domain: about 29,000 tokens of SmolLM2."""

WINDOW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class ImageQuestion:
    """An image file, a question about it, and the answer."""

    image: Path
    question: str
    answer: str


def shipped_questions() -> list[ImageQuestion]:
    """Return the questions that are part of the package."""
    directory = _ASSETS / "demo"
    rows = json.loads((directory / "questions.json").read_text(encoding="utf-8"))
    return [ImageQuestion(directory / row["image"], row["question"], row["expected"]) for row in rows]


def easy_vqa_questions(n_images: int) -> list[ImageQuestion]:
    """Return one question on each of the first `n_images` images of the test split of easy-VQA (1,000 images).

    The questions of an image take turns, so that all sorts of them are asked.

    Raises:
        ConfigurationError: easy-VQA is not installed, or has fewer images.
    """
    try:
        import easy_vqa
    except ImportError:
        raise ConfigurationError(
            f"{n_images} images need easy-VQA, which is not installed: pip install easy-vqa (or the extra 'eval'); "
            f"{len(shipped_questions())} images come with this package"
        ) from None
    paths = {int(number): Path(path) for number, path in easy_vqa.get_test_image_paths().items()}
    if n_images > len(paths):
        raise ConfigurationError(f"easy-VQA has {len(paths)} images that are not for training, not {n_images}")
    by_image: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in zip(*easy_vqa.get_test_questions(), strict=True):
        by_image.setdefault(int(number), []).append((question, answer))
    chosen = []
    for turn, number in enumerate(sorted(by_image)[:n_images]):
        question, answer = by_image[number][turn % len(by_image[number])]
        chosen.append(ImageQuestion(paths[number], question, answer))
    return chosen


def questions(n_images: int) -> list[ImageQuestion]:
    """Return `n_images` images with a question each: those of the package where they are enough, else easy-VQA's.

    Raises:
        ConfigurationError: there are not so many, or easy-VQA is needed and not installed.
    """
    shipped = shipped_questions()
    return shipped[:n_images] if n_images <= len(shipped) else easy_vqa_questions(n_images)


def text_windows(
    tokenizer: Any, text: str, *, window_tokens: int = WINDOW_TOKENS, max_tokens: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """Return a text as batches of one window each, `input_ids` (1, tokens); windows do not overlap.

    Args:
        tokenizer: of the model.
        text: the text.
        window_tokens: tokens of a window; each but its first is predicted from those before it.
        max_tokens: use the beginning of the text only.

    Raises:
        InputError: the text has fewer than two tokens.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)[:max_tokens]
    windows = [{"input_ids": window[None]} for window in ids.split(window_tokens) if len(window) > 1]
    if not windows:
        raise InputError("the text has fewer than two tokens: there is nothing to predict")
    return windows


@dataclass(frozen=True, slots=True)
class QuestionBatches:
    """Image questions as batches of one; images are opened as they are read. May be read several times.

    A batch holds the arguments of the model, with the answer at the end of `input_ids`, and `labels`, which count the
    tokens of the answer only. They are all predicted right exactly where greedy decoding gives the answer.
    """

    processor: Processor
    questions: Sequence[ImageQuestion]

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for each in self.questions:
            batch = self.processor.prepare(each.question, [each.image])
            answer = torch.tensor([self.processor.tokenizer(each.answer, add_special_tokens=False)["input_ids"]])
            n_prompt = batch["input_ids"].shape[1]
            batch["input_ids"] = torch.cat([batch["input_ids"], answer], 1)
            for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
                batch[name] = torch.cat([batch[name], torch.full_like(answer, value)], 1)
            batch["labels"] = batch["input_ids"].clone()
            batch["labels"][:, :n_prompt] = IGNORED_LABEL
            yield batch
