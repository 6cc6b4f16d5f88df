"""Run the vision tower in steps of rows, so that its widest parts do not set its transient memory.

A block's MLP is several times as wide as the rest, and rotating heads takes fp32 copies: together a quarter to a third
of an image's memory. Both treat each row separately, so they run here in steps of rows, with the weights kept in memory
meanwhile. The products are bit-identical to transformers. Attention still covers all rows at once; in fp32 with INT8
weights, the native core computes it in integers of 12 bits (docs/native.md). Patches in 16 bits are embedded by a
product, because torch's convolution takes up to 150 times as long: 1.3 s for 4,096 patches (0.4 s in fp32, which
stays bit-identical). A part that was replaced or has hooks runs as written.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...native import MOST_HEAD_SIZE, Core, core
from ...paging import ManagedTensor, runs_as_written, whole_linears
from ..compat import (
    PATCH_EMBEDDING,
    VISION_ATTENTION,
    VISION_MLP,
    attention_function,
    attention_name,
    is_original,
    rotate_vision_heads,
    vision_tower,
)

STEP_ROWS = 1024
"""Fewer would be slower, because weights are read from memory once per step."""


def step_vision_tower(model: Any) -> int:
    """Replace the forward of the patch embedding and, in vision blocks, of MLP and attention; return how many."""
    tower = vision_tower(model)
    embedding = getattr(tower, "patch_embed", None)
    if embedding is not None and _can_step(embedding, PATCH_EMBEDDING):
        embedding.forward = MethodType(_embed_patches, embedding)
    blocks = [
        block
        for block in getattr(tower, "blocks", ())
        if _can_step(block.mlp, VISION_MLP) and _can_step(block.attn, VISION_ATTENTION)
    ]
    for block in blocks:
        block.mlp.forward = MethodType(_mlp, block.mlp)
        block.attn.forward = MethodType(_attention, block.attn)
    return len(blocks)


def _can_step(part: nn.Module, name: str) -> bool:
    """Return whether a part is of this class of transformers, with its original forward."""
    return is_original(part, name) and "forward" not in part.__dict__


def _changed(part: nn.Module) -> bool:
    """Return whether a child of a part has hooks or a replaced forward."""
    return any(
        child._forward_hooks or child._forward_pre_hooks or "forward" in child.__dict__ for child in part.children()
    )


def _embed_patches(embedding: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    projection = embedding.proj
    unusual = type(projection) is not nn.Conv3d or projection.weight.dtype == torch.float32
    if unusual or _changed(embedding) or runs_as_written(embedding, hidden_states):
        return type(embedding).forward(embedding, hidden_states)
    weight = projection.weight
    patches = hidden_states.to(weight.dtype).view(-1, weight[0].numel())  # the kernel covers a patch
    return F.linear(patches, weight.flatten(1), projection.bias)


def _mlp(mlp: Any, hidden_state: torch.Tensor) -> torch.Tensor:
    steps = _steps(hidden_state)
    if len(steps) == 1 or _changed(mlp) or runs_as_written(mlp, hidden_state):
        return type(mlp).forward(mlp, hidden_state)
    out = torch.empty_like(hidden_state)
    with whole_linears((mlp.linear_fc1, mlp.linear_fc2)) as products:
        for rows in steps:
            if products is None:  # replaced, or no room for both weights: they are read again for each step
                out[rows] = type(mlp).forward(mlp, hidden_state[rows])
            else:
                widen, narrow = products
                out[rows] = narrow(mlp.act_fn(widen(hidden_state[rows])))
    return out


def _attention(
    attention: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> torch.Tensor:

    steps = _steps(hidden_states)
    native = _native_core(attention, hidden_states)
    unusual = position_embeddings is None or attention_name(attention.config) != "sdpa"
    as_written = unusual or _changed(attention) or runs_as_written(attention, hidden_states)
    if as_written or (len(steps) == 1 and native is None):
        return type(attention).forward(attention, hidden_states, cu_seqlens, position_embeddings, **kwargs)
    length = hidden_states.shape[0]
    heads = attention.qkv(hidden_states).view(length, 3, attention.num_heads, -1)
    assert position_embeddings is not None
    (cos, sin), rotate = position_embeddings, rotate_vision_heads()
    for rows in steps:
        query, key = rotate(heads[rows, 0], heads[rows, 1], cos[rows], sin[rows])
        heads[rows, 0], heads[rows, 1] = query, key
    attend = attention_function("sdpa")
    kwargs.pop("max_seqlen", None)
    attended = []
    bounds = cu_seqlens.tolist()
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        if native is not None:
            attended.append(native.attend_all(heads[start:stop], attention.scaling))
            continue
        part = heads[start:stop].permute(1, 2, 0, 3).unsqueeze(1)  # [3, 1, heads, rows, head_dim]
        found, _ = attend(
            attention,
            *part,
            attention_mask=None,
            scaling=attention.scaling,
            dropout=attention.attention_dropout if attention.training else 0.0,
            is_causal=False,
            **kwargs,
        )
        attended.append(found.reshape(stop - start, -1))
    del heads
    joined = attended[0] if len(attended) == 1 else torch.cat(attended)
    return attention.proj(joined)


def _native_core(attention: Any, hidden_states: torch.Tensor) -> Core | None:
    """Return the native core if it computes a block's attention: in fp32, where its weights are rounded anyway.

    In bf16, torch's attention is as fast.
    """
    weight = getattr(attention.qkv, "weight", None)  # it may have been replaced
    rounded = type(weight) is ManagedTensor and not weight.entry.codec.lossless
    size = attention.head_dim
    fits = size % 2 == 0 and size <= MOST_HEAD_SIZE and hidden_states.dtype == torch.float32
    dropped = attention.training and attention.attention_dropout
    return core() if rounded and fits and not dropped else None


def _steps(rows: torch.Tensor) -> list[slice]:
    """Return about equal parts of at least `STEP_ROWS` rows: a few rows would use another matrix kernel."""
    length = rows.shape[0]
    count = max(1, length // STEP_ROWS) if rows.dim() == 2 else 1
    bounds = [length * number // count for number in range(count + 1)]
    return [slice(start, stop) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
