"""Time to the first token of images that are new, seen before, and seen before a restart; print figures as JSON.

One process, run by `run.py`: the first with `--phase first`, then, for the restart, one with `--phase restart` on the
same cache directory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
MODES = {
    "off": {"enable_cache_hierarchy": False},
    "features": {"prefix_reuse": "off"},
    "prefixes": {"prefix_reuse": "on"},
}
_BEAT_S, _STOPPED_S = 0.02, 0.5


class Heartbeat:
    """Notices that the process, or the machine, stood still: what was timed meanwhile says nothing."""

    def __init__(self) -> None:
        self.stops = 0
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        last_s = time.monotonic()
        while True:
            time.sleep(_BEAT_S)
            now_s = time.monotonic()
            self.stops += now_s - last_s > _STOPPED_S
            last_s = now_s


class FirstToken:
    """A streamer that notes when the first token after the prompt came."""

    def __init__(self) -> None:
        self.calls, self.first_s = 0, float("nan")

    def put(self, value) -> None:
        self.calls += 1
        if self.calls == 2:  # the first brings the prompt
            self.first_s = time.perf_counter()

    def end(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--ram-budget", default=None)
    parser.add_argument("--cache-dir", required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--phase", choices=("first", "restart"), required=True)
    parser.add_argument("--image-px", type=int, default=1024)
    parser.add_argument("--question-tokens", type=int, default=32)
    parser.add_argument("--images", type=int, default=3)
    arguments = parser.parse_args()

    import torch

    from qwen3_vl_memory_optimizations import create_optimized_model

    sys.path.insert(0, str(ROOT))
    from benchmarks.budget.measure import make_inputs

    model = create_optimized_model(
        arguments.model,
        {"ram_budget": arguments.ram_budget, "cache_dir": arguments.cache_dir, **MODES[arguments.mode]},
    )
    optimizer, heart = model.memory_optimizer, Heartbeat()

    def inputs_of(image: int, question: int) -> dict:
        inputs = make_inputs(model.config, arguments.image_px, arguments.question_tokens, model.dtype, seed=image)
        text = make_inputs(model.config, 0, arguments.question_tokens, model.dtype, seed=question)["input_ids"]
        inputs["input_ids"][:, -arguments.question_tokens :] = text
        return inputs

    def answer(inputs: dict) -> dict:
        """Return the seconds to the first token, those until `generate` returns, and whether nothing stood still."""
        stops, clock = heart.stops, FirstToken()
        start_s = time.perf_counter()
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False, streamer=clock)
        whole_s = time.perf_counter() - start_s
        time.sleep(3 * _BEAT_S)
        return {
            "s": round(clock.first_s - start_s, 3),
            "whole_s": round(whole_s, 3),
            "undisturbed": heart.stops == stops,
        }

    def measured(kind: str, image: int, question: int) -> None:
        runs.append({"kind": kind, "image": image, **answer(inputs_of(image, question))})

    runs: list[dict] = []
    # Kernels are chosen, weights are read: with another image, of which nothing is used later.
    if arguments.phase == "first":
        answer(inputs_of(1000, 1))
    answer(make_inputs(model.config, 0, arguments.question_tokens, model.dtype, seed=5))
    for image in range(arguments.images):
        if arguments.phase == "first":
            measured("new", image, 100 + image)
            measured("seen", image, 200 + image)
            measured("seen", image, 300 + image)
        else:
            measured("seen before the restart", image, 400 + image)
    cache = optimizer.get_memory_efficiency_stats()["cache"]
    peak_bytes = optimizer.get_memory_efficiency_stats()["budget"]["process_peak_rss_bytes"]
    print(
        json.dumps(
            {"runs": runs, "dtype": str(model.dtype).removeprefix("torch."), "cache": cache, "peak_bytes": peak_bytes}
        )
    )
    optimizer.close()


if __name__ == "__main__":
    main()
