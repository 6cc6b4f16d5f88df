"""Keys and values at 8 and at 4 bits per number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from ..errors import CodecError, ConfigurationError
from .base import Scratch, Segment, bf16_at_least
from .kv import KV_CODECS, KVBlock, KVCodec, Partial, RawKV

_LEVELS = 127
_MOST_PACKED_ROWS, _MOST_PACKED_ROWS_FP32 = 32, 16


class INT8KV(KVCodec):
    """One byte per number and one scale per token and head.

    Values are stored transposed, so that both attention products use torch's weight-only INT8 kernel: a key's scale
    applies to an output of the first product, a value's scale multiplies the probabilities before the second.
    """

    name = "int8"
    lossless = False

    def layout(self, n: int, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Segment, ...]:
        """Return int8 `keys` `[n, tokens, head_dim]`, `values` `[n, head_dim, tokens]`, bf16 scales `[n, tokens]`."""
        return (
            Segment("keys", torch.int8, (n, tokens, head_dim)),
            Segment("values", torch.int8, (n, head_dim, tokens)),
            Segment("key_scale", torch.bfloat16, (n, tokens)),
            Segment("value_scale", torch.bfloat16, (n, tokens)),
        )

    def encode(self, keys: torch.Tensor, values: torch.Tensor, block: KVBlock) -> None:
        """Quantise keys and values into a block.

        Raises:
            CodecError: NaN or infinite values, which no scale represents.
        """
        segments = block.segments
        data, segments["key_scale"][:] = _quantized(keys)
        segments["keys"].copy_(data)
        data, segments["value_scale"][:] = _quantized(values)
        segments["values"].copy_(data.transpose(1, 2))

    def decode(self, block: KVBlock, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write `data * scale` in the dtype of the output."""
        segments = block.segments
        keys.copy_(segments["keys"]).mul_(segments["key_scale"].to(keys.dtype)[..., None])
        values.copy_(segments["values"].transpose(1, 2)).mul_(segments["value_scale"].to(values.dtype)[..., None])

    def attend(
        self,
        query: torch.Tensor,
        blocks: Sequence[KVBlock],
        bias: Sequence[torch.Tensor | None],
        scale: float,
        scratch: Scratch,
    ) -> Partial:
        """Compute attention with the INT8 kernel for few rows, and on decoded blocks for many."""
        _, rows, head_dim = query.shape
        most = _MOST_PACKED_ROWS_FP32 if query.dtype == torch.float32 else _MOST_PACKED_ROWS
        if rows > most or not _can_pack(self.shape(blocks[0])[1], head_dim):
            return super().attend(query, blocks, bias, scale, scratch)
        return self._attend_packed(query, blocks, bias, scale)

    def _attend_packed(
        self, query: torch.Tensor, blocks: Sequence[KVBlock], bias: Sequence[torch.Tensor | None], scale: float
    ) -> Partial:
        n, rows, head_dim = query.shape
        product = torch._weight_int8pack_mm
        heads = (query * scale).to(torch.bfloat16).unbind(0)
        found = [
            product(*each)
            for block in blocks
            for each in zip(heads, block.segments["keys"].unbind(0), block.segments["key_scale"].unbind(0), strict=True)
        ]
        scores = torch.stack(found).float().view(len(blocks), n, rows, -1)
        for part, added in zip(scores, bias, strict=True):
            if added is not None:
                part.add_(added)
        largest = scores.amax(dim=(0, 3), keepdim=True)
        scores.sub_(largest).exp_()
        sums = scores.sum(dim=(0, 3))
        scores.mul_(torch.stack([block.segments["value_scale"] for block in blocks])[:, :, None])
        weights = scores.to(torch.bfloat16).view(len(blocks) * n, rows, -1).unbind(0)
        ones = _ones(head_dim)
        transposed = [head for block in blocks for head in block.segments["values"].unbind(0)]
        found = [product(weight, head, ones) for weight, head in zip(weights, transposed, strict=True)]
        out = torch.stack(found).view(len(blocks), n, rows, head_dim).sum(dim=0, dtype=torch.float32)
        return Partial(out.div_(sums[..., None]), sums.log_().add_(largest[0, :, :, 0]))


class INT4KV(KVCodec):
    """Four bits per number: keys quantised per channel, values per token (KIVI, arXiv:2402.02750).

    Key channels differ in magnitude but are each uniform; values have no such channels.
    """

    name = "int4"
    lossless = False

    def layout(self, n: int, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Segment, ...]:
        """Return `keys`, `values` uint8 `[n, tokens / 2, head_dim]`: token t low bits, t + tokens / 2 high bits.

        `key_step` bf16 `[n, groups, 2, head_dim]` and `value_step` bf16 `[n, tokens, 2]` hold scale and minimum.
        """
        groups = tokens // _group(tokens)
        return (
            Segment("keys", torch.uint8, (n, tokens // 2, head_dim)),
            Segment("values", torch.uint8, (n, tokens // 2, head_dim)),
            Segment("key_step", torch.bfloat16, (n, groups, 2, head_dim)),
            Segment("value_step", torch.bfloat16, (n, tokens, 2)),
        )

    def shape(self, block: KVBlock) -> tuple[int, int, int]:
        """Return `(n, tokens, head_dim)` of a block; two tokens share a byte."""
        n, pairs, head_dim = block.segments["keys"].shape
        return n, 2 * pairs, head_dim

    def encode(self, keys: torch.Tensor, values: torch.Tensor, block: KVBlock) -> None:
        """Quantise keys and values into a block.

        Raises:
            CodecError: NaN or infinite values, which no step represents.
        """
        n, tokens, head_dim = keys.shape
        segments = block.segments
        grouped = keys.to(torch.float32, copy=True).view(n, -1, _group(tokens), head_dim)
        digits, step = _digits(grouped, dim=2)
        segments["key_step"].copy_(step)
        _pack(digits.view(n, tokens, head_dim), segments["keys"])
        digits, step = _digits(values.to(torch.float32, copy=True), dim=2)
        segments["value_step"].copy_(step)
        _pack(digits, segments["values"])

    def decode(self, block: KVBlock, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write `digit * scale + minimum` in the dtype of the output."""
        n, tokens, head_dim = keys.shape
        segments = block.segments
        _unpack(segments["keys"], keys)
        scale, least = segments["key_step"].to(keys.dtype).split(1, dim=2)
        keys.view(n, -1, _group(tokens), head_dim).mul_(scale).add_(least)
        _unpack(segments["values"], values)
        scale, least = segments["value_step"].to(values.dtype).split(1, dim=2)
        values.mul_(scale).add_(least)


def _group(tokens: int) -> int:
    """Return how many tokens of a channel share a scale and minimum."""
    return next(size for size in (128, 64, 32) if tokens % size == 0)


def _digits(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return digits 0 to 15 (fp32, in the memory of `values`), and scale and minimum of each row along `dim`."""
    least, largest = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    if not bool(torch.isfinite(least).all()) or not bool(torch.isfinite(largest).all()):
        raise CodecError("keys or values are NaN or infinite, which INT4 cannot represent; use kv_codec='none'")
    least = least.to(torch.bfloat16).float()
    scale = bf16_at_least((largest - least).clamp_(min=0) / 15)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    digits = values.sub_(least).div_(scale).round_().clamp_(0, 15)
    return digits, torch.cat((scale, least), dim)


def _pack(digits: torch.Tensor, out: torch.Tensor) -> None:
    low, high = digits.to(torch.uint8).chunk(2, dim=1)
    torch.bitwise_or(low, high << 4, out=out)


def _unpack(packed: torch.Tensor, out: torch.Tensor) -> None:
    low, high = out.chunk(2, dim=1)
    low.copy_(packed & 15)
    high.copy_(packed >> 4)


def _quantized(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers (as fp32) `[n, tokens, head_dim]` and the scales `[n, tokens]` (fp32, exact in bf16)."""
    values = rows.to(torch.float32, copy=True)
    largest = torch.maximum(values.amax(dim=-1), values.amin(dim=-1).neg_())
    if not bool(torch.isfinite(largest).all()):
        raise CodecError("keys or values are NaN or infinite, which INT8 cannot represent; use kv_codec='none'")
    scale = bf16_at_least(largest / _LEVELS)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return values.div_(scale[..., None]).round_(), scale


def _can_pack(tokens: int, head_dim: int) -> bool:
    """Return whether torch's kernel supports these shapes; it crashes on others."""
    return tokens % 32 == 0 and head_dim % 32 == 0


@lru_cache(maxsize=16)
def _ones(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.bfloat16)


def create_kv_codec(name: str) -> KVCodec:
    """Return the KV codec with this name.

    Raises:
        ConfigurationError: there is no such codec.
    """
    if name == "none":
        return RawKV()
    if name == "int8":
        return INT8KV()
    if name == "int4":
        return INT4KV()
    raise ConfigurationError(f"kv_codec: {name!r} is not one of {', '.join(KV_CODECS)}")
