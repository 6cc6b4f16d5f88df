"""Unpack codes of a few bits from int32 words."""

from __future__ import annotations

import torch

STREAM_BITS = (2, 3, 4, 8)
"""Bit widths that `unpack` reads: those of GPTQ."""


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes in rows of words, lowest bits first; a code may continue in the next word.

    Args:
        words: int32 `[rows, n]`.
        bits: per code, one of `STREAM_BITS`.

    Returns:
        Codes from 0 to 2 ** bits - 1: uint8 `[rows, n * 32 // bits]`.
    """
    data = words.contiguous().view(torch.uint8).view(words.shape[0], -1)  # little-endian: the stream in order
    if bits == 8:
        return data
    if bits == 3:  # 8 codes in 3 bytes
        triples = data.view(len(data), -1, 3).to(torch.int32)
        joined = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        return torch.stack([joined >> 3 * k & 7 for k in range(8)], dim=-1).view(len(data), -1).to(torch.uint8)
    mask = (1 << bits) - 1
    return torch.stack([data >> shift & mask for shift in range(0, 8, bits)], dim=-1).view(len(data), -1)
