"""Run the vision tower in steps of rows, so that its widest parts do not set its transient memory.

A block's MLP is several times as wide as the rest, and rotating heads takes fp32 copies: together a quarter to a third
of an image's memory. Both treat each row separately, so they run here in steps of rows, with the weights kept in memory
meanwhile. The products are bit-identical to transformers. Attention still covers all rows at once. A part that was
replaced or has hooks runs as written.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from ...paging import runs_as_written, whole_linears
from ..compat import attention_function, attention_name, rotate_vision_heads, vision_tower

STEP_ROWS = 1024
"""Fewer would be slower, because weights are read from memory once per step."""


def step_vision_tower(model: Any) -> int:
    """Replace the forward of MLP and attention in supported vision blocks; return the number of blocks."""
    tower = vision_tower(model)
    blocks = [
        block
        for block in getattr(tower, "blocks", ())
        if _is_known(block.mlp, "Qwen3VLVisionMLP") and _is_known(block.attn, "Qwen3VLVisionAttention")
    ]
    for block in blocks:
        block.mlp.forward = MethodType(_mlp, block.mlp)
        block.attn.forward = MethodType(_attention, block.attn)
    return len(blocks)


def _is_known(part: nn.Module, name: str) -> bool:
    """Return whether a part is the transformers class with its original forward."""
    kind = type(part)
    return kind.__name__ == name and kind.__module__.split(".")[0] == "transformers" and "forward" not in part.__dict__


def _changed(part: nn.Module) -> bool:
    """Return whether a child of a part has hooks or a replaced forward."""
    return any(
        child._forward_hooks or child._forward_pre_hooks or "forward" in child.__dict__ for child in part.children()
    )


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
    name = attention_name(attention.config)
    unusual = position_embeddings is None or name != "sdpa"
    if len(steps) == 1 or unusual or _changed(attention) or runs_as_written(attention, hidden_states):
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
        attended.append(found)
    del heads
    joined = attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)
    return attention.proj(joined.reshape(length, -1))


def _steps(rows: torch.Tensor) -> list[slice]:
    """Return about equal parts of at least `STEP_ROWS` rows: a few rows would use another matrix kernel."""
    length = rows.shape[0]
    count = max(1, length // STEP_ROWS) if rows.dim() == 2 else 1
    bounds = [length * number // count for number in range(count + 1)]
    return [slice(start, stop) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
