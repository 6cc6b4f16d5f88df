"""One conversation in one process, with default settings inside a budget; print its figures as one line of JSON.

Run by `run.py` inside a control group; on its own it measures without one. The exit status is 3 where the budget
refused the conversation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

EXIT_REFUSED = 3
IMAGES_PX = {"text": (), "page": (1024,), "two-images": (448, 448)}
"""Sides of the square images of each kind of conversation."""
LEAST_TEXT_TOKENS = 64
FOLLOW_UP_TOKENS = 40
_RESTART_STATE = "conversation.json"
_COARSE = 8
"""Images are smooth: random values on a grid of this many points per side, interpolated."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--ram-budget", default=None)
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="in the first turn, images included")
    parser.add_argument("--kind", choices=IMAGES_PX, default="text")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="per answer")
    parser.add_argument("--restart", action="store_true", help="give the last turn a new process")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    state_path = arguments.cache_dir / _RESTART_STATE
    state: dict[str, Any] = json.loads(state_path.read_text()) if arguments.resume else {"turns": [], "ids": []}
    figures, exit_status = converse(arguments, state)
    if arguments.restart and not arguments.resume and arguments.turns > 1 and exit_status == 0:
        state_path.write_text(json.dumps(state))
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv, "--resume"])
    print(json.dumps(figures))
    sys.exit(exit_status)


def converse(arguments: argparse.Namespace, state: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Hold the turns that are this process's, and return the figures of all so far with the exit status.

    Args:
        arguments: of the command line.
        state: what earlier processes said and measured; what this one does is added.
    """
    from qwen3_vl_memory_optimizations import MemoryBudgetExceeded, create_optimized_model

    turns: list[dict[str, Any]] = state["turns"]
    last = arguments.turns - (1 if arguments.restart and not arguments.resume and arguments.turns > 1 else 0)
    progress = {"tokens": 0}
    figures: dict[str, Any] = {}
    optimizer = None
    try:
        start_s = time.perf_counter()
        settings = {"ram_budget": arguments.ram_budget, "cache_dir": str(arguments.cache_dir)}
        model = create_optimized_model(arguments.model, settings)
        figures = {"load_s": round(time.perf_counter() - start_s, 2), "compute_dtype": str(model.dtype)}
        optimizer = model.memory_optimizer
        images = make_images(model.config, IMAGES_PX[arguments.kind], model.dtype)
        counter = ComputedTokens(model)
        ids = state["ids"] or first_prompt(model.config, images, arguments.prompt_tokens)
        while len(turns) < last:
            if turns:
                ids = ids + random_ids(model.config, FOLLOW_UP_TOKENS, seed=1 + len(turns))
            progress["tokens"] = 0
            turn, ids = take_turn(model, ids, images, arguments.tokens, counter, progress)
            turns.append(turn)
        state["ids"] = ids
    except MemoryBudgetExceeded as error:
        figures |= {
            "refused": True,
            "turn": len(turns) + 1,
            "tokens_before": progress["tokens"],
            "while_loading": optimizer is None,
            "error": str(error),
        }
    if optimizer is not None:
        stats = optimizer.get_memory_efficiency_stats()
        figures |= {
            "frames_limit_bytes": stats["budget"]["frames_limit_bytes"],
            "swap_writes": state.get("swap_writes", 0) + stats["paging"]["swap_writes"],
            "swap_reads": state.get("swap_reads", 0) + stats["paging"]["swap_reads"],
            "cache_hits": None if stats["cache"] is None else stats["cache"]["hits"],
        }
        figures["kv"] = stats["kv"]
        if optimizer.audit is not None:
            figures["undeclared"] = [(each.phase, each.n_bytes) for each in optimizer.audit.found]
        optimizer.close()
    figures["peak_rss_bytes"] = max(state.get("peak_rss_bytes", 0), memory_bytes("VmHWM"))
    state |= {name: figures[name] for name in ("peak_rss_bytes", "swap_writes", "swap_reads") if name in figures}
    return {"turns": turns, **figures}, EXIT_REFUSED if figures.get("refused") else 0


def take_turn(
    model: Any,
    ids: list[int],
    images: Mapping[str, torch.Tensor],
    tokens: int,
    counter: ComputedTokens,
    progress: dict[str, int],
) -> tuple[dict[str, Any], list[int]]:
    """Answer once; return the figures, and the conversation with the answer.

    Args:
        model: of `create_optimized_model`.
        ids: the conversation so far.
        images: arguments of `generate` for its images.
        tokens: the length of the answer.
        counter: of `model`.
        progress: `tokens` is kept up to date, for when the answer breaks off.
    """
    import torch
    from transformers.generation.streamers import BaseStreamer

    stats = model.memory_optimizer.pager.stats

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.read: list[int] = []
            self.computed = 0

        def put(self, value: torch.Tensor) -> None:
            if not self.times:
                self.computed = counter.tokens
            self.times.append(time.perf_counter())
            self.read.append(stats.bytes_read)
            progress["tokens"] = max(0, len(self.times) - 1)  # the first one is the prompt
            if progress["tokens"] == 1:
                self.computed = counter.tokens - self.computed

        def end(self) -> None:
            return

    clock, prompt = Clock(), torch.tensor([ids])
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **images}
    if images:
        inputs["mm_token_type_ids"] = (prompt == model.config.image_token_id).int()
    written = stats.bytes_written
    start_s = time.perf_counter()
    with torch.no_grad():
        result = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock)
    steps = len(clock.times) - 2
    decode_s = clock.times[-1] - clock.times[1]
    turn = {
        "prompt_tokens": len(ids),
        "computed_tokens": clock.computed,
        "first_token_s": round(clock.times[1] - start_s, 2),
        "token_per_s": round(steps / decode_s, 3) if steps else None,
        "bytes_read_per_token": (clock.read[-1] - clock.read[1]) // steps if steps else None,
        "bytes_written": stats.bytes_written - written,
        "rss_bytes": memory_bytes("VmRSS"),
    }
    return turn, without_image_tokens(model.config, result[0].tolist(), len(ids))


class ComputedTokens:
    """Counts the positions that forwards of a model compute: a known beginning of a prompt is not among them."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0

        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            ids = kwargs.get("inputs_embeds") if ids is None else ids
            self.tokens += 0 if ids is None else int(ids.shape[1])

        count.changes_nothing = True  # type: ignore[attr-defined]
        model.register_forward_pre_hook(count, with_kwargs=True)


def first_prompt(config: Any, images: Mapping[str, torch.Tensor], prompt_tokens: int) -> list[int]:
    """Return the images' places and random text, `prompt_tokens` together, or more where the images need it."""
    merge = config.vision_config.spatial_merge_size
    ids: list[int] = []
    for _, rows, columns in images["image_grid_thw"].tolist() if images else ():
        places = [config.image_token_id] * (rows // merge * (columns // merge))
        ids += [config.vision_start_token_id, *places, config.vision_end_token_id]
    least = ids.count(config.image_token_id) + LEAST_TEXT_TOKENS
    return ids + random_ids(config, max(prompt_tokens, least if ids else 1) - len(ids), seed=0)


def random_ids(config: Any, n_tokens: int, seed: int) -> list[int]:
    """Return random tokens of text."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(100_000, config.get_text_config().vocab_size)
    return torch.randint(1000, vocabulary, (n_tokens,), generator=generator).tolist()


def without_image_tokens(config: Any, ids: list[int], start: int) -> list[int]:
    """Return a conversation whose answer, from `start` on, names no images: random weights may choose such tokens."""
    special = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    return ids[:start] + [1000 if token in special else token for token in ids[start:]]


def make_images(config: Any, sides_px: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return `pixel_values` and `image_grid_thw` of smooth random images, laid out as the image processor does."""
    import torch

    if not sides_px:
        return {}
    vision = config.vision_config
    size, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    generator = torch.Generator().manual_seed(0)
    patches, grids = [], []
    for side_px in sides_px:
        blocks = side_px // (size * merge)
        coarse = torch.randn(1, vision.in_channels, _COARSE, _COARSE, generator=generator)
        extent = (blocks * merge * size,) * 2
        pixels = torch.nn.functional.interpolate(coarse, size=extent, mode="bilinear")[0].to(dtype)
        cut = pixels.view(-1, blocks, merge, size, blocks, merge, size).permute(1, 4, 2, 5, 0, 3, 6)
        rows = cut.unsqueeze(5).expand(*cut.shape[:5], frames, size, size)
        patches.append(rows.reshape((blocks * merge) ** 2, -1))
        grids.append([1, blocks * merge, blocks * merge])
    return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}


def memory_bytes(name: str) -> int:
    """Return a figure of `/proc/self/status`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
