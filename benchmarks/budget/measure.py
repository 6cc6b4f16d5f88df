"""One measurement in one process: load within a budget, answer about an image, decode; print figures as JSON.

Run by `run.py` inside a control group; on its own it measures without one.
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
PROBE_BYTES = 512 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--ram-budget", default=None)
    parser.add_argument("--codec", default="auto")
    parser.add_argument("--cache-dir", default=None)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--image-px", type=int, default=448, help="side of a square image; 0: text only")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    arguments = parser.parse_args()

    import torch
    from transformers.generation.streamers import BaseStreamer

    from qwen3_vl_memory_optimizations import create_optimized_model
    from qwen3_vl_memory_optimizations.energy import Cost, EnergyMeter
    from qwen3_vl_memory_optimizations.storage import measure_read_bandwidth

    torch.manual_seed(0)
    start = time.perf_counter()
    model = create_optimized_model(
        arguments.model,
        {
            "ram_budget": arguments.ram_budget,
            "codec": arguments.codec,
            "cache_dir": arguments.cache_dir,
        },
    )
    load_s = time.perf_counter() - start
    optimizer = model.memory_optimizer
    inputs = make_inputs(model.config, arguments.image_px, arguments.prompt_tokens, model.dtype)

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.read: list[int] = []
            self.stalls: list[float] = []
            self.reading: list[float] = []
            self.hits: list[tuple[int, int]] = []
            self.costs: list[Cost] = []

        def put(self, value: torch.Tensor) -> None:
            stats = optimizer.pager.stats
            self.times.append(time.perf_counter())
            self.read.append(stats.bytes_read)
            self.stalls.append(stats.stall_s)
            self.reading.append(stats.reading_s)
            self.hits.append((stats.hit_bytes, stats.miss_bytes))
            self.costs.append(Cost.now(meter))

        def end(self) -> None:
            return

    packed = next(iter(optimizer.pager.entries.values())).source.file.path
    bandwidths = [measure_read_bandwidth(packed, total_bytes=PROBE_BYTES)]
    clock = Clock()
    with torch.no_grad(), EnergyMeter() as meter:
        model.generate(
            **inputs,
            max_new_tokens=arguments.tokens,
            min_new_tokens=arguments.tokens,
            do_sample=False,
            streamer=clock,
        )
    stats = optimizer.get_memory_efficiency_stats()
    # The first put is the prompt, the second the first token; the schedule is known after two decode passes.
    first = min(4, len(clock.times) - 2)
    steps = len(clock.times) - 1 - first
    seconds = (clock.times[-1] - clock.times[first]) / steps
    gaps = sorted(b - a for a, b in zip(clock.times[first:], clock.times[first + 1 :], strict=False))
    hits, misses = (clock.hits[-1][i] - clock.hits[first][i] for i in (0, 1))
    weights = stats["kinds"]["weights"]
    bandwidths.append(measure_read_bandwidth(packed, total_bytes=PROBE_BYTES))
    print(
        json.dumps(
            {
                "load_s": round(load_s, 2),
                "first_token_s": round(clock.times[1] - clock.times[0], 2),
                "token_per_s": round(1 / seconds, 3),
                "median_token_s": round(gaps[len(gaps) // 2], 4),
                "stall_s_per_token": round((clock.stalls[-1] - clock.stalls[first]) / steps, 4),
                "bytes_read_per_token": (clock.read[-1] - clock.read[first]) // steps,
                "decode_weight_bytes": (hits + misses) // steps,
                "hit_rate": round(hits / (hits + misses), 4) if hits + misses else None,
                "frames_limit_bytes": stats["budget"]["frames_limit_bytes"],
                "resident_bytes": weights["resident_bytes"],
                "encoded_bytes": weights["encoded_bytes"],
                "reading_share": round((clock.reading[-1] - clock.reading[first]) / (steps * seconds), 3),
                "ssd_bytes_per_s": round(sum(bandwidths) / len(bandwidths)),
                "ssd_bytes_per_s_before_and_after": [round(bandwidth) for bandwidth in bandwidths],
                "rss_peak_bytes": stats["budget"]["process_peak_rss_bytes"],
                "accounts_bytes": stats["budget"]["accounts_bytes"],
                "compute_dtype": str(model.dtype),
                "prefetch_accuracy": stats["paging"]["prefetch_accuracy"],
                "faults": stats["paging"]["faults"],
                **clock.costs[first].per_token(clock.costs[-1], steps),
            }
        )
    )
    optimizer.close()


def make_inputs(config, image_px: int, prompt_tokens: int, dtype, seed: int = 0) -> dict:
    """Return inputs for `generate`: random text, and one random image of `image_px` squared."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    vocabulary = config.get_text_config().vocab_size
    text = torch.randint(1000, min(100_000, vocabulary), (prompt_tokens,), generator=generator)
    if not image_px:
        ids = text[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vision = config.vision_config
    side = image_px // vision.patch_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    n_image = (side // vision.spatial_merge_size) ** 2
    ids = torch.cat(
        [
            torch.tensor([config.vision_start_token_id]),
            torch.full((n_image,), config.image_token_id),
            torch.tensor([config.vision_end_token_id]),
            text,
        ]
    )[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(side * side, patch, generator=generator).to(dtype),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


if __name__ == "__main__":
    main()
