"""INT8 with one symmetric scale per output channel (LLM.int8(), arXiv:2208.07339; SmoothQuant, arXiv:2211.10438).

Encoded rows have `data` int8 `[n, k]` and `scale` fp32 `[n]`. The native core multiplies them by activations of 14 bits
(docs/adr/0021-native-core.md); without it they are decoded, which is also what tests compare with.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from ...errors import CodecError
from ...native import DTYPES, INT8_ROWS, Core, Integers, Weight, core
from ..base import Codec, Encoded, LinearInput, Scratch, Segment, bf16_at_least, columns_of, linear_in_steps
from ..kernels import has_native_bf16

_LEVELS = 127
_BLOCK_ELEMENTS = 1 << 18
_MOST_SUMMED_COLUMNS = 1 << 17
"""fp32 sums this many 7-bit integers without rounding."""


def dequantize(encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
    """Write `data * scale` into `out` `[n, columns]`, in its dtype, and return it."""
    data, scale = encoded["data"], encoded["scale"][:, None]
    if out.dtype != torch.float16:
        return out.copy_(data).mul_(scale.to(out.dtype))
    step = max(1, _BLOCK_ELEMENTS // data.shape[1])
    for start in range(0, len(data), step):  # in fp32: the scales of small values are below the range of fp16
        part = slice(start, start + step)
        out[part] = data[part].float().mul_(scale[part])
    return out


class INT8Codec(Codec):
    """One byte per weight; an fp32 scale and the integer sum of each row.

    The scale is rounded up to a bf16 value, so that kernels that take bf16 scales lose nothing. No present kernel needs
    the sums: packed checkpoints have them, and kernels with unsigned activations will need them.
    """

    name = "int8"
    lossless = False
    _left_form: ClassVar[str] = "integers"
    """Under which key integer activations are kept for other weights of the same input."""

    def supports(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Return True for floating-point tensors of two or more dimensions."""
        return dtype.is_floating_point and len(shape) >= 2 and 0 not in shape

    def segments(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Segment, ...]:
        """Return `data` int8 `[rows, columns]`, `scale` fp32 `[rows]` and `row_sum` (of `data`) int32 `[rows]`."""
        return (
            Segment("data", torch.int8, (shape[0], columns_of(shape))),
            Segment("scale", torch.float32, (shape[0],)),
            Segment("row_sum", torch.int32, (shape[0],)),
        )

    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantise rows `[n, ...]` of any floating dtype.

        Raises:
            CodecError: NaN or infinite values, which no scale represents.
        """
        matrix = rows.reshape(rows.shape[0], -1)
        n, columns = matrix.shape
        data = torch.empty((n, columns), dtype=torch.int8)
        scale = torch.empty(n, dtype=torch.float32)
        row_sum = torch.empty(n, dtype=torch.int32)
        step = max(1, _BLOCK_ELEMENTS // columns)  # quantisation is much faster within the cache
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
            data[part] = values.div_(scale[part, None]).round_()  # the scale was rounded up, so no value exceeds 127
            row_sum[part] = values.sum(dim=1, dtype=sum_dtype)
        return {"data": data, "scale": scale, "row_sum": row_sum}

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        """Write `data * scale` in the dtype of `out`."""
        return dequantize(encoded, out)

    def linear(self, x: LinearInput, encoded: Encoded, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        """Compute the product on the encoded rows, or, without the native core, on decoded ones."""
        native = core()
        if native is None or x.given_dtype not in DTYPES:
            return self._decoded_product(x, encoded, bias, scratch)
        integers = x.once(self._left_form, lambda: self._integers(x, native))
        assert isinstance(integers, Integers)
        product = self._native_product(native, integers, encoded, x.given_dtype)
        return product if bias is None else product.add_(bias)

    def native_weight(self, encoded: Encoded) -> Weight | None:
        """Return the rows for the native core's layer steps."""
        data = encoded["data"]
        return Weight(data.data_ptr(), encoded["scale"].data_ptr(), None, 0, *data.shape, None, INT8_ROWS)

    def wants_whole(self, x: LinearInput) -> bool:
        """Return False with the native core, where a row of the weight has the same bits in any range."""
        return core() is None and super().wants_whole(x)

    def _native_product(self, native: Core, integers: Integers, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        return native.linear(integers, encoded["data"], encoded["scale"], dtype)

    def _dequantize(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        """Write the rows as they are stored, rotated or not, into `out` `[n, columns]`."""
        return dequantize(encoded, out)

    def _integers(self, x: LinearInput, native: Core) -> Integers:
        return native.quantize(x.x2d)

    def _decoded_product(
        self, x: LinearInput, encoded: Encoded, bias: torch.Tensor | None, scratch: Scratch
    ) -> torch.Tensor:
        """Multiply any number of rows, decoding weights some rows at a time: in fp32, unless bf16 is faster."""
        dtype = x.given_dtype
        if dtype.itemsize > 2 or (dtype == torch.bfloat16 and has_native_bf16()):
            return linear_in_steps(x, encoded, bias, self._dequantize, scratch)
        wide = x.once("fp32", lambda: LinearInput(x.x2d.float()))
        assert isinstance(wide, LinearInput)
        product = linear_in_steps(wide, encoded, None, self._dequantize, scratch).to(dtype)
        return product if bias is None else product.add_(bias)
