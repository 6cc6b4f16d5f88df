"""Run decoder layers with fewer, larger operations; optionally replaces the forward of transformers.

A decode step of a small model spends a third of its time between matrix products. Here q, k and v are one product, and
so are gate and up (see `paging.joined`). Query and key heads are normalized and rotated together, and private results
are updated in place. Modules, parameters and hooks stay those of transformers. A layer runs transformers' own forward
if one of its parts was replaced or has hooks (`output_attentions`, a user's own), or if it needs gradients. Results
differ by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ...native import core
from ...paging import linear_joined, runs_as_written
from ..compat import (
    DECODER_LAYER,
    attention_function,
    attention_name,
    base_of,
    cache_name,
    is_original,
    text_decoder,
    watches,
)
from .bypassed import Bypassed

if TYPE_CHECKING:
    from .native_layers import NativeLayers

_PARTS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


def joined_names(weights: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of weight names that `fuse_layers` multiplies together and that should be adjacent."""
    known = dict.fromkeys(weights)
    groups = []
    for part, names in _PARTS:
        first = f".{part}.{names[0]}.weight"
        for weight in known:
            if weight.endswith(first):
                prefix = weight.removesuffix(first)
                groups.append(tuple(f"{prefix}.{part}.{name}.weight" for name in names))
    return [group for group in groups if all(name in known for name in group)]


def fuse_layers(model: nn.Module) -> int:
    """Replace the forward of each supported decoder layer; return how many."""
    layers = [layer for layer in model.modules() if _can_fuse(layer)]
    decoder = text_decoder(model) or base_of(model)
    native = None
    if core() is not None and layers and list(getattr(decoder, "layers", ())) == layers:
        from .native_layers import NativeLayers  # imports transformers' caches, which come with its models

        native = NativeLayers(decoder, _is_whole)
    for layer in layers:
        layer._fused = _FusedLayer(layer, native)  # type: ignore[assignment]
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def _can_fuse(layer: Any) -> bool:
    """Return whether this is a known decoder layer, in the configuration of Qwen3-VL."""
    if not is_original(layer, DECODER_LAYER):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    linears = [getattr(getattr(layer, part), name) for part, names in _PARTS for name in names]
    return (
        all(type(linear) is nn.Linear and linear.bias is None for linear in linears)
        and mlp.config.hidden_act == "silu"
        and attention.q_norm.variance_epsilon == attention.k_norm.variance_epsilon
    )


def _is_whole(layer: Any) -> bool:
    """Return whether the native core may compute a layer without calling it: no part was replaced or has hooks."""
    fused, forward = layer._fused, layer.__dict__.get("forward")
    if not isinstance(forward, MethodType) or forward.__func__ is not _forward or layer.training:
        return False
    hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
    return not (any(map(watches, hooks)) or fused.bypassed.changed() or fused.called.changed())


class _FusedLayer:
    """The additional state of a layer's fused forward.

    Args:
        layer: the module of transformers.
        native: computes few tokens of it and of the other layers; `None`: torch does.
    """

    def __init__(self, layer: Any, native: NativeLayers | None) -> None:
        attention = layer.self_attn
        self.bypassed = Bypassed(
            (layer, ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")),
            (attention, ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")),
            (layer.mlp, ("gate_proj", "up_proj", "act_fn")),
        )
        self.n_query = attention.q_proj.out_features // attention.head_dim
        self.n_key = attention.k_proj.out_features // attention.head_dim
        self._head_weight: tuple[Any, Any, torch.Tensor] | None = None
        self.called = Bypassed((attention, ("o_proj",)), (layer.mlp, ("down_proj",)))  # except by the native core
        self.native = native

    def head_weight(self, attention: Any) -> torch.Tensor:
        """Return the norm weights of query and key heads, `[heads, head_dim]`."""
        query, key = attention.q_norm.weight, attention.k_norm.weight
        if self._head_weight is None or self._head_weight[0] is not query or self._head_weight[1] is not key:
            rows = torch.cat((query.expand(self.n_query, -1), key.expand(self.n_key, -1)))
            self._head_weight = (query, key, rows)
        return self._head_weight[2]


def _forward(
    layer: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    fused: _FusedLayer = layer._fused
    if fused.bypassed.changed() or runs_as_written(layer, hidden_states):
        return type(layer).forward(
            layer,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
    native = core() if fused.native is not None and attention_mask is None and not layer.training else None
    if native is not None and fused.native is not None and not fused.called.changed():
        index = layer.self_attn.layer_idx
        output = fused.native.run(native, index, hidden_states, position_embeddings, kwargs)
        if output is not None:
            return output
    mlp = layer.mlp
    normed = _rms_norm(hidden_states, layer.input_layernorm)
    attended = _attention(layer.self_attn, fused, normed, position_embeddings, attention_mask, kwargs)
    hidden_states = attended.add_(hidden_states)
    normed = _rms_norm(hidden_states, layer.post_attention_layernorm)
    gate, up = linear_joined(normed, (mlp.gate_proj.weight, mlp.up_proj.weight)).chunk(2, dim=-1)
    return mlp.down_proj(F.silu(gate).mul_(up)).add_(hidden_states)


def _attention(
    attention: Any,
    fused: _FusedLayer,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    batch, length, _ = hidden_states.shape
    size, n_rotated = attention.head_dim, fused.n_query + fused.n_key
    weights = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    heads, value = (
        linear_joined(hidden_states, weights).view(batch, length, -1, size).split((n_rotated, fused.n_key), 2)
    )
    rotated = F.rms_norm(heads, (size,), None, attention.q_norm.variance_epsilon)
    rotated = rotated.mul_(fused.head_weight(attention)).transpose(1, 2)
    cos, signed_sin = _rotary_factors(position_embeddings)
    rotated = torch.mul(rotated, cos).addcmul_(rotated.roll(size // 2, -1), signed_sin)
    query, key = rotated.split((fused.n_query, fused.n_key), 1)
    value = value.transpose(1, 2)
    name = cache_name(kwargs)
    cache = kwargs.get(name)
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
        if length == 1 and attention_mask is None and not (attention.training or isinstance(key, torch.Tensor)):
            row = key.attend_row(query, attention.scaling)
            if row is not None:
                return attention.o_proj(row)
    attend = attention_function(attention_name(attention.config))
    attended, _ = attend(
        attention,
        query,
        key,
        value,
        attention_mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        **{key: value for key, value in kwargs.items() if key != name},
    )
    return attention.o_proj(attended.reshape(batch, length, -1))


def _rms_norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    columns = x.shape[-1]
    if x.numel() > columns:
        return F.rms_norm(x, (columns,), norm.weight, norm.variance_epsilon)
    row = x.float()  # one token: a third of the operations
    mean_square = float(torch.linalg.vector_norm(row)) ** 2 / columns
    return norm.weight * (row * (1 / math.sqrt(mean_square + norm.variance_epsilon))).to(x.dtype)


def _rotary_factors(position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin `[batch, 1, length, head_dim]` for `x * cos + roll(x, half) * sin`, built once per pass."""
    cos, sin = position_embeddings
    factors = getattr(sin, "_rotary_factors", None)
    if factors is None or factors[2] is not cos:
        half = sin.shape[-1] // 2
        factors = (cos.unsqueeze(1), torch.cat((-sin[..., :half], sin[..., half:]), dim=-1).unsqueeze(1), cos)
        sin._rotary_factors = factors  # type: ignore[attr-defined]
    return factors[0], factors[1]
