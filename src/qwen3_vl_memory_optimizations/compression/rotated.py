"""INT8 of rotated weights: activations are rotated too, so 8 bits per value suffice for them as well."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch

from .base import STEP_ELEMENTS, Encoded, LinearInput, Scratch
from .int8 import KERNELS, INT8Codec, Kernel, dequantize, integer_product, kernel_for, row_steps
from .kernels import has_fast_int8_row, int8_product_saturates
from .rotation import rotate, rotate_back, rotate_row

_LEVELS = 127
_MOST_CREST = 16.0
"""Maximum ratio of a row's peak to its root mean square for 8 bits: an error of 16 / 127 / sqrt(12), 3.6 %.
Rotated activations of models have ratios of 3 to 6 (an error of about 1 %)."""
_LEAST_DIGIT_ROWS = 5
_NOTHING = torch.zeros(1, dtype=torch.float32)
_LEAST_COLUMNS = 512
"""In narrower matrices the call overhead dominates, so the product may as well be exact."""


class RotatedInput(LinearInput):
    """Rotated activations, as fp32 values and, if no row is too uneven, as 8-bit digits.

    The fp32 values are computed at first use: with many rows, digits alone take an eighth of the memory.

    Args:
        x2d: the original activations `[M, columns]`.

    Attributes:
        digits: int8 `[M, columns]`, or `None` if a row is too uneven or too short, or the processor's INT8 product
            saturates.
        row_scale: the value of one digit unit, fp32 `[M, 1]`.
    """

    def __init__(self, x2d: torch.Tensor) -> None:
        self._unrotated = x2d
        self._derived = {}
        self.digits: torch.Tensor | None = None
        self.row_scale: torch.Tensor | float = 1.0
        if int8_product_saturates() or x2d.shape[1] < _LEAST_COLUMNS:
            return
        if self.rows == 1:
            self._digits_of_one_row()
        else:
            self._digits_of_rows()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (M) and columns."""
        rows, columns = self._unrotated.shape
        return rows, columns

    @property
    def given_dtype(self) -> torch.dtype:
        """Original dtype of the activations."""
        return self._unrotated.dtype

    @property
    def rows(self) -> int:
        """M, the number of rows."""
        return self._unrotated.shape[0]

    @cached_property
    def x2d(self) -> torch.Tensor:  # type: ignore[override]
        """The rotated values, fp32 `[M, columns]`."""
        return rotate_row(self._unrotated) if self.rows == 1 else rotate(self._unrotated)

    def parts(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield ranges of rows with their rotated values (see `LinearInput.parts`)."""
        rows, columns = self._unrotated.shape
        step = max(1, STEP_ELEMENTS // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield start, stop, rotate(self._unrotated[start:stop])

    def _digits_of_one_row(self) -> None:
        """Compute the digits of one row in fewer operations than `_digits_of_rows`: each adds to the decode step."""
        row = self.x2d
        least, most = torch.aminmax(row)  # a quarter of the time of a norm
        largest = max(float(most), -float(least))
        if 0 < largest * math.sqrt(row.shape[1]) <= _MOST_CREST * float(torch.linalg.vector_norm(row)):
            self.digits = torch.mul(row, _LEVELS / largest).round_().to(torch.int8)
            self.row_scale = largest / _LEVELS

    def _digits_of_rows(self) -> None:
        rows, columns = self._unrotated.shape
        digits = torch.empty((rows, columns), dtype=torch.int8)
        row_scale = torch.empty((rows, 1), dtype=torch.float32)
        for start, stop, part in self.parts():
            # Fifty times as fast as the infinity norm.
            largest = torch.maximum(part.amax(dim=1, keepdim=True), part.amin(dim=1, keepdim=True).neg_())
            norm = torch.linalg.vector_norm(part, dim=1, keepdim=True)
            if not bool((largest * math.sqrt(columns) <= _MOST_CREST * norm).all()):
                return
            scale = largest.div_(_LEVELS).clamp_min_(torch.finfo(torch.float32).tiny)
            row_scale[start:stop] = scale
            digits[start:stop] = part.div_(scale).round_()
        self.digits, self.row_scale = digits, row_scale


def _digit_product(x: LinearInput, encoded: Encoded, scratch: Scratch) -> torch.Tensor:
    """Compute an integer product with one integer per activation and one scale per row."""
    assert isinstance(x, RotatedInput) and x.digits is not None
    data, scale = encoded["data"], encoded["scale"]
    if not isinstance(x.row_scale, torch.Tensor):  # a single row
        product = torch._int_mm(x.digits, data.t()).float()
        return torch.addcmul(_NOTHING, product, scale, value=x.row_scale)  # one operation instead of two
    out = torch.empty((x.rows, len(data)), dtype=x.given_dtype)
    for start, stop in row_steps(x.rows, len(data), scratch, slots=2):
        product = integer_product(x.digits[start:stop], data, scratch, "high")
        out[start:stop] = product.mul_(scale).mul_(x.row_scale[start:stop])
    return out


class RotatedINT8Codec(INT8Codec):
    """`int8` of `w @ R` (see `rotation`). Products take rotated activations; `decode` rotates back.

    Weights lose less than with `int8`. If the processor multiplies 8-bit integers without saturation, one 8-bit integer
    per activation replaces two, or bf16. Rows of activations that stay uneven use the exact kernels.
    """

    name = "int8_rotated"

    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rotate and quantise rows `[n, ...]` of any floating dtype.

        Raises:
            CodecError: NaN or infinite values, which no scale represents.
        """
        return super().encode(rotate(rows.reshape(rows.shape[0], -1)))

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        """Write `(data * scale) @ R.T` in the dtype of `out`."""
        rows, columns = encoded["data"].shape
        step = max(1, STEP_ELEMENTS // columns)
        for start in range(0, rows, step):
            part = {name: segment[start : start + step] for name, segment in encoded.items()}
            values = dequantize(part, torch.empty(part["data"].shape, dtype=torch.float32))
            out[start : start + step] = rotate_back(values)
        return out

    def linear(self, x: LinearInput, encoded: Encoded, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        """Compute the product of the rotated activations and the encoded rows."""
        rotated = x.derived("rotated", RotatedInput)
        assert isinstance(rotated, RotatedInput)
        product = super().linear(rotated, encoded, None, scratch).to(x.x2d.dtype)
        return product if bias is None else product.add_(bias)

    def _kernel(self, x: LinearInput) -> Kernel:
        assert isinstance(x, RotatedInput)
        if x.digits is not None and (x.rows >= _LEAST_DIGIT_ROWS or (x.rows == 1 and has_fast_int8_row())):
            return _digit_product
        return KERNELS[kernel_for(*x.shape, torch.float32)]  # rotated values are fp32
