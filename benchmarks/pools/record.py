"""Record what transformers allocates in 50 mixed requests to a model of the true 2B shapes (4 layers of each tower).

    python benchmarks/pools/record.py CHECKPOINT    # made by benchmarks/make_checkpoint.py, 2B with 4 layers

Every second request has a picture, of 256 to 1024 pixels; prompts have 64 to 1024 tokens, answers 4 to 24. The keys and
values of a request are kept for a next question; of more than 6 kept, one drawn at random is dropped. The profiler of
torch gives the allocations; those below 64 KB are left out (and counted). Seeds are fixed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks.budget.measure import make_inputs  # noqa: E402

TRACE = Path(__file__).parent / "trace.npz"
REQUESTS = 50
_LEAST_BYTES = 64 * 2**10
_KEPT = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    arguments = parser.parse_args()
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    draw = np.random.default_rng(0)
    kept: list[Any] = []
    trace = Trace()
    for number in range(REQUESTS):
        image_px = int(draw.integers(8, 33)) * 32 if number % 2 else 0
        inputs = make_inputs(model.config, image_px, int(draw.integers(64, 1025)), model.dtype, seed=number)
        tokens = int(draw.integers(4, 25))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.no_grad():
            out = model.generate(
                **inputs,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                return_dict_in_generate=True,
            )
            kept.append(out.past_key_values)
            del out, inputs
            if len(kept) > _KEPT:
                del kept[int(draw.integers(len(kept)))]
        trace.add(profiler)
        print(f"request {number + 1}: {image_px} px, {len(trace.events)} events", flush=True)
    trace.save(TRACE)


class Trace:
    """Allocations (bytes above zero) and releases (zero) of numbered tensors, with the seconds since the start."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int, float, int]] = []  # number, bytes, seconds, request
        self.small = 0
        self.requests = 0
        self._numbers: dict[int, int] = {}  # address -> number of the tensor there
        self._count = 0
        self._end_s = 0.0

    def add(self, profiler: Any) -> None:
        """Append what one request allocated."""
        found = []
        queue = list(profiler.profiler.kineto_results.experimental_event_tree())
        while queue:
            event = queue.pop()
            queue.extend(event.children)
            name, fields = event.typed
            if name.name == "Allocation":
                found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        found.sort(key=lambda each: each[0])
        start_ns = found[0][0]
        for time_ns, address, n_bytes in found:
            at_s = self._end_s + (time_ns - start_ns) / 1e9
            if abs(n_bytes) < _LEAST_BYTES:
                self.small += n_bytes > 0
            elif n_bytes > 0:
                self._numbers[address] = self._count
                self.events.append((self._count, n_bytes, at_s, self.requests))
                self._count += 1
            elif address in self._numbers:
                self.events.append((self._numbers.pop(address), 0, at_s, self.requests))
        self._end_s += (found[-1][0] - start_ns) / 1e9
        self.requests += 1

    def save(self, path: Path) -> None:
        """Write the trace."""
        numbers, n_bytes, at_s, request = (np.asarray(column) for column in zip(*self.events, strict=True))
        np.savez_compressed(
            path,
            tensor=numbers.astype(np.int32),
            n_bytes=n_bytes.astype(np.int64),
            at_ms=(1000 * at_s).astype(np.int32),
            request=request.astype(np.int8),
            small=self.small,
        )
        print(f"{len(numbers)} events, {self._count} tensors, {self.small} smaller ones left out")


if __name__ == "__main__":
    main()
