"""INT8 of rotated weights, which lose less, and activations rotated likewise."""

from __future__ import annotations

import torch

from ...native import DTYPES, INT8_ROWS, Core, Integers, Weight, core
from ..base import STEP_ELEMENTS, Encoded, LinearInput, Scratch
from .int8 import INT8Codec
from .rotation import rotate, rotate_back, rotation_signs

_MOST_EXACT_ROWS = 16
"""More rows take 8 bits per activation, if the processor multiplies bytes faster: prompts and pictures, not tokens."""
_LEAST_COLUMNS = 512
"""Narrower matrices cost little, and rotate fewer values into each other."""


class RotatedINT8Codec(INT8Codec):
    """`int8` of `w @ R` (see `rotation`). Products take rotated activations; `decode` rotates back.

    Weights lose less than with `int8`.
    """

    name = "int8_rotated"
    _left_form = "rotated integers"

    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rotate and quantise rows `[n, ...]` of any floating dtype.

        Raises:
            CodecError: NaN or infinite values, which no scale represents.
        """
        return super().encode(rotate(rows.reshape(rows.shape[0], -1)))

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        """Write `(data * scale) @ R.T` in the dtype of `out`."""
        rows, columns = out.shape
        step = max(1, STEP_ELEMENTS // columns)
        for start in range(0, rows, step):
            part = {name: segment[start : start + step] for name, segment in encoded.items()}
            values = self._dequantize(part, torch.empty((len(part["scale"]), columns), dtype=torch.float32))
            out[start : start + step] = rotate_back(values)
        return out

    def linear(self, x: LinearInput, encoded: Encoded, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        """Compute the product of the rotated activations and the encoded rows."""
        if core() is not None and x.given_dtype in DTYPES:
            return super().linear(x, encoded, bias, scratch)
        rotated = x.once("rotated", lambda: LinearInput(rotate(x.x2d)))
        assert isinstance(rotated, LinearInput)
        product = self._decoded_product(rotated, encoded, None, scratch).to(x.given_dtype)
        return product if bias is None else product.add_(bias)

    def native_weight(self, encoded: Encoded) -> Weight | None:
        """Return the rows for the native core's layer steps, which rotate activations."""
        data = encoded["data"]
        signs = rotation_signs(data.shape[1])
        return Weight(
            data.data_ptr(), encoded["scale"].data_ptr(), signs.data_ptr(), len(signs), *data.shape, None, INT8_ROWS
        )

    def _integers(self, x: LinearInput, native: Core) -> Integers:
        columns = x.x2d.shape[1]
        as_bytes = x.rows > _MOST_EXACT_ROWS and columns >= _LEAST_COLUMNS and native.multiplies_bytes
        return native.quantize(x.x2d, rotation_signs(columns), as_bytes=as_bytes)
