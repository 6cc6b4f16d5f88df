"""Run decoder layers for a few tokens in the native core: one call instead of about forty operations of torch a layer.

Where everything is in memory, the second layer computes all that follow it, and those return what it found: Python
between layers would find neither its code nor its data in the caches, because the weights passed through them. If not,
each layer is computed for itself; by torch's operations where one of its weights is not in memory, or something is of
an unknown kind.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ...native import DTYPES, Core, Layer
from ...paging import ManagedTensor
from ..compat import cache_of
from ..kv.attention import CachedStates, attention_forward
from ..kv.layer import ManagedKVLayer
from ..kv.native import TokenAddresses, held_blocks
from ..kv.sizes import FEW_TOKENS

_Factors = tuple[torch.Tensor, torch.Tensor]


class NativeLayers:
    """The decoder layers of one model, prepared for the native core.

    Args:
        decoder: the text model of transformers.
        whole: returns whether no part of a layer, nor its forward, was replaced or has hooks.
    """

    def __init__(self, decoder: nn.Module, whole: Callable[[nn.Module], bool]) -> None:
        self._decoder = weakref.ref(decoder)  # which holds this object through its layers
        self._whole = whole
        self._local = threading.local()
        self._watch_passes(decoder)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return `None`: a copied layer has weights of its own, plain ones, which torch multiplies."""
        return None

    def _watch_passes(self, decoder: nn.Module) -> None:
        """Note during a pass of the decoder whether it adds nothing between its layers."""
        local = self._local

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            local.plain, local.ahead = kwargs.get("deepstack_visual_embeds") is None, None

        def after(module: Any, args: Any, output: Any) -> None:
            local.plain, local.ahead = False, None

        before.changes_nothing = after.changes_nothing = True  # type: ignore[attr-defined]
        decoder.register_forward_pre_hook(before, with_kwargs=True)
        decoder.register_forward_hook(after, always_call=True)

    def run(
        self, native: Core, index: int, hidden: torch.Tensor, position_embeddings: _Factors, kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """Return the output of layer `index`, `[batch, tokens, columns]`, or `None` with nothing changed.

        The last layer's output is returned for each layer that was computed ahead.

        Args:
            native: the native core.
            index: of the layer.
            hidden: its input; the tokens are the newest, and see all before them.
            position_embeddings: cosine and sine, `[batch, tokens, head_dim]`.
            kwargs: of the layer's forward, the cache among them.
        """
        ahead = getattr(self._local, "ahead", None)
        if ahead is not None and ahead[0] == index and ahead[1] is hidden:
            self._local.ahead = (index + 1, hidden)
            return hidden
        self._local.ahead = None
        cache: Any = cache_of(kwargs)
        decoder: Any = self._decoder()
        if hidden.shape[0] * hidden.shape[1] > FEW_TOKENS or hidden.dtype not in DTYPES or cache is None:
            return None
        if decoder is None or not isinstance(cache.layers[index], ManagedKVLayer):
            return None
        built = getattr(self._local, "built", None)
        if built is None or not built.fits(hidden, decoder.layers):
            built = self._local.built = _Built(decoder.layers, hidden)
        if not built.complete:
            return None
        factors = _fp32(position_embeddings)
        if index == 1 and getattr(self._local, "plain", False):
            stop = len(built.layers)
            # The first layer was computed for itself, so that a pass begins with nothing held: it may have to evict.
            if all(self._whole(layer) for layer in decoder.layers[index:]):
                output = built.run(native, index, stop, hidden, factors, cache)
                if output is not None:
                    self._local.ahead = (index + 1, output)
                    return output
        return built.run(native, index, index + 1, hidden, factors, cache)


class _Built:
    """Structures of the native core for all layers and inputs of one shape."""

    def __init__(self, modules: Sequence[Any], hidden: torch.Tensor) -> None:
        self._shape, self._dtype = hidden.shape, hidden.dtype
        linears = [part for module in modules for group in _products(module) for part in group]
        self._weights = [(part._parameters, part._parameters["weight"]) for part in linears]
        norms = [norm._parameters for module in modules for norm in _norms(module)]
        self._norms = [(parameters, _state(parameters["weight"])) for parameters in norms]
        self._attentions = [module.self_attn for module in modules]
        self.layers = (Layer * len(modules))()
        self._addresses = [TokenAddresses() for _ in modules]
        self._kept: list[torch.Tensor] = []
        self._groups: list[list[list[Any]]] = []
        weights = [[[part.weight for part in group] for group in _products(module)] for module in modules]
        self.complete = all(type(each) is ManagedTensor for groups in weights for group in groups for each in group)
        if self.complete:
            self._groups = [[[weight.entry for weight in group] for group in groups] for groups in weights]
            self._pager = weights[0][0][0].pager
            for module, layer in zip(modules, self.layers, strict=True):
                self._describe(module, layer)

    def fits(self, hidden: torch.Tensor, modules: Sequence[Any]) -> bool:
        """Return whether the structures are those of such an input and of the layers' present parameters."""
        same = hidden.shape == self._shape and hidden.dtype == self._dtype and len(modules) == len(self.layers)
        return (
            same
            and all(parameters["weight"] is weight for parameters, weight in self._weights)
            and all(_state(parameters["weight"]) == state for parameters, state in self._norms)
        )

    def _describe(self, module: Any, layer: Any) -> None:
        attention, (batch, length, columns) = module.self_attn, self._shape
        size = attention.head_dim
        start, middle, end = layer.start, layer.attention, layer.end
        dtype = DTYPES[self._dtype]
        start.dtype, start.sequences, start.length, start.columns = dtype, batch, length, columns
        start.norm = self._norm(module.input_layernorm)
        start.query_heads, start.key_heads = (
            part.out_features // size for part in (attention.q_proj, attention.k_proj)
        )
        start.head_size = size
        start.query_norm, start.key_norm = self._norm(attention.q_norm), self._norm(attention.k_norm)
        start.norm_epsilon = module.input_layernorm.variance_epsilon
        start.head_epsilon = attention.q_norm.variance_epsilon
        middle.sequences, middle.length, middle.head_size = batch, length, size
        middle.query_heads, middle.key_heads = start.query_heads, start.key_heads
        middle.scale = attention.scaling
        end.norm = self._norm(module.post_attention_layernorm)
        end.norm_epsilon = module.post_attention_layernorm.variance_epsilon
        end.rows, end.columns, end.dtype = batch * length, columns, dtype
        weights = (start.weight, end.attention, end.gate_up, end.down)
        for weight, group in zip(weights, _products(module), strict=True):
            weight.rows, weight.columns = sum(part.out_features for part in group), group[0].in_features

    def _norm(self, norm: Any) -> int:
        """Return the address of a norm's weight in fp32."""
        self._kept.append(norm.weight.detach().to(torch.float32, copy=True).contiguous())
        return self._kept[-1].data_ptr()

    def run(
        self, native: Core, first: int, stop: int, hidden: torch.Tensor, factors: _Factors, cache: Any
    ) -> torch.Tensor | None:
        """Return the output of layer `stop` - 1, or `None` with nothing changed if something is not in memory."""
        tokens = cache.layers[first:stop]
        alone = stop - first == 1
        knows = [each.is_initialized and each.attends_over_blocks for each in tokens]
        natively = all(TokenAddresses.knows(each) for each in tokens) if all(knows) else False
        if not all(knows) or not (natively or alone):
            return None
        products = self._pager.products
        # All memory first: what is held below cannot make room.
        for each in tokens:
            each.make_room(hidden.shape[1])
        self._workspace(native, first, products.scratch)
        groups = [group for layer in self._groups[first:stop] for group in layer]
        with products.held(groups) as encoded:
            if encoded is None or not self._set_weights(first, encoded):
                return None
            with held_blocks(tokens) if natively else nullcontext(False) as there:
                if not there and not alone:
                    return None
                output = self._run_held(native, first, stop, hidden.contiguous(), factors, tokens, natively=there)
        for each in tokens:
            each.settle()  # with nothing held: it may have to make room
        return output

    def _run_held(
        self,
        native: Core,
        first: int,
        stop: int,
        hidden: torch.Tensor,
        factors: _Factors,
        tokens: Sequence[ManagedKVLayer],
        *,
        natively: bool,
    ) -> torch.Tensor:
        """Run layers whose weights are held; `natively`: their attention too, whose blocks are held."""
        out = torch.empty_like(hidden)
        query, attended = self._connect(native, first, stop, hidden, out, factors, self._pager.products.scratch)
        for index, each in zip(range(first, stop), tokens, strict=True):
            layer = self.layers[index]
            self._addresses[index].extend(each, hidden.shape[1], layer.start)
            if natively:
                self._addresses[index].describe(each, layer.start, layer.attention)
        if natively:
            native.run_layers(self.layers, first, stop)
        else:
            self._run_apart(native, first, query, attended, tokens[0])
        return out

    def _run_apart(
        self, native: Core, index: int, query: torch.Tensor, attended: torch.Tensor, tokens: ManagedKVLayer
    ) -> None:
        """Run a layer whose attention is torch's."""
        layer, attention = self.layers[index], self._attentions[index]
        native.run(layer.start)
        states = CachedStates(tokens)
        heads = query.transpose(1, 2).to(self._dtype)
        found, _ = attention_forward(attention, heads, states, states, None, scaling=attention.scaling)
        attended.copy_(found.reshape(attended.shape))
        native.run(layer.end)

    def _set_weights(self, first: int, encoded: Sequence[Any]) -> bool:
        """Write the addresses of the weights, which never change; return whether the native core knows their codecs."""
        for number, (codec, rows) in enumerate(encoded):
            layer = self.layers[first + number // 4]
            owner, name = (
                (layer.start, "weight"),
                (layer.end, "attention"),
                (layer.end, "gate_up"),
                (layer.end, "down"),
            )[number % 4]
            if getattr(owner, name).data:
                continue
            weight = codec.native_weight(rows)
            if weight is None:
                return False
            setattr(owner, name, weight)
        return True

    def _connect(
        self,
        native: Core,
        first: int,
        stop: int,
        hidden: torch.Tensor,
        out: torch.Tensor,
        factors: _Factors,
        scratch: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let each layer read what the one before writes; return the memory of query and attention."""
        query, attended, work = self._workspace(native, first, scratch)
        source = hidden.data_ptr()
        for layer in self.layers[first:stop]:
            start, middle, end = layer.start, layer.attention, layer.end
            start.hidden = end.hidden = source
            start.cosine, start.sine = factors[0].data_ptr(), factors[1].data_ptr()
            start.query = middle.query = query.data_ptr()
            middle.out = end.attended = attended.data_ptr()
            start.work = end.work = work.data_ptr()
            source = end.out = out.data_ptr()
        return query, attended

    def _workspace(self, native: Core, index: int, scratch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return memory for the query and the attention, fp32 `[batch, tokens, heads, head_dim]`, and for the rest."""
        start, end = self.layers[index].start, self.layers[index].end
        shape = (2, start.sequences, start.length, start.query_heads, start.head_size)
        query, attended = scratch.get("native states", shape, torch.float32)
        work_bytes = max(native.work_bytes(start), native.work_bytes(end))
        return query, attended, scratch.get("native work", (work_bytes,), torch.uint8)


def _products(module: Any) -> list[tuple[Any, ...]]:
    """Return the linear layers by product: query, key and value; output; gate and up; down."""
    attention, mlp = module.self_attn, module.mlp
    return [
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    ]


def _norms(module: Any) -> list[Any]:
    attention = module.self_attn
    return [module.input_layernorm, module.post_attention_layernorm, attention.q_norm, attention.k_norm]


def _state(weight: torch.Tensor) -> tuple[int, int, torch.dtype]:
    """Return what changes if a weight is replaced, written to or converted."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.dtype


def _fp32(position_embeddings: _Factors) -> _Factors:
    """Return cosine and sine in fp32, contiguous, converted once per pass."""
    cosine, sine = position_embeddings
    kept = getattr(sine, "_native_factors", None)
    if kept is None or kept[0] is not cosine:
        kept = (cosine, cosine.float().contiguous(), sine.float().contiguous())
        sine._native_factors = kept  # type: ignore[attr-defined]
    return kept[1], kept[2]
