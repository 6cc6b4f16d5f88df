"""One process: load a model whole, decode after some contexts, and say where the time of a token went, as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.compression import Codec
from qwen3_vl_memory_optimizations.figures.measured import memory_bandwidth
from qwen3_vl_memory_optimizations.model.kv import attention as kv_attention

TOKENS, WARM_TOKENS = 24, 8
BANDWIDTH_BYTES = 512 << 20


class Stopwatch:
    """Seconds that calls of some functions took, and bytes of the weights they were given."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.weight_bytes = 0
        self._inside = False

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is timed, unless it is called by one that is."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            self._inside, start = True, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self._inside = False

        return timed

    def product(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `Codec.linear` that is timed, and whose encoded weights are counted."""
        timed = self.around(call)

        def counted(codec: Codec, x: Any, encoded: dict[str, torch.Tensor], *rest: Any) -> Any:
            if not self._inside:
                self.weight_bytes += sum(segment.nbytes for segment in encoded.values())
            return timed(codec, x, encoded, *rest)

        return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--codec", required=True)
    parser.add_argument("--cache-dir", default=None)
    parser.add_argument("--contexts", nargs="+", type=int, required=True)
    arguments = parser.parse_args()
    settings = {"codec": arguments.codec, "cache_dir": arguments.cache_dir, "enable_cache_hierarchy": False}
    model = create_optimized_model(arguments.model, settings)
    products, attention = Stopwatch(), Stopwatch()
    for codec in {type(entry.codec) for entry in model.memory_optimizer.pager.entries.values()}:
        codec.linear = products.product(codec.linear)  # the class of each codec that holds weights
    states = kv_attention.CachedStates
    states.attend_row = attention.around(states.attend_row)
    kv_attention._attend = attention.around(kv_attention._attend)
    kv_attention.sdpa_attention_forward = attention.around(kv_attention.sdpa_attention_forward)
    with torch.no_grad():
        contexts = {context: decode(model, context, products, attention) for context in arguments.contexts}
    figures = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "memory_bytes_per_s": memory_bandwidth(BANDWIDTH_BYTES),
        "contexts": contexts,
    }
    model.memory_optimizer.close()
    print(json.dumps(figures))


def decode(model: Any, context: int, products: Stopwatch, attention: Stopwatch) -> dict[str, float]:
    """Return medians of the tokens after a prompt of so many."""
    ids = torch.randint(1000, 100_000, (1, context), generator=torch.Generator().manual_seed(0))
    steps: list[dict[str, float]] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            now = time.perf_counter()
            steps.append({"now": now, "products": products.seconds, "attention": attention.seconds})
            steps[-1]["bytes"] = products.weight_bytes

        def end(self) -> None:
            return

    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        eos_token_id=None,
        max_new_tokens=WARM_TOKENS + TOKENS,
        streamer=Streamer(),
    )
    counted = list(zip(steps[WARM_TOKENS:-1], steps[WARM_TOKENS + 1 :], strict=True))
    median = {key: statistics.median(after[key] - before[key] for before, after in counted) for key in steps[0]}
    return {
        "token_s": median["now"],
        "products_s": median["products"],
        "attention_s": median["attention"],
        "weight_bytes": median["bytes"],
    }


if __name__ == "__main__":
    main()
