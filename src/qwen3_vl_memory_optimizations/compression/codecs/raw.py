"""`none`: the unchanged tensor. Lossless; products use the dtype of the activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..base import Codec, Encoded, LinearInput, Scratch, Segment, columns_of, linear_in_steps

_VECTOR_BYTES = 64
_SLOTS_FOR_BITS = 4


class RawCodec(Codec):
    """Keeps rows unchanged. If the dtypes differ, a product first casts the rows into scratch memory."""

    name = "none"
    lossless = True

    def supports(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Return True: every tensor is supported."""
        return True

    def segments(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Segment, ...]:
        """Return one segment, `[rows, columns]` in the dtype of the tensor."""
        return (Segment("data", dtype, (shape[0] if shape else 1, columns_of(shape))),)

    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the rows as a matrix."""
        return {"data": rows.reshape(rows.shape[0] if rows.dim() else 1, -1)}

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        """Copy the rows, casting if the dtypes differ."""
        return out.copy_(encoded["data"])

    def linear(self, x: LinearInput, encoded: Encoded, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        """Compute one product in the dtype of `x`, bit-identical to `F.linear` on the whole tensor (see `wants_whole`).

        torch's one-row fp32 kernel sums in another order if the matrix does not start on a vector boundary, which can
        happen with a checkpoint read in place; such rows are copied first.
        """
        data = encoded["data"]
        aligned = data.data_ptr() % _VECTOR_BYTES == 0 or data.dtype == torch.bfloat16
        if data.dtype != x.x2d.dtype or not aligned:
            slots = _SLOTS_FOR_BITS if self.wants_whole(x) else 1
            return linear_in_steps(x, encoded, bias, self.decode, scratch, slots=slots)
        return F.linear(x.x2d, data, bias)
