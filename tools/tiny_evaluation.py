"""Accuracy of the tiny checkpoint on questions it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tiny_data import TinyData, Turn
from tiny_prompts import Prompts

Item = tuple[np.ndarray, Turn]
"""An image, uint8 `(64, 64, 3)`, with one question and its answer."""

_BATCH = 64
_SEED = 1234
_NEW_TOKENS = {"vqa": 3, "fashion": 3, "digits": 18}
"""Longest answer of a task, with its end token and a little room."""


def evaluate(model, prompts: Prompts, data: TinyData, tasks: Sequence[str], questions: int) -> dict[str, float]:
    """Judge greedy answers on the test splits.

    Args:
        model: the model, on the processor; its training mode is restored.
        prompts: how the model is asked.
        data: the loaded data sets.
        tasks: names out of `tiny_data.TASKS`.
        questions: how many questions a task; a page of digits, which asks for 16 answers, counts as eight.

    Returns:
        Accuracy by task: share of right answers, for `digits` of right digits, and `digits_page_exact`.
    """
    rng = np.random.default_rng(_SEED)
    was_training = model.training
    model.eval()
    scores: dict[str, float] = {}
    for task in tasks:
        scores.update(score(task, model, prompts, test_items(task, data, questions, rng)))
    model.train(was_training)
    return scores


def test_items(task: str, data: TinyData, questions: int, rng: np.random.Generator) -> list[Item]:
    """Draw questions of a test split."""
    if task == "digits":
        return [data.pages["test"].draw(rng) for _ in range(max(_BATCH, questions // 8))]
    part = data.images[task, "test"]
    flat = part.flat()
    rng.shuffle(flat)
    return [(part.images[index], turn) for index, turn in flat[:questions]]


def score(task: str, model, prompts: Prompts, items: list[Item]) -> dict[str, float]:
    """Accuracy of greedy answers to the given items of one task."""
    right = total = exact = 0
    for first in range(0, len(items), _BATCH):
        chunk = items[first : first + _BATCH]
        images = np.stack([image for image, _ in chunk])
        answers = _answers(task, model, prompts, images, [question for _, (question, _) in chunk])
        for (_, (_, expected)), answer in zip(chunk, answers, strict=True):
            wanted = prompts.encode(expected)
            exact += wanted == answer
            if task == "digits":
                # An answer may end early: what is missing counts as wrong.
                right += sum(want == got for want, got in zip(wanted, answer, strict=False))
                total += len(wanted)
            else:
                right += wanted == answer
                total += 1
    scores = {task: round(right / total, 4)}
    if task == "digits":
        scores["digits_page_exact"] = round(exact / len(items), 4)
    return scores


@torch.no_grad()
def _answers(task: str, model, prompts: Prompts, images: np.ndarray, questions: list[str]) -> list[list[int]]:
    inputs = prompts.generation_batch(images, questions)
    output = model.generate(**inputs, max_new_tokens=_NEW_TOKENS[task], do_sample=False, pad_token_id=prompts.pad_id)
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [ids[: ids.index(prompts.eos_id)] if prompts.eos_id in ids else ids for ids in new]
