"""Estimate the transient memory of a forward from its inputs before it runs."""

from __future__ import annotations

from typing import Any

from .vision_block import STEP_ROWS

FIXED_RESERVE_BYTES = 24 * 2**20
"""Thread stacks, workspaces of torch's kernels, and code paged in on the way."""
_HEAP_SLACK_BYTES = 32 * 2**20
_HEAP_WASTE = 0.35
"""Allocator overhead: a share of the peak, plus up to `_HEAP_SLACK_BYTES`."""
_QUANTUM_BYTES = 8 * 2**20
_MASKED_ROWS = 512


def text_bytes(
    config: Any, *, tokens: int, logit_rows: int, itemsize: int, cached_tokens: int = 0, masked: bool = False
) -> int:
    """Estimate the peak transient memory of a text decoder forward over a cache in blocks.

    Args:
        config: of the model.
        tokens: rows of the decoder (batch times new positions).
        logit_rows: rows of the language-model head.
        itemsize: bytes per activation.
        cached_tokens: cached positions per sequence.
        masked: the mask hides more than later tokens: padding.
    """
    text = config.get_text_config()
    hidden, inner = text.hidden_size, getattr(text, "intermediate_size", 4 * text.hidden_size)
    heads, head_dim = text.num_attention_heads, getattr(text, "head_dim", hidden // text.num_attention_heads)
    kv_heads = getattr(text, "num_key_value_heads", heads)
    # The MLP is widest: gate, up and their product, and the product rotated (without the native core) and as integers.
    peak = tokens * (8 * hidden * itemsize + inner * (3 * itemsize + 6))
    # In attention: q, k, v before and after the rotary embedding, and two partial results in fp32.
    attending = tokens * head_dim * ((2 * heads + 3 * kv_heads) * itemsize + 3 * heads * 4)
    peak = max(peak, attending + tokens * 4 * hidden * itemsize)
    peak += logit_rows * text.vocab_size * (itemsize + 4)
    if masked:
        rows = min(tokens, _MASKED_ROWS)
        peak += (tokens + cached_tokens) * rows * (1 + itemsize * (1 + heads // kv_heads))
    return peak


def whole_prompt_bytes(config: Any, *, tokens: int, itemsize: int, cached_tokens: int = 0) -> int:
    """Estimate the additional memory of a forward if transformers keeps keys and values.

    New keys and values stay; one layer's are copied when appended, and repeated for its heads.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", text.hidden_size // heads)
    kv_heads = getattr(text, "num_key_value_heads", heads)
    kept = tokens * 2 * text.num_hidden_layers * kv_heads * head_dim * itemsize
    copied = (tokens + cached_tokens) * head_dim * itemsize * 2 * (2 * heads + kv_heads)
    return kept + copied + tokens * (tokens + cached_tokens) * (itemsize + 1)


def vision_bytes(config: Any, *, patches: int, itemsize: int) -> int:
    """Estimate the peak transient memory of the vision tower."""
    vision = getattr(config, "vision_config", None)
    if vision is None or not patches:
        return 0
    width, wide = vision.hidden_size, vision.intermediate_size
    merged = width * vision.spatial_merge_size**2
    # Its MLP, and the rotation of heads in fp32, process rows in steps (`vision_block`).
    in_step = min(patches, 2 * STEP_ROWS - 1)
    return patches * (12 * width * itemsize + merged * itemsize) + in_step * wide * (2 * itemsize + 6)


def feature_bytes(config: Any, *, tokens: int, itemsize: int) -> int:
    """Return the bytes of image and video features, including DeepStack, which stay until the prompt is processed."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return 0
    levels = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    return tokens * vision.out_hidden_size * levels * itemsize


def with_heap(peak_bytes: int) -> int:
    """Return the bytes to reserve for a peak: adds the allocator overhead and the fixed cost of every forward."""
    peak = peak_bytes + int(_HEAP_WASTE * peak_bytes) + min(peak_bytes, _HEAP_SLACK_BYTES)
    return FIXED_RESERVE_BYTES + -(-peak // _QUANTUM_BYTES) * _QUANTUM_BYTES
