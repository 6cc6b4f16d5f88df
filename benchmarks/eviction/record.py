"""Record the traces of this benchmark from real runs of the tiny model: which weights, keys and values and kept results
are used in which order. What is drawn at random has fixed seeds; the committed traces were made by this script."""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks.eviction.replay import TraceRecorder  # noqa: E402
from qwen3_vl_memory_optimizations import create_optimized_model  # noqa: E402
from qwen3_vl_memory_optimizations.model.kv import cache as kv_cache  # noqa: E402
from tests.model import tiny  # noqa: E402

TRACES = Path(__file__).parent / "traces"
BLOCK_TOKENS = 32
"""Of kept beginnings of prompts: those of the tiny model are short."""


class Session:
    """A model whose uses are recorded, and what is asked of it."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model = model
        self.draw = np.random.default_rng(seed)
        self.images, _, self.questions, _ = tiny.heldout()

    def popular(self, count: int) -> int:
        """Draw one of some, the first ones most often."""
        weights = 1 / np.arange(1, count + 1)
        return int(self.draw.choice(count, p=weights / weights.sum()))

    def question(self) -> str:
        """Draw a question."""
        return self.questions[int(self.draw.integers(len(self.questions)))]

    def ask(self, pictures: list[int], question: str, tokens: int = 6) -> None:
        """Ask about pictures."""
        prompt = tiny.prompt(question, n_images=len(pictures))
        self.generate(tiny.batch([prompt], self.images[pictures] if pictures else None), tokens)

    def generate(self, inputs: dict[str, torch.Tensor], tokens: int) -> None:
        """Answer."""
        with torch.no_grad():
            self.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def image_chat(session: Session) -> None:
    """Conversations about 24 pictures, some of which come again and again; one to four questions each."""
    for _ in range(40):
        picture = session.popular(24)
        for _ in range(int(session.draw.integers(1, 5))):
            session.ask([picture], session.question())


def documents(session: Session) -> None:
    """Questions about 12 texts of 160 tokens, each of which stands before the question."""
    texts = [session.draw.integers(8, 60, 160).tolist() for _ in range(12)]
    for _ in range(100):
        prompt = texts[session.popular(12)] + tiny.ids_of(session.question())
        session.generate(tiny.batch([prompt], None), 4)


def long_decode(session: Session) -> None:
    """One answer of 220 tokens behind a picture."""
    session.ask([3], session.question(), tokens=220)


def vision_and_decode(session: Session) -> None:
    """A new picture each time, two of them now and then, with an answer of ten tokens."""
    for number in range(40):
        session.ask([100 + number, 200 + number][: 1 + number % 3 // 2], session.question(), tokens=10)


def mixed(session: Session) -> None:
    """All of these in turns, as several users would have them."""
    texts = [session.draw.integers(8, 60, 160).tolist() for _ in range(12)]
    for number in range(110):
        turn = session.draw.integers(4)
        if turn == 0:
            session.ask([session.popular(24)], session.question())
        elif turn == 1:
            prompt = texts[session.popular(12)] + tiny.ids_of(session.question())
            session.generate(tiny.batch([prompt], None), 4)
        elif turn == 2:
            session.ask([300 + number], session.question(), tokens=10)
        else:
            session.ask([], session.question(), tokens=16)


SCENES: dict[str, Callable[[Session], None]] = {
    "image-chat": image_chat,
    "documents": documents,
    "long-decode": long_decode,
    "vision-and-decode": vision_and_decode,
    "mixed": mixed,
}


def _note_cached(recorder: TraceRecorder, key: str, n_bytes: int, kind: str) -> None:
    recorder(key, n_bytes, "cached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SCENES, default=list(SCENES))
    arguments = parser.parse_args()
    kv_cache.BLOCK_TOKENS = BLOCK_TOKENS
    TRACES.mkdir(exist_ok=True)
    for number, name in enumerate(arguments.only):
        with tempfile.TemporaryDirectory() as directory:
            settings = {"codec": "int8", "prefix_reuse": "on", "cache_dir": directory, "private": True}
            settings["enable_predictive_gc"] = False  # what is kept decides what is asked for
            model = create_optimized_model(tiny.DIRECTORY, settings)
            optimizer, recorder = model.memory_optimizer, TraceRecorder()
            optimizer.cache.listen(functools.partial(_note_cached, recorder))
            with optimizer.pager.recording(recorder):
                SCENES[name](Session(model, seed=number))
            optimizer.close()
        trace = recorder.trace()
        trace.save(TRACES / f"{name}.npz")
        print(f"{name}: {len(trace.keys)} uses of {len(trace.n_bytes)} keys, {trace.total_bytes / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
