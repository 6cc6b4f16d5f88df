"""Compute the memory that a run needs from its sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..kv.sizes import BLOCK_TOKENS, FEW_TOKENS, TAIL_TOKENS
from ..layers.forward_memory import feature_bytes, text_bytes, vision_bytes, with_heap

LEAST_PIECE_TOKENS = 64
"""The smallest prompt piece."""
STREAMED_BYTES = 32 << 20
"""Pages of weights, keys and values that are in memory while in use or being prefetched."""
PROCESS_BYTES = 360 << 20
"""Interpreter, torch, transformers and their code (330 MB measured), plus small weight vectors."""
WORKSPACE_BYTES = 48 << 20
"""Workspace of matrix products and attention (16 to 40 MB measured)."""
_KERNEL_SHARE = 64


@dataclass(frozen=True, slots=True)
class RunNeeds:
    """The memory needs of a run.

    Attributes:
        prompt_tokens, new_tokens, rows: tokens per sequence, and number of sequences.
        transient_bytes: peak of its passes, with the smallest pieces.
        pinned_bytes: non-evictable keys and values: the tails.
        blocks_bytes: keys and values that may be on the SSD.
        streamed_bytes: weights and blocks that are in memory while in use or being prefetched.
    """

    prompt_tokens: int
    new_tokens: int
    rows: int
    transient_bytes: int
    pinned_bytes: int
    blocks_bytes: int
    streamed_bytes: int = STREAMED_BYTES

    @property
    def memory_bytes(self) -> int:
        """What must be free besides the process and its workspace."""
        return self.transient_bytes + self.pinned_bytes + self.streamed_bytes


def run_needs(
    config: Any,
    *,
    prompt_tokens: int,
    new_tokens: int,
    rows: int = 1,
    patches: int = 0,
    itemsize: int = 4,
    tail_itemsize: int = 2,
    block_tokens: int = BLOCK_TOKENS,
    token_bytes: float | None = None,
    piece: int = LEAST_PIECE_TOKENS,
    masked: bool = False,
) -> RunNeeds:
    """Compute the memory needs of a run from its sizes.

    Args:
        config: of the model.
        prompt_tokens, new_tokens, rows: see `RunNeeds`.
        patches: rows of the vision tower's input.
        itemsize: bytes per activation; `tail_itemsize`: bytes per number in a tail.
        block_tokens: tokens per KV block.
        token_bytes: encoded keys and values of all layers, per token; default: INT8.
        piece: tokens per prompt piece.
        masked: sequences are padded.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    head_dim = getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    numbers = 2 * text.num_hidden_layers * heads * head_dim
    total = prompt_tokens + new_tokens
    vision = getattr(config, "vision_config", None)
    shown = patches // vision.spatial_merge_size**2 if vision is not None else 0
    features = feature_bytes(config, tokens=shown, itemsize=itemsize)
    text_peak = text_bytes(
        config,
        tokens=min(piece, prompt_tokens) * rows,
        logit_rows=rows,
        itemsize=itemsize,
        cached_tokens=prompt_tokens,
        masked=masked,
    )
    peak = max(vision_bytes(config, patches=patches, itemsize=itemsize), text_peak) + features
    tail_tokens = min(total, block_tokens + TAIL_TOKENS + FEW_TOKENS)
    per_token = numbers * (1 + 4 / head_dim) if token_bytes is None else token_bytes
    return RunNeeds(
        prompt_tokens,
        new_tokens,
        rows,
        with_heap(peak),
        # A tail grows by copying, so one old and one new copy exist for a moment.
        math.ceil(rows * tail_tokens * numbers * tail_itemsize * (1 + 1 / text.num_hidden_layers)),
        math.ceil(max(0, total - TAIL_TOKENS) * rows * per_token),
    )


def least_budget_bytes(config: Any, **sizes: Any) -> int:
    """Return the smallest `ram_budget` that admits a run, within a few percent; see `run_needs` for `sizes`."""
    needed = PROCESS_BYTES + WORKSPACE_BYTES + run_needs(config, **sizes).memory_bytes
    return needed * _KERNEL_SHARE // (_KERNEL_SHARE - 1)
