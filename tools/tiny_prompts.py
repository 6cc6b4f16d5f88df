"""Tokenizer, prompts and batches of the tiny checkpoint.

A prompt is what Qwen3-VL's own chat template gives for one image and one question, without a system turn::

    <|im_start|>user
    <|vision_start|><|image_pad|> x 16 <|vision_end|>QUESTION<|im_end|>
    <|im_start|>assistant
    ANSWER<|im_end|>
"""

from __future__ import annotations

import re

import numpy as np
import torch
from tiny_data import DIGITS_QUESTION, FASHION_QUESTION, IMAGE_SIDE, TinyData, Turn
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PATCH = 8
MERGE = 2
TEMPORAL_PATCH = 2
GRID = IMAGE_SIDE // PATCH
"""Patches along one side of an image."""
IMAGE_TOKENS = (GRID // MERGE) ** 2

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_WORD = r"\n|\d|[a-zA-Z][a-zA-Z\-]*|[^\w\s]"
_IGNORED = -100
# Lengths are rounded up so that few distinct shapes reach the matrix kernels.
_LENGTH_STEP = 16


def build_tokenizer(data: TinyData) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of the training questions and answers.

    Under a hundred words instead of 151,936 keep nearly all of the checkpoint's parameters in its layers.
    """
    texts = [FASHION_QUESTION, DIGITS_QUESTION]
    for (_, split), part in data.images.items():
        if split == "train":
            texts += [text for turns in part.turns.values() for turn in turns for text in turn]
    words = {"user", "assistant", "system", "\n", *"0123456789", *"?.,!"}
    for text in set(texts):
        words.update(re.findall(_WORD, text))
    vocabulary = {word: index for index, word in enumerate([*_SPECIAL, "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), "isolated"),
            pre_tokenizers.Split(Regex(r" +"), "removed"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(_SPECIAL[1:]),
        clean_up_tokenization_spaces=False,
    )


class Prompts:
    """Turns questions, answers and images into model inputs."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.image_id, self.video_id, self.vision_start_id, self.vision_end_id, self.pad_id = (
            tokenizer.convert_tokens_to_ids(token)
            for token in (
                "<|image_pad|>",
                "<|video_pad|>",
                "<|vision_start|>",
                "<|vision_end|>",
                "<|endoftext|>",
            )
        )
        self.eos_id = tokenizer.eos_token_id
        self._cache: dict[str, list[int]] = {}
        self._head = self.encode("<|im_start|>user\n<|vision_start|>")
        self._head = [*self._head, *[self.image_id] * IMAGE_TOKENS, self.vision_end_id]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; the same few hundred texts come back thousands of times, so they are kept."""
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]

    def prompt(self, question: str) -> list[int]:
        """Token ids of the prompt of one question about one image."""
        return self._head + self._question(question)

    def conversation(self, turns: list[Turn]) -> tuple[list[int], list[int]]:
        """Token ids and training labels of several questions about one image; only answers are labelled."""
        ids, labels = list(self._head), [_IGNORED] * len(self._head)
        for number, (question, answer) in enumerate(turns):
            before = (self.encode("<|im_start|>user\n") if number else []) + self._question(question)
            target = self.encode(f"{answer}<|im_end|>")
            after = self.encode("\n")
            ids += before + target + after
            labels += [_IGNORED] * len(before) + target + [_IGNORED] * len(after)
        return ids, labels

    def training_batch(
        self, samples: list[tuple[np.ndarray, list[Turn]]]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Right-padded model inputs and labels of a list of (image, turns)."""
        rows = [self.conversation(turns) for _, turns in samples]
        length = -(-max(len(ids) for ids, _ in rows) // _LENGTH_STEP) * _LENGTH_STEP
        input_ids = torch.full((len(rows), length), self.pad_id)
        labels = torch.full((len(rows), length), _IGNORED)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        for row, (ids, targets) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(targets)] = torch.tensor(targets)
            attention_mask[row, : len(ids)] = 1
        inputs = self._inputs(input_ids, attention_mask, np.stack([image for image, _ in samples]))
        inputs["position_ids"] = self._positions(length)[:, None].expand(3, len(rows), -1)
        return inputs, labels

    def generation_batch(self, images: np.ndarray, questions: list[str]) -> dict[str, torch.Tensor]:
        """Left-padded inputs of `generate` for one question an image."""
        rows = [self.prompt(question) for question in questions]
        length = max(map(len, rows))
        input_ids = torch.tensor([[self.pad_id] * (length - len(row)) + row for row in rows])
        attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return self._inputs(input_ids, attention_mask, images)

    def _question(self, question: str) -> list[int]:
        return self.encode(f"{question}<|im_end|>\n<|im_start|>assistant\n")

    def _inputs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, images: np.ndarray
    ) -> dict[str, torch.Tensor]:
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_values": to_patches(images),
            "image_grid_thw": torch.tensor([[1, GRID, GRID]] * len(images)),
            "mm_token_type_ids": (input_ids == self.image_id).int(),
        }

    def _positions(self, length: int) -> torch.Tensor:
        """M-RoPE positions, `(3, length)`; the image stands at one place in every row, so all share them."""
        start = self._head.index(self.image_id)
        end = start + IMAGE_TOKENS
        side = GRID // MERGE
        cell = torch.arange(IMAGE_TOKENS)
        positions = torch.zeros(3, length, dtype=torch.long)
        positions[:, :start] = torch.arange(start)
        positions[0, start:end] = start
        positions[1, start:end] = start + cell // side
        positions[2, start:end] = start + cell % side
        positions[:, end:] = torch.arange(length - end) + start + side
        return positions


def to_patches(images: np.ndarray) -> torch.Tensor:
    """Flatten images into patches in the order of `Qwen2VLImageProcessor`.

    Args:
        images: uint8, `(B, 64, 64, 3)`.

    Returns:
        float32 in [-1, 1], `(B * 64, 3 * 2 * 8 * 8)`; a still image fills both frames of a temporal patch.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    batch, side = len(pixels), GRID // MERGE
    pixels = pixels.view(batch, 3, side, MERGE, PATCH, side, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    pixels = pixels.reshape(batch * GRID * GRID, 3, 1, PATCH, PATCH).expand(-1, -1, TEMPORAL_PATCH, -1, -1)
    return pixels.reshape(batch * GRID * GRID, -1).contiguous()
