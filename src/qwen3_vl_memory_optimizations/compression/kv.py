"""Codecs of keys and values: blocks of tokens, encoded once, and attention computed on the encoded form.

A block holds the same tokens of `n` heads (batch times key-value heads): keys and values `[n, tokens, head_dim]`. Its
segments lie in one buffer. Attention over some blocks is a `Partial`, and partial results over disjoint tokens are
merged exactly (online softmax, arXiv:1805.02867; the form used here is that of FlashAttention, arXiv:2205.14135).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch

from ..errors import ConfigurationError
from .base import Scratch, Segment
from .kernels import KernelSelector

KV_CODECS = ("none", "int8", "int4")


class Partial(NamedTuple):
    """Attention over a part of the tokens.

    Attributes:
        out: `[n, M, head_dim]` fp32, normalised over these tokens.
        log_sum: `[n, M]` fp32, the logarithm of the sum of exponentials of the scores.
    """

    out: torch.Tensor
    log_sum: torch.Tensor


class KVBlock:
    """One encoded block: `segments` are views of one buffer, by name.

    Args:
        buffer: uint8 `[n_bytes]`.
        layout: of the buffer.
    """

    def __init__(self, buffer: torch.Tensor, layout: Sequence[Segment]) -> None:
        self.segments: dict[str, torch.Tensor] = {}
        start = 0
        for segment in layout:
            part = buffer[start : start + segment.n_bytes]
            self.segments[segment.name] = part.view(segment.dtype).view(segment.shape)
            start += segment.n_bytes


class KVCodec(ABC):
    """Encodes a block and attends over blocks.

    Class attributes:
        name: the value of the setting `kv_codec`.
        lossless: whether decoding gives the same bits.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]

    @abstractmethod
    def layout(self, n: int, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Segment, ...]:
        """Return the segments of a block; each begins at a multiple of its item size."""

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor, block: KVBlock) -> None:
        """Write keys and values `[n, tokens, head_dim]` into a block.

        Raises:
            CodecError: values that this codec cannot represent.
        """

    @abstractmethod
    def decode(self, block: KVBlock, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the keys and values of a block into tensors `[n, tokens, head_dim]`."""

    def decoded(self, block: KVBlock, dtype: torch.dtype, scratch: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values `[n, tokens, head_dim]` in scratch memory."""
        n, tokens, head_dim = self.shape(block)
        keys = scratch.get("keys", (n, tokens, head_dim), dtype)
        values = scratch.get("values", (n, tokens, head_dim), dtype)
        self.decode(block, keys, values)
        return keys, values

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
        """Attend over whole blocks, decoding one at a time.

        Args:
            query: `[n, M, head_dim]`.
            blocks: at least one.
            bias: for each block `None` or `[n, M, tokens]` (or what broadcasts to it) to add to the scores, in the
                dtype of the query.
            scale: of the scores.
            scratch: workspace.
        """
        parts = []
        for block, added in zip(blocks, bias, strict=True):
            keys, values = self.decoded(block, query.dtype, scratch)
            parts.append(attend_plain(query, keys, values, added, scale))
        return merge(parts)


def attend_plain(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> Partial:
    """Attend with `query` `[n, M, head_dim]` over keys and values `[n, tokens, head_dim]`, whatever their strides."""
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], keys[None], values[None], 0.0, False, attn_mask=None if bias is None else bias[None], scale=scale
    )
    # What the kernel returns as `[1, n, M]` lies in memory as `[1, M, n]` in some versions: shapes say it.
    return Partial(out[0].float(), log_sum[0].float())


def merge(parts: Sequence[Partial]) -> Partial:
    """Return attention over all tokens of some parts, which share none."""
    if len(parts) == 1:
        return parts[0]
    sums = torch.stack([part.log_sum for part in parts])
    total = torch.logsumexp(sums, dim=0)
    weights = (sums - total).exp_().nan_to_num_(0.0)  # a row that may attend to nothing: -inf less -inf
    out = torch.stack([part.out for part in parts])
    return Partial(out.mul_(weights[..., None]).sum(dim=0), total)


class RawKV(KVCodec):
    """Keys and values as they are."""

    name = "none"
    lossless = True

    def layout(self, n: int, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Segment, ...]:
        """`keys` and `values` `[n, tokens, head_dim]` in the dtype of the computation."""
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

    def decoded(self, block: KVBlock, dtype: torch.dtype, scratch: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
        """The block itself."""
        return block.segments["keys"], block.segments["values"]


def create_kv_codec(name: str, kernels: KernelSelector | None = None) -> KVCodec:
    """Return the codec of keys and values with this name.

    Raises:
        ConfigurationError: there is none.
    """
    from .kv_integers import INT4KV, INT8KV

    if name == "none":
        return RawKV()
    if name == "int8":
        return INT8KV(kernels)
    if name == "int4":
        return INT4KV()
    raise ConfigurationError(f"kv_codec: {name!r} is not one of {', '.join(KV_CODECS)}")
