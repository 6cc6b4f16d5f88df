"""How much transient memory a forward takes, told from its inputs before it runs."""

from __future__ import annotations

from typing import Any

import torch

from ..process import trim_heap
from .vision_steps import STEP_ROWS

FIXED_RESERVE_BYTES = 24 * 2**20
"""Thread stacks, the workspaces of torch's own kernels, code that is read on the way."""
_HEAP_SLACK_BYTES = 32 * 2**20
_HEAP_WASTE = 0.35
"""What the allocator keeps besides what is in use: a part of the peak, and at most so much while that is small."""
_QUANTUM_BYTES = 8 * 2**20
_MANY_TOKENS = 512
_LAYERS_A_TRIM = 4
"""From so many tokens on, layers compute for far longer than it takes to give the holes of some in the heap back."""


def estimate_activation_bytes(
    config: Any, *, tokens: int, logit_rows: int, patches: int, cached_tokens: int, itemsize: int, block_tokens: int = 0
) -> int:
    """Estimate the peak of transient memory of one forward.

    Args:
        config: of the model (text and, where there is one, vision part).
        tokens: rows of the text decoder (batch times new positions).
        logit_rows: rows of the language-model head.
        patches: rows of the vision tower.
        cached_tokens: positions in the KV cache, over the whole batch.
        itemsize: bytes of an activation.
        block_tokens: of the KV cache, where it accounts for itself: nothing of it is copied but a block and its tail.
    """
    text = config.get_text_config()
    hidden, inner = text.hidden_size, getattr(text, "intermediate_size", 4 * text.hidden_size)
    # The widest moment is the MLP: gate, up and their product, and that rotated and as two digits a value.
    peak = tokens * (8 * hidden * itemsize + inner * (3 * itemsize + 6))
    peak += logit_rows * text.vocab_size * (itemsize + 4)
    heads, head_dim = text.num_attention_heads, getattr(text, "head_dim", hidden // text.num_attention_heads)
    kv_heads = getattr(text, "num_key_value_heads", heads)
    kv_bytes = 2 * text.num_hidden_layers * kv_heads * head_dim * itemsize
    # New keys and values stay; one layer's are copied when they are appended, and repeated for its heads.
    kept_bytes = 0 if block_tokens else tokens * kv_bytes
    copied_tokens = tokens + (min(cached_tokens, 2 * block_tokens) if block_tokens else cached_tokens)
    peak += kept_bytes + copied_tokens * head_dim * itemsize * 2 * (2 * heads + kv_heads)
    peak += tokens * (tokens + cached_tokens) * (itemsize + 1)
    vision = getattr(config, "vision_config", None)
    if vision is not None and patches:
        width, wide = vision.hidden_size, vision.intermediate_size
        merged = width * vision.spatial_merge_size**2
        # Its MLP and the rotation of heads in fp32 take some rows after another (`vision_steps`).
        in_step = min(patches, 2 * STEP_ROWS - 1)
        peak += patches * (12 * width * itemsize + merged * itemsize) + in_step * wide * (2 * itemsize + 6)
    peak += int(_HEAP_WASTE * peak) + min(peak, _HEAP_SLACK_BYTES)
    return FIXED_RESERVE_BYTES + -(-peak // _QUANTUM_BYTES) * _QUANTUM_BYTES


def forward_size(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """Return the sizes that `estimate_activation_bytes` asks for, read off the arguments of a forward."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    embeds = kwargs.get("inputs_embeds")
    batch, length = 1, 1
    if isinstance(ids, torch.Tensor):
        batch, length = int(ids.shape[0]), int(ids.shape[-1])
    elif isinstance(embeds, torch.Tensor):
        batch, length = int(embeds.shape[0]), int(embeds.shape[1])
    keep = kwargs.get("logits_to_keep", 0)
    rows = length if not isinstance(keep, int) or keep == 0 else min(keep, length)
    cache = kwargs.get("cache")  # since transformers 5.24
    cache = kwargs.get("past_key_values") if cache is None else cache
    cached = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
    patches = 0
    for name in ("pixel_values", "pixel_values_videos"):
        pixels = kwargs.get(name)
        patches += int(pixels.shape[0]) if isinstance(pixels, torch.Tensor) else 0
    return {
        "tokens": batch * length,
        "logit_rows": batch * rows,
        "patches": patches,
        "cached_tokens": batch * cached,
        "block_tokens": batch * int(getattr(cache, "block_tokens", 0)),
    }


def reserve_before_forwards(model: Any, optimizer: Any, itemsize: int, *, lowers: bool = True) -> None:
    """Let a `MemoryOptimizer` set aside what each forward of a model takes, before it runs.

    Args:
        model: gets the hooks.
        optimizer: reserves.
        itemsize: bytes of an activation.
        lowers: a forward that takes less than the one before gives the difference back.
    """

    def reserve(n_bytes: int, *, lowers: bool) -> None:
        held = 0 if lowers else optimizer.pager.ledger.held_bytes("activations")
        optimizer.reserve_activations(max(n_bytes, held))

    def before_model(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A draft runs between forwards of the model: what it lowered, weights would fill and have to leave again.
        size = forward_size(module, args, kwargs)
        reserve(estimate_activation_bytes(module.config, itemsize=itemsize, **size), lowers=lowers)

    def before_vision(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # `generate` runs the vision tower ahead of the forward of the model; a forward runs it inside its own.
        patches = int((args[0] if args else kwargs["hidden_states"]).shape[0])
        size = {"tokens": 0, "logit_rows": 0, "cached_tokens": 0, "patches": patches}
        reserve(estimate_activation_bytes(model.config, itemsize=itemsize, **size), lowers=False)

    def after_layer(module: Any, args: tuple[Any, ...], output: Any) -> None:
        # Its keys and values stay, between what it computed with: with each layer the heap would grow by such holes.
        if args and args[0].shape[:-1].numel() >= _MANY_TOKENS:
            trim_heap()

    after_layer.changes_nothing = True  # type: ignore[attr-defined]
    model.register_forward_pre_hook(before_model, with_kwargs=True)
    for layer in list(getattr(model.get_decoder(), "layers", ()))[::_LAYERS_A_TRIM]:
        layer.register_forward_hook(after_layer)
    vision = getattr(getattr(model, "model", None), "visual", None)
    if vision is not None:
        vision.register_forward_pre_hook(before_vision, with_kwargs=True)
