"""KV codecs: blocks of tokens, encoded once, and attention computed on the encoded form.

A block holds the same tokens for `n` heads (batch times key-value heads): keys and values `[n, tokens, head_dim]`. Its
segments share one buffer. Attention over some blocks is a `Partial`. Partial results over disjoint tokens are merged
exactly (online softmax, arXiv:1805.02867, in the form of FlashAttention, arXiv:2205.14135).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch

from .base import Scratch, Segment

KV_CODECS = ("none", "int8", "int4")
DECODED_TOKENS = 1024
"""Tokens decoded per product; more would only increase the workspace."""


class Partial(NamedTuple):
    """Attention over some of the tokens.

    Attributes:
        out: `[n, M, head_dim]` fp32, normalised over these tokens.
        log_sum: `[n, M]` fp32, the logarithm of the sum of exponentials of the scores.
    """

    out: torch.Tensor
    log_sum: torch.Tensor


class KVBlock:
    """One encoded block: `segments` are named views of one buffer.

    Args:
        buffer: uint8 `[n_bytes]`.
        layout: the segments in the buffer.
    """

    def __init__(self, buffer: torch.Tensor, layout: Sequence[Segment]) -> None:
        self.segments: dict[str, torch.Tensor] = {}
        start = 0
        for segment in layout:
            part = buffer[start : start + segment.n_bytes]
            self.segments[segment.name] = part.view(segment.dtype).view(segment.shape)
            start += segment.n_bytes


class KVCodec(ABC):
    """Encodes a block and computes attention over blocks.

    Class attributes:
        name: the value of the setting `kv_codec`.
        lossless: whether decoding reproduces the same bits.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]

    @abstractmethod
    def layout(self, n: int, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Segment, ...]:
        """Return the segments of a block; each starts at a multiple of its item size."""

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor, block: KVBlock) -> None:
        """Write keys and values `[n, tokens, head_dim]` into a block.

        Raises:
            CodecError: values that this codec cannot represent.
        """

    @abstractmethod
    def decode(self, block: KVBlock, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the keys and values of a block into tensors `[n, tokens, head_dim]`."""

    def shape(self, block: KVBlock) -> tuple[int, int, int]:
        """Return `(n, tokens, head_dim)` of a block."""
        n, tokens, head_dim = block.segments["keys"].shape
        return n, tokens, head_dim

    def attend(
        self,
        query: torch.Tensor,
        blocks: Sequence[KVBlock],
        bias: Sequence[torch.Tensor | None],
        scale: float,
        scratch: Scratch,
    ) -> Partial:
        """Compute attention over whole blocks of one size, decoding some at a time.

        Args:
            query: `[n, M, head_dim]`.
            blocks: at least one.
            bias: for each block `None` or a term added to the scores, in the dtype of the query and in a shape that
                broadcasts to `[n, M, tokens]`.
            scale: factor of the scores.
            scratch: workspace.
        """
        n, tokens, head_dim = self.shape(blocks[0])
        size = max(1, DECODED_TOKENS // tokens)
        found: Partial | None = None
        for start in range(0, len(blocks), size):
            part = blocks[start : start + size]
            keys = scratch.get("keys", (n, tokens * len(part), head_dim), query.dtype)
            values = scratch.get("values", (n, tokens * len(part), head_dim), query.dtype)
            for block, key, value in zip(part, keys.split(tokens, 1), values.split(tokens, 1), strict=True):
                self.decode(block, key, value)
            added = _joined_bias(bias[start : start + size], tokens)
            found = merge_two(found, attend_plain(query, keys, values, added, scale))
        assert found is not None
        return found


def _joined_bias(bias: Sequence[torch.Tensor | None], tokens: int) -> torch.Tensor | None:
    """Return the combined bias of several blocks, or `None` if none has one."""
    there = next((each for each in bias if each is not None), None)
    if there is None:
        return None
    nothing = there.new_zeros(()).expand(*there.shape[:-1], tokens)
    return torch.cat([nothing if each is None else each for each in bias], dim=-1)


def attend_plain(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> Partial:
    """Compute attention of `query` `[n, M, head_dim]` over keys and values `[n, tokens, head_dim]` of any strides.

    `bias` broadcasts to `[n, M, tokens]`.
    """
    if bias is not None:
        bias = bias.expand(query.shape[0], query.shape[1], keys.shape[1])
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], keys[None], values[None], 0.0, False, attn_mask=None if bias is None else bias[None], scale=scale
    )
    # Some versions return `[1, n, M]` stored as `[1, M, n]`; indexing by shape handles both.
    return Partial(out[0].float(), log_sum[0].float())


def merge(parts: Sequence[Partial]) -> Partial:
    """Return attention over the tokens of all parts, which must be disjoint."""
    if len(parts) == 1:
        return parts[0]
    sums = torch.stack([part.log_sum for part in parts])
    total = torch.logsumexp(sums, dim=0)
    weights = (sums - total).exp_().nan_to_num_(0.0)  # a fully masked row gives -inf minus -inf
    out = torch.stack([part.out for part in parts])
    return Partial(out.mul_(weights[..., None]).sum(dim=0), total)


def attend_causal(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> Partial:
    """Compute causal attention of `query` `[n, tokens, head_dim]` over the same tokens."""
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], keys[None], values[None], 0.0, True, scale=scale
    )
    return Partial(out[0].float(), log_sum[0].float())


def merge_two(first: Partial | None, second: Partial) -> Partial:
    """Return attention over the tokens of both, which must be disjoint; `first` is overwritten."""
    if first is None:
        return second
    total = torch.logaddexp(first.log_sum, second.log_sum)
    for part in (first, second):
        # A fully masked row gives -inf minus -inf.
        part.out.mul_(part.log_sum.sub(total).exp_().nan_to_num_(0.0)[..., None])
    return Partial(first.out.add_(second.out), total)


class RawKV(KVCodec):
    """Unencoded keys and values."""

    name = "none"
    lossless = True

    def layout(self, n: int, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Segment, ...]:
        """Return `keys` and `values` `[n, tokens, head_dim]` in the compute dtype."""
        shape = (n, tokens, head_dim)
        return (Segment("keys", dtype, shape), Segment("values", dtype, shape))

    def encode(self, keys: torch.Tensor, values: torch.Tensor, block: KVBlock) -> None:
        """Copy."""
        block.segments["keys"].copy_(keys)
        block.segments["values"].copy_(values)

    def decode(self, block: KVBlock, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy."""
        keys.copy_(block.segments["keys"])
        values.copy_(block.segments["values"])

    def attend(
        self,
        query: torch.Tensor,
        blocks: Sequence[KVBlock],
        bias: Sequence[torch.Tensor | None],
        scale: float,
        scratch: Scratch,
    ) -> Partial:
        """Compute attention over one block at a time, in place."""
        found: Partial | None = None
        for block, added in zip(blocks, bias, strict=True):
            keys, values = block.segments["keys"], block.segments["values"]
            found = merge_two(found, attend_plain(query, keys, values, added, scale))
        assert found is not None
        return found
