"""One batch in one process: load within a budget, generate for several prompts at once; print figures as JSON.

Run by `run.py` inside a control group; on its own it measures without one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LEAST_TOKENS, MOST_TOKENS = 16, 48
STEPS_TO_LEARN = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--ram-budget", default=None)
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--cache-dir", default=None)
    parser.add_argument("--tokens", type=int, default=16)
    arguments = parser.parse_args()

    import torch
    from transformers.generation.streamers import BaseStreamer

    from qwen3_vl_memory_optimizations import create_optimized_model
    from qwen3_vl_memory_optimizations.energy import Cost, EnergyMeter

    model = create_optimized_model(
        arguments.model,
        {
            "ram_budget": arguments.ram_budget,
            "codec": arguments.codec,
            "cache_dir": arguments.cache_dir,
            "enable_cache_hierarchy": False,  # every run computes
        },
    )
    optimizer = model.memory_optimizer
    stats = optimizer.pager.stats
    inputs = make_batch(model.config, arguments.batch)
    steps: list[dict[str, float]] = []
    costs: list[Cost] = []

    class Clock(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            costs.append(Cost.now(meter))
            steps.append(
                {
                    "time_s": time.perf_counter(),
                    "read_bytes": stats.bytes_read,
                    "used_bytes": stats.hit_bytes + stats.miss_bytes,
                    "frames_bytes": optimizer.pager.frames.limit_bytes,
                    "reading_s": stats.reading_s,
                }
            )

        def end(self) -> None:
            return

    n_tokens = arguments.tokens + STEPS_TO_LEARN
    with torch.no_grad(), EnergyMeter() as meter:
        out = model.generate(
            **inputs, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False, streamer=Clock()
        )
    assert out.shape == (arguments.batch, inputs["input_ids"].shape[1] + n_tokens)
    # The first put is the prompt, the second the first token; the order of a step is known after two of them.
    first, last = steps[1 + STEPS_TO_LEARN], steps[-1]
    count = len(steps) - 2 - STEPS_TO_LEARN
    seconds = last["time_s"] - first["time_s"]
    budget = optimizer.get_memory_efficiency_stats()["budget"]
    print(
        json.dumps(
            {
                "prompt_tokens": inputs["attention_mask"].sum(dim=1).tolist(),
                "prefill_s": round(steps[1]["time_s"] - steps[0]["time_s"], 3),
                "steps": count,
                "step_s": round(seconds / count, 4),
                "token_per_s": round(arguments.batch * count / seconds, 3),
                "read_bytes_per_step": round((last["read_bytes"] - first["read_bytes"]) / count),
                "used_bytes_per_step": round((last["used_bytes"] - first["used_bytes"]) / count),
                "frames_bytes": round(sum(step["frames_bytes"] for step in steps[-count:]) / count),
                "reading_share": round((last["reading_s"] - first["reading_s"]) / seconds, 3),
                "accounts_bytes": budget["accounts_bytes"],
                "peak_rss_bytes": budget["process_peak_rss_bytes"],
                **costs[1 + STEPS_TO_LEARN].per_token(costs[-1], arguments.batch * count),
            }
        )
    )
    optimizer.close()


def make_batch(config: Any, n_prompts: int, seed: int = 0) -> dict[str, Any]:
    """Return prompts of random ids and of different lengths, padded on the left."""
    import torch

    source = random.Random(seed)
    text = config.get_text_config()
    span = MOST_TOKENS - LEAST_TOKENS
    # One prompt alone is as long as the longest of several.
    lengths = [MOST_TOKENS - index * span // max(1, n_prompts - 1) for index in range(n_prompts)]
    draw = range(min(1000, text.vocab_size // 2), min(100_000, text.vocab_size))
    ids = torch.zeros((n_prompts, MOST_TOKENS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, MOST_TOKENS - length :] = torch.tensor([source.choice(draw) for _ in range(length)])
        mask[row, MOST_TOKENS - length :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if hasattr(config, "vision_config"):
        inputs["mm_token_type_ids"] = torch.zeros_like(ids)
    return inputs


if __name__ == "__main__":
    main()
