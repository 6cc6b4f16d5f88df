#!/usr/bin/env python3
"""Choose the demo images that ship with the package and the held-out set its accuracy tests use.

Both come from test splits, by a fixed seed and never by what a model answers; no image is in both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import tiny_data
from PIL import Image
from tiny_data import LabelledImages, MissingDataError, TinyData
from tiny_evaluation import Item

_ROOT = Path(__file__).resolve().parents[1]
_DEMO_DIR = _ROOT / "src/qwen3_vl_memory_optimizations/assets/demo"
_HELDOUT_FILE = _ROOT / "tests/data/heldout.npz"
_DEMO_COUNTS = {"vqa": 6, "fashion": 5, "digits": 3}
_HELDOUT_COUNTS = {"vqa": 300, "fashion": 200, "digits": 30}


def choose(task: str, data: TinyData, rng: np.random.Generator) -> tuple[list[Item], list[Item]]:
    """Choose the demo and the held-out items of one task.

    Args:
        task: a name out of `tiny_data.TASKS`.
        data: the loaded data sets.
        rng: decides; equal states give equal choices.

    Returns:
        Demo items, with answers all different so that a few of them show much, and held-out items, drawn
        plainly so that their accuracy estimates that of the whole test split.
    """
    demo_count, heldout_count = _DEMO_COUNTS[task], _HELDOUT_COUNTS[task]
    if task == "digits":
        pages = [data.pages["test"].draw(rng) for _ in range(demo_count + heldout_count)]
        return pages[:demo_count], pages[demo_count:]
    part = data.images[task, "test"]
    queue = _one_question_an_image(part, rng)
    demo: list[Item] = []
    rest: list[Item] = []
    answers: set[str] = set()
    for index, turn in queue:
        if len(demo) < demo_count and turn[1] not in answers:
            answers.add(turn[1])
            demo.append((part.images[index], turn))
        else:
            rest.append((part.images[index], turn))
    return demo, rest[:heldout_count]


def _one_question_an_image(part: LabelledImages, rng: np.random.Generator) -> list[tuple[int, tiny_data.Turn]]:
    """All images in random order, each with the question of its that came first in a shuffle of all."""
    flat = part.flat()
    first: dict[int, tiny_data.Turn] = {}
    for position in rng.permutation(len(flat)):
        index, turn = flat[position]
        first.setdefault(index, turn)
    return list(first.items())


def write_demo(folder: Path, chosen: dict[str, list[Item]]) -> None:
    """Write the images as PNG, and `questions.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for task, items in chosen.items():
        for number, (image, (question, expected)) in enumerate(items):
            name = f"{task}_{number}.png"
            Image.fromarray(image).save(folder / name, optimize=True)
            entries.append({"image": name, "task": task, "question": question, "expected": expected})
    (folder / "questions.json").write_text(json.dumps(entries, indent=2) + "\n")


def write_heldout(path: Path, chosen: dict[str, list[Item]]) -> None:
    """Write `images`, `tasks`, `questions` and `answers` as arrays that load without pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    items = [item for part in chosen.values() for item in part]
    np.savez_compressed(
        path,
        images=np.stack([image for image, _ in items]),
        tasks=np.array([task for task, part in chosen.items() for _ in part]),
        questions=np.array([question for _, (question, _) in items]),
        answers=np.array([answer for _, (_, answer) in items]),
    )


def main() -> None:
    """Choose and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--demo-dir", type=Path, default=_DEMO_DIR, help="folder of the demo images")
    parser.add_argument("--heldout", type=Path, default=_HELDOUT_FILE, help="file of the held-out set")
    parser.add_argument("--seed", type=int, default=20, help="decides the choice")
    parser.add_argument("--fashion-dir", type=Path, default=tiny_data.FASHION_DIR, help="Fashion-MNIST files")
    parser.add_argument("--digits", type=Path, default=tiny_data.DIGITS_FILE, help="OpenCV's digits.png")
    args = parser.parse_args()
    try:
        data = tiny_data.load(splits=("test",), fashion_dir=args.fashion_dir, digits_file=args.digits)
    except MissingDataError as error:
        raise SystemExit(f"error: {error}") from error
    rng = np.random.default_rng(args.seed)
    demo, heldout = {}, {}
    for task in tiny_data.TASKS:
        demo[task], heldout[task] = choose(task, data, rng)
    write_demo(args.demo_dir, demo)
    write_heldout(args.heldout, heldout)
    print(f"wrote {args.demo_dir} and {args.heldout}")


if __name__ == "__main__":
    main()
