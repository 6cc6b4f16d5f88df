"""How much transient memory a forward takes, told from its inputs before it runs."""

from __future__ import annotations

from typing import Any

import torch

FIXED_RESERVE_BYTES = 24 * 2**20
"""Thread stacks, the workspaces of torch's own kernels, code that is read on the way."""
_HEAP_SLACK_BYTES = 32 * 2**20
_HEAP_WASTE = 0.35
"""What the allocator keeps besides what is in use: a part of the peak, and at most so much while that is small."""
_QUANTUM_BYTES = 8 * 2**20


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
    # The widest moment is the MLP: gate, up and their product, plus int32/fp32 forms of one of them.
    peak = tokens * (8 * hidden * itemsize + inner * (3 * itemsize + 12))
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
        peak += patches * (10 * width * itemsize + wide * (2 * itemsize + 12) + merged * itemsize)
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
