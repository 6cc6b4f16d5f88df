"""One answer about one image by a large model, with plain transformers or within a budget.

Run as `python -m qwen3_vl_memory_optimizations.cli.demo.one_answer MODEL IMAGE QUESTION [RAM_BUDGET CACHE_DIR]`;
prints one JSON object.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

MAX_NEW_TOKENS = 8
LEAST_TOKENS, MOST_SECONDS = 4, 6.0
"""On a slow disk an answer is shorter: it ends once it has this many tokens and decoding has taken this long."""


def answer(directory: Path, image: Path, question: str, budget: tuple[str, str] | None) -> dict[str, Any]:
    """Return the token ids of an answer and how long it took.

    Args:
        directory: the checkpoint.
        image: a file.
        question: about the image.
        budget: `ram_budget` and `cache_dir`; `None`: plain transformers.
    """
    import torch

    from ...model.inputs.processor import load_processor

    processor = load_processor(directory)
    inputs = processor.prepare(question, [image])
    streamer = processor.streamer(lambda text: None)
    start = time.perf_counter()
    model = _load(directory, budget)
    loaded = time.perf_counter()

    def is_long_enough(all_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        is_late = time.perf_counter() - (streamer.first_token_s or math.inf) > MOST_SECONDS
        return torch.full(all_ids.shape[:1], is_late and streamer.n_tokens >= LEAST_TOKENS)

    found = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        stopping_criteria=[is_long_enough],
        streamer=streamer,
    )
    ids = found[0, inputs["input_ids"].shape[1] :].tolist()
    first_s, last_s = streamer.first_token_s, streamer.last_token_s
    seconds = (last_s or 0.0) - (first_s or 0.0)
    result = {
        "token_ids": ids,
        "load_s": loaded - start,
        "first_token_s": None if first_s is None else first_s - loaded,
        "tokens_per_s": (streamer.n_tokens - streamer.n_first_tokens) / seconds if seconds else None,
        "compute_dtype": str(model.dtype).removeprefix("torch."),
    }
    if budget is not None:
        model.memory_optimizer.close()
    return result


def _load(directory: Path, budget: tuple[str, str] | None) -> Any:
    if budget is None:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(directory, dtype="auto", local_files_only=True).eval()
    from ... import create_optimized_model

    ram_budget, cache_dir = budget
    # As they are: weights are paged from the checkpoint itself, and nothing is packed.
    return create_optimized_model(directory, {"ram_budget": ram_budget, "cache_dir": cache_dir, "codec": "none"})


if __name__ == "__main__":
    model, image, question, *budget = sys.argv[1:]
    print(json.dumps(answer(Path(model), Path(image), question, (budget[0], budget[1]) if budget else None)))
