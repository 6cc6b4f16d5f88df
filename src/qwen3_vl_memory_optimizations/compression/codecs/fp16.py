"""FP16: a cast to 16 bits. Half the size of fp32; no gain for 16-bit tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...native import DTYPES, Weight, core, float_weight
from ..base import Codec, Encoded, LinearInput, Scratch, Segment, columns_of, linear_in_steps
from ..kernels import has_native_bf16

_FEW_ROWS = 16
"""Up to here a product waits for the weight; for more rows torch's products are faster."""
_TOP_EXPONENT = 15
_BLOCK_ELEMENTS = 1 << 18


class FP16Codec(Codec):
    """16 bits per value: bf16 and fp16 tensors stay unchanged, all others become fp16.

    fp16 lacks range, so each row of another dtype is divided by the power of two that brings its largest finite value
    into [2**14, 2**15). Nothing overflows. Values within a factor of 2**-28 of the largest in their row keep 11
    significant bits; smaller ones have an error of at most 2**-40 of the largest. NaN and infinite values are kept.
    """

    name = "fp16"
    lossless = False

    def supports(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Return True for floating-point tensors of two or more dimensions."""
        return dtype.is_floating_point and len(shape) >= 2 and 0 not in shape

    def segments(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Segment, ...]:
        """Return `data` bf16 or fp16 `[rows, columns]` and `scale` fp32 `[rows]`, a power of two."""
        stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        return (Segment("data", stored, (shape[0], columns_of(shape))), Segment("scale", torch.float32, (shape[0],)))

    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cast rows `[n, ...]` of any floating dtype."""
        matrix = rows.reshape(rows.shape[0], -1)
        if matrix.dtype in (torch.bfloat16, torch.float16):
            return {"data": matrix, "scale": torch.ones(len(matrix), dtype=torch.float32)}
        n, columns = matrix.shape
        data, scale = torch.empty((n, columns), dtype=torch.float16), torch.empty(n, dtype=torch.float32)
        step = max(1, _BLOCK_ELEMENTS // columns)
        for start in range(0, n, step):
            part = slice(start, start + step)
            values = matrix[part]
            largest = torch.maximum(values.amax(dim=1), values.amin(dim=1).neg_())
            if not bool(largest.isfinite().all()):
                largest = torch.where(values.isfinite(), values, 0).abs().amax(dim=1)
            # Clamp the exponent so that its power of two and the inverse are normal numbers.
            exponent = (torch.frexp(largest).exponent - _TOP_EXPONENT).clamp_(-125, 125)
            exponent = torch.where(largest > 0, exponent, torch.zeros_like(exponent))
            scale[part] = torch.ldexp(torch.ones_like(largest), exponent)
            data[part] = values * torch.ldexp(torch.ones_like(largest), -exponent)[:, None]
        return {"data": data, "scale": scale}

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        """Write `data * scale` in the dtype of `out`."""
        data = encoded["data"]
        if data.dtype == torch.bfloat16:
            return out.copy_(data)
        if out.dtype == torch.float16:  # the scale may be out of its range although the product is not
            return out.copy_(data.float().mul_(encoded["scale"][:, None]))
        return out.copy_(data).mul_(encoded["scale"][:, None].to(out.dtype))

    def linear(self, x: LinearInput, encoded: Encoded, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        """Compute few rows in fp32 with the native core, more in the dtype of `x`, decoded unless both are bf16."""
        native = core() if self._is_native(x, encoded["data"].dtype) else None
        if native is not None:
            wide = x.once("fp32 rows", lambda: x.x2d.float().contiguous())
            assert isinstance(wide, torch.Tensor)
            product = native.float_linear(wide, encoded["data"], encoded["scale"], x.given_dtype)
            return product if bias is None else product.add_(bias)
        if encoded["data"].dtype == x.x2d.dtype == torch.bfloat16:
            return F.linear(x.x2d, encoded["data"], bias)
        return linear_in_steps(x, encoded, bias, self.decode, scratch)

    def native_weight(self, encoded: Encoded) -> Weight | None:
        """Return the rows for the native core's layer steps."""
        return float_weight(encoded["data"], encoded["scale"])

    def wants_whole(self, x: LinearInput) -> bool:
        """Return False for few rows with the native core, where a row of the weight has the same bits in any range."""
        return not (core() is not None and x.rows <= _FEW_ROWS) and super().wants_whole(x)

    @staticmethod
    def _is_native(x: LinearInput, stored: torch.dtype) -> bool:
        """Return whether the native core multiplies: not several rows that the processor multiplies in bf16."""
        if x.rows > _FEW_ROWS or x.given_dtype not in DTYPES:
            return False
        return x.rows == 1 or not (x.given_dtype == stored == torch.bfloat16 and has_native_bf16())
