"""INT8 with one symmetric scale an output channel (LLM.int8(), arXiv:2208.07339; SmoothQuant, arXiv:2211.10438)."""

from __future__ import annotations

import torch

from ..errors import CodecError
from .base import Codec, Encoded, LinearInput, Scratch, Segment, bf16_at_least, columns_of
from .int8_kernels import KERNELS, Kernel, dequantize, kernel_for

_LEVELS = 127
_BLOCK_ELEMENTS = 1 << 18
_MOST_SUMMED_COLUMNS = 1 << 17
"""fp32 sums so many integers of 7 bits without rounding."""


class INT8Codec(Codec):
    """One byte a weight; a fp32 scale and the integer sum of each row.

    The scale is rounded up to a bf16 value when it is chosen, so that kernels that take bf16 scales lose nothing.
    """

    name = "int8"
    lossless = False

    def supports(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Floating-point tensors of two dimensions or more."""
        return dtype.is_floating_point and len(shape) >= 2 and 0 not in shape

    def segments(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Segment, ...]:
        """`data` int8 `[rows, columns]`, `scale` fp32 `[rows]` and `row_sum` (of `data`) int32 `[rows]`."""
        return (
            Segment("data", torch.int8, (shape[0], columns_of(shape))),
            Segment("scale", torch.float32, (shape[0],)),
            Segment("row_sum", torch.int32, (shape[0],)),
        )

    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantise rows `[n, ...]` of any floating dtype.

        Raises:
            CodecError: NaN or infinite values: no scale represents them.
        """
        matrix = rows.reshape(rows.shape[0], -1)
        n, columns = matrix.shape
        data = torch.empty((n, columns), dtype=torch.int8)
        scale = torch.empty(n, dtype=torch.float32)
        row_sum = torch.empty(n, dtype=torch.int32)
        step = max(1, _BLOCK_ELEMENTS // columns)  # what stays in the cache is quantised much faster
        block = torch.empty((min(step, n), columns), dtype=torch.float32)
        sum_dtype = torch.float32 if columns <= _MOST_SUMMED_COLUMNS else torch.float64
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            values = block[: part.stop - start].copy_(matrix[part])
            largest = torch.maximum(values.amax(dim=1), values.amin(dim=1).neg_())  # aminmax takes ten times as long
            if not bool(torch.isfinite(largest).all()):
                raise CodecError("INT8 cannot represent NaN or infinite weights; keep this tensor with codec 'none'")
            factor = bf16_at_least(largest / _LEVELS)
            scale[part] = torch.where(factor > 0, factor, torch.ones_like(factor))
            data[part] = values.div_(scale[part, None]).round_()  # the scale is not below what makes the largest 127
            row_sum[part] = values.sum(dim=1, dtype=sum_dtype)
        return {"data": data, "scale": scale, "row_sum": row_sum}

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        """`data * scale` in the dtype of `out`."""
        return dequantize(encoded, out)

    def linear(self, x: LinearInput, encoded: Encoded, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        """Product on the encoded rows by the kernel for this number of rows of activations."""
        product = self._kernel(x)(x, encoded, scratch)
        return product if bias is None else product.add_(bias)

    def wants_whole(self, x: LinearInput) -> bool:
        """Any range of rows gives the same bits."""
        return False

    def _kernel(self, x: LinearInput) -> Kernel:
        return KERNELS[kernel_for(*x.shape, x.given_dtype)]
