"""Estimate the time to the first token from the sizes of pictures and prompt and from measured rates."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...cache import HierarchicalCacheSystem
from ...config import MemoryConfig
from ..compat import vision_tower
from ..reuse.prefix import PrefixReuse
from ..reuse.vision import VisionReuse
from .pieces import forward_size
from .rates import DECODE, TEXT, VISION, RunRates

_LEAST_TOKENS = 64
"""Passes of fewer tokens are bound by reading weights, not by operations: they say nothing of a prompt."""
_DECODE_STEPS = 16
"""Decode steps whose mean is noted."""
_GRIDS = ("image_grid_thw", "video_grid_thw")


@dataclass(frozen=True, slots=True)
class Estimate:
    """The expected time to the first token.

    Attributes:
        seconds: from the call of `generate`.
        measured: from runs of this model on this machine; otherwise from the speed of one matrix product.
        tokens: prompt tokens to compute; those known from earlier prompts are not counted.
        patches: patches of pictures to encode.
    """

    seconds: float
    measured: bool
    tokens: int
    patches: int


def vision_ops(config: Any, grids: Sequence[Sequence[int]]) -> float:
    """Return the operations of the vision tower for pictures, given as frame groups, rows and columns of patches."""
    vision: Any = getattr(config, "vision_config", None)
    if not hasattr(vision, "depth"):
        return 0.0
    width, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    levels = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    per_patch = vision.depth * 2 * (4 * width**2 + 2 * width * vision.intermediate_size)
    per_patch += levels * 2 * merged * (merged + vision.out_hidden_size) / vision.spatial_merge_size**2
    total = 0.0
    for frames, rows, columns in grids:
        patches = rows * columns
        total += frames * (patches * per_patch + 4 * vision.depth * width * patches**2)
    return total


def text_ops(config: Any, tokens: int, past: int = 0) -> float:
    """Return the operations of the decoder for new tokens after cached ones."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    matrices = text.hidden_size * (2 * heads * head_dim + 2 * kv_heads * head_dim + 3 * inner)
    attended = tokens * (past + tokens / 2)
    return float(text.num_hidden_layers * (2 * tokens * matrices + 4 * heads * head_dim * attended))


def decode_ops(config: Any, past: int = 0) -> float:
    """Return the operations of one decode step after cached tokens: all layers and the language-model head."""
    text = config.get_text_config()
    return text_ops(config, 1, past) + 2.0 * text.hidden_size * text.vocab_size


def estimate_prompt(
    config: Any, rates: RunRates, grids: Sequence[Sequence[int]], tokens: int, past: int = 0
) -> Estimate:
    """Estimate the time to the first token of a prompt.

    Args:
        config: of the model.
        rates: of the model on this machine.
        grids: frame groups, rows and columns of patches per picture that is encoded.
        tokens: of the whole prompt, pictures included.
        past: how many of them are cached.
    """
    seconds, measured = 0.0, True
    for kind, ops in ((VISION, vision_ops(config, grids)), (TEXT, text_ops(config, tokens - past, past))):
        if ops:
            expected_s, is_measured = rates.seconds(kind, ops)
            seconds, measured = seconds + expected_s, measured and is_measured
    return Estimate(seconds, measured, tokens - past, sum(math.prod(grid) for grid in grids))


class PromptEstimator:
    """Estimates the time to the first token of a model, and measures its rates at each `generate`.

    Args:
        model: a transformers model.
        config: locates the kept rates.
        reuse: knows which prompts begin as earlier ones; `None`: none are kept.
        vision, cache: know which pictures are encoded; `None`: none are kept.
    """

    def __init__(
        self,
        model: Any,
        config: MemoryConfig,
        *,
        reuse: PrefixReuse | None = None,
        vision: VisionReuse | None = None,
        cache: HierarchicalCacheSystem | None = None,
    ) -> None:
        self._model, self._reuse, self._vision, self._cache = model, reuse, vision, cache
        self.rates = RunRates(config, rates_name(model.config, config.weight_codec(), model.dtype))

    def of_sizes(self, grids: Sequence[Sequence[int]], tokens: int) -> Estimate:
        """Estimate a prompt of which nothing is known yet.

        Args:
            grids: frame groups, rows and columns of patches per picture.
            tokens: of the whole prompt, pictures included.
        """
        return estimate_prompt(self._model.config, self.rates, grids, tokens)

    def of_inputs(self, inputs: Mapping[str, Any]) -> Estimate:
        """Estimate the arguments of `generate`, less what earlier prompts have left in the cache."""
        grids = [grid for name in _GRIDS if inputs.get(name) is not None for grid in inputs[name].tolist()]
        tokens, past = int(inputs["input_ids"].shape[1]), 0
        if self._reuse is not None:
            past, left = self._reuse.known(inputs)
            if past:
                grids = left
        if self._vision is not None and self._cache is not None and grids and inputs.get("pixel_values") is not None:
            known = self._vision.keys(inputs["pixel_values"], inputs["image_grid_thw"])
            absent = [self._cache.predict_load_s(key) is None for key in known or ()]
            images = inputs["image_grid_thw"].tolist()
            for grid, is_absent in zip(images, absent, strict=False):
                if not is_absent and grid in grids:
                    grids.remove(grid)
        return estimate_prompt(self._model.config, self.rates, grids, tokens, past)


class _Passes(threading.local):
    """What one thread has measured since its last pass.

    Attributes:
        size: sequences, new tokens and cached tokens of the pass.
        start_s, vision_start_s: when the pass, or the vision tower, began; `None`: neither.
        vision_s, vision_ops: of the vision tower; `inside_s`: the time of it within the pass.
        stall_s: wait for page reads before the pass.
        steps, decode_s, decode_ops: of decode steps since they were last noted.
    """

    size = (1, 1, 0)
    start_s: float | None = None
    vision_start_s: float | None = None
    vision_s = vision_ops = inside_s = stall_s = 0.0
    steps = 0
    decode_s = decode_ops = 0.0


def attach_estimator(
    model: Any, estimator: PromptEstimator, wanted: Callable[[], bool], stall_s: Callable[[], float]
) -> None:
    """Measure the rates of a model at each prompt and decode step; adds a few microseconds to each pass.

    Args:
        model: a transformers model.
        estimator: takes the measurements.
        wanted: returns whether the pass belongs to a `generate`; other passes compute more than a prompt.
        stall_s: returns the total time spent waiting for page reads; it is excluded from the rate of decode steps.
    """
    here = _Passes()

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here.start_s, here.inside_s = None, 0.0
        if wanted():
            here.size, here.stall_s, here.start_s = forward_size(args, kwargs), stall_s(), time.perf_counter()

    def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        start_s, here.start_s = here.start_s, None
        work = {"vision": (here.vision_ops, here.vision_s)}
        here.vision_ops = here.vision_s = 0.0
        if start_s is None or output is None:
            return
        batch, tokens, past = here.size
        if batch == tokens == 1:
            note_step(time.perf_counter() - start_s - (stall_s() - here.stall_s), past)
        if tokens >= _LEAST_TOKENS:
            seconds = time.perf_counter() - start_s - here.inside_s
            work["text"] = (batch * text_ops(model.config, tokens, past), seconds)
        if work["vision"][0] or "text" in work:
            estimator.rates.note(work)

    def note_step(seconds: float, past: int) -> None:
        here.steps += 1
        here.decode_s += seconds
        here.decode_ops += decode_ops(model.config, past)
        if here.steps == _DECODE_STEPS:
            mean = (here.decode_ops / here.steps, here.decode_s / here.steps)
            estimator.rates.note({DECODE: mean}, steps=here.steps)
            here.steps, here.decode_s, here.decode_ops = 0, 0.0, 0.0

    def before_vision(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here.vision_start_s = time.perf_counter() if wanted() else None

    def after_vision(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        vision_start_s, here.vision_start_s = here.vision_start_s, None
        grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        if vision_start_s is None or output is None or not isinstance(grid, torch.Tensor):
            return
        seconds = time.perf_counter() - vision_start_s
        here.vision_s += seconds
        here.vision_ops += vision_ops(model.config, grid.tolist())
        here.inside_s += seconds  # since transformers 5, `generate` encodes pictures before the forward

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True, always_call=True)
    vision = vision_tower(model)
    if isinstance(vision, torch.nn.Module):
        vision.register_forward_pre_hook(before_vision, with_kwargs=True)
        vision.register_forward_hook(after_vision, with_kwargs=True, always_call=True)


def rates_name(config: Any, codec: str, dtype: torch.dtype) -> str:
    """Name what the speed of a model depends on: equal shapes in equal formats take equal time."""
    text = config.get_text_config()
    vision: Any = getattr(config, "vision_config", None)
    shape = f"{text.num_hidden_layers}x{text.hidden_size}"
    if hasattr(vision, "depth"):
        shape += f" vision {vision.depth}x{vision.hidden_size}"
    return f"{config.model_type} {shape}, {codec}, {str(dtype).removeprefix('torch.')}"
