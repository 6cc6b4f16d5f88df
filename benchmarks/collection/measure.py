"""One session of 50 questions in a process of its own; prints what memory it took, as JSON."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from qwen3_vl_memory_optimizations import create_optimized_model  # noqa: E402

QUESTIONS = 50
_TOKENS = 8
_QUESTION_TOKENS = 24
_SAMPLE_S = 0.02


def questions(seed: int) -> list[int]:
    """Return the picture of each question: one to four in a row, every third time one of the last three again."""
    draw = random.Random(seed)
    asked: list[int] = []
    shown: list[int] = []
    while len(asked) < QUESTIONS:
        if len(shown) > 1 and draw.random() < 1 / 3:
            picture = draw.choice(shown[-4:-1])
            shown.remove(picture)
        else:
            picture = len(set(asked))
        shown.append(picture)
        asked += [picture] * draw.randint(1, 4)
    return asked[:QUESTIONS]


def inputs_for(model: Any, picture: int, question: int, side_px: int) -> dict[str, torch.Tensor]:
    """Return a prompt with one picture, both drawn: what is measured does not depend on what they show."""
    config = model.config
    vision = config.vision_config
    rows = side_px // vision.patch_size
    draw = torch.Generator().manual_seed(picture)
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    n_tokens = (rows // vision.spatial_merge_size) ** 2
    words = torch.randint(1000, 2000, (_QUESTION_TOKENS,), generator=torch.Generator().manual_seed(1000 + question))
    middle = [config.vision_start_token_id, *[config.image_token_id] * n_tokens, config.vision_end_token_id]
    ids = torch.tensor([[*middle, *words.tolist()]])
    types = (ids == config.image_token_id).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": types,
        "pixel_values": torch.randn(rows * rows, values, generator=draw),
        "image_grid_thw": torch.tensor([[1, rows, rows]]),
    }


class Peak:
    """Watches what kept results and runtime tensors take together."""

    def __init__(self, optimizer: Any) -> None:
        self.n_bytes, self.total, self.samples = 0, 0, 0
        self._optimizer = optimizer
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            cached = self._optimizer.cache.l2_cache.used_bytes
            runtime = sum(self._optimizer.pager.runtime.idle_bytes().values())
            self.n_bytes = max(self.n_bytes, cached + runtime)
            self.total += cached + runtime
            self.samples += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--collect", choices=("on", "off"), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side-px", type=int, default=448)
    parser.add_argument("--packed-dir", required=True, help="where packed checkpoints lie")
    parser.add_argument("--private", action="store_true", help="nothing is kept on the SSD")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.packed_dir) as directory:
        (Path(directory) / "packed").symlink_to(Path(arguments.packed_dir).resolve() / "packed")
        settings = {"cache_dir": directory, "private": arguments.private}
        settings["enable_predictive_gc"] = arguments.collect == "on"
        model = create_optimized_model(arguments.model, settings)
        optimizer = model.memory_optimizer
        first_s, answers = [], []
        with Peak(optimizer) as peak, optimizer.inference_session():
            for number, picture in enumerate(questions(arguments.seed)):
                inputs = inputs_for(model, picture, number, arguments.side_px)
                start_s = time.perf_counter()
                with torch.no_grad():
                    ids = model.generate(**inputs, max_new_tokens=_TOKENS, min_new_tokens=_TOKENS, do_sample=False)
                first_s.append(time.perf_counter() - start_s)
                answers.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
        stats = optimizer.get_memory_efficiency_stats()
        optimizer.close()
    print(
        json.dumps(
            {
                "collect": arguments.collect,
                "seed": arguments.seed,
                "peak_bytes": peak.n_bytes,
                "mean_bytes": peak.total // max(peak.samples, 1),
                "peak_rss_bytes": stats["budget"]["process_peak_rss_bytes"],
                "questions_s": sum(first_s),
                "hits": stats["cache"]["hits"],
                "hit_rate": stats["cache"]["hit_rate"],
                "ssd_hits": 0 if arguments.private else stats["cache"]["levels"]["ssd"]["hits"],
                "gc": stats["gc"],
                "answers": answers,
            }
        )
    )


if __name__ == "__main__":
    main()
