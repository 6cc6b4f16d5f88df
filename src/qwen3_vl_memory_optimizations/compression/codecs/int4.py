"""INT4: 4-bit codes of rotated weights, each naming one of 16 integers in a table that 16 weights share.

A weight is an integer of 8 bits times the scale of its row, as in `int8_rotated`; the table is one of 256, chosen for
each 16 weights (as in LO-BCQ, arXiv:2502.05376): 4.5 bits per weight. With the same bits, a scale for each 32 weights
and rounding to its multiples have twice the squared error on normally distributed values, which rotated weights are.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from ...errors import CodecError
from ...native import INT4_ROWS, Core, Integers, Weight, core
from ..base import STEP_ELEMENTS, Compensation, Encoded, Segment, bf16_at_least, columns_of
from .compensation import error_feedback
from .int4_tables import UNITS_PER_DEVIATION, tables
from .rotated import RotatedINT8Codec
from .rotation import rotate, rotation_signs

_GROUP = 16
_BLOCK = 64
_MOST = 254
"""Values are encoded in halves of the tables' unit, from -127 to 127 units."""
_LARGEST_ERROR = 4095
"""So that 16 of them fit 16 bits."""


class INT4Codec(RotatedINT8Codec):
    """Four bits per weight, eight per 16 weights that name their table, and an fp32 scale per row.

    Rows are stored as the native core reads them (`native/core/codes.inl`): the numbers of the tables, then blocks of
    32 bytes for 64 columns. Matrices whose columns do not divide so are stored with `fallback`; vocabularies too, since
    they are the most sensitive.
    """

    name = "int4"
    fallback = "int8"
    suits_vocabulary = False

    @property
    def stored_name(self) -> str:
        """`int4_tables`: version 0.2 and earlier had another format, `int4_64` and `int4_32`."""
        return f"{self.name}_tables"

    def supports(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Return True for floating-point matrices with a multiple of 64 columns."""
        return super().supports(shape, dtype) and columns_of(shape) % _BLOCK == 0

    def segments(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Segment, ...]:
        """Return `data` uint8 `[rows, columns / 16 + columns / 2]` and `scale` fp32 `[rows]`."""
        columns = columns_of(shape)
        return (
            Segment("data", torch.uint8, (shape[0], columns // _GROUP + columns // 2)),
            Segment("scale", torch.float32, (shape[0],)),
        )

    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rotate and quantise rows `[n, ...]` of any floating dtype.

        Raises:
            CodecError: NaN or infinite values, which no scale represents.
        """
        matrix = rows.reshape(rows.shape[0], -1)
        n, columns = matrix.shape
        data = torch.empty((n, columns // _GROUP + columns // 2), dtype=torch.uint8)
        scale = torch.empty(n, dtype=torch.float32)
        step = max(1, STEP_ELEMENTS // columns)
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            values = rotate(matrix[part])
            unit = _units(values)
            halves = (values / unit[:, None]).mul_(2).round_().clamp_(-_MOST, _MOST).to(torch.int16)
            product, square = _encode(halves, data[part]).double().unbind(1)
            scale[part] = (unit * torch.where(square > 0, product / (2 * square), 1)).float()  # least squares
        return {"data": data, "scale": scale}

    @property
    def compensates(self) -> bool:
        """Whether the native core is there, which is needed for it."""
        return core() is not None

    def compensation(self, inputs: torch.Tensor) -> Compensation:
        """Return how errors are compensated, for inputs `[m, columns]` of any floating dtype.

        Raises:
            CodecError: they are not finite.
        """
        return error_feedback(inputs, _order(inputs.shape[1]))

    def encode_compensated(self, rows: torch.Tensor, compensation: Compensation) -> dict[str, torch.Tensor]:
        """Rotate and quantise rows `[n, ...]` of any floating dtype, as in GPTQ (arXiv:2210.17323).

        Raises:
            CodecError: NaN or infinite values, which no scale represents; or the native core is not available.
        """
        native, (errors, nearest) = core(), _look_up()
        if native is None:
            raise CodecError("INT4 compensates errors with the native core alone, which is not there")
        values = rotate(rows.reshape(rows.shape[0], -1))
        n, columns = values.shape
        unit = _units(values)
        targets = values[:, _order(columns)].div_(unit[:, None])
        data = torch.empty((n, columns // _GROUP + columns // 2), dtype=torch.uint8)
        for first in range(0, columns, _BLOCK):
            part = slice(first, first + _BLOCK)
            fed_back = targets[:, :first] @ compensation.feedback[:first, part]
            within, importance = compensation.feedback[part, part].contiguous(), compensation.importance[part]
            native.encode_compensated(
                targets[:, part], fed_back, within, importance, tables(), errors, nearest, data, first
            )
        return {"data": data, "scale": unit}

    def native_weight(self, encoded: Encoded) -> Weight | None:
        """Return the rows for the native core's layer steps, which rotate activations."""
        data, columns = encoded["data"], _columns(encoded["data"])
        signs = rotation_signs(columns)
        pointers = (data.data_ptr(), encoded["scale"].data_ptr(), signs.data_ptr())
        return Weight(*pointers, len(signs), len(data), columns, tables().data_ptr(), INT4_ROWS)

    def _native_product(self, native: Core, integers: Integers, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        return native.linear(integers, encoded["data"], encoded["scale"], dtype, tables=tables())

    def _dequantize(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        scale = encoded["scale"][:, None]
        if out.dtype == torch.float16:  # the scales of small values are below its range
            return out.copy_(_integers(encoded["data"]).float().mul_(scale))
        return out.copy_(_integers(encoded["data"])).mul_(scale.to(out.dtype))


def _units(values: torch.Tensor) -> torch.Tensor:
    """Return the unit of the tables for each rotated row `[n, columns]`, fp32 `[n]`.

    Raises:
        CodecError: NaN or infinite values.
    """
    largest = torch.maximum(values.amax(dim=1), values.amin(dim=1).neg_())
    if not bool(torch.isfinite(largest).all()):
        raise CodecError("INT4 cannot represent NaN or infinite weights; keep this tensor with codec 'none'")
    largest = torch.where(largest > 0, largest, 1)
    relative = values / largest[:, None]  # or squares would overflow
    unit = (relative.norm(dim=1) / (values.shape[1] ** 0.5 * UNITS_PER_DEVIATION)).clamp_(min=1 / 127)
    # A rotated row differs in its last bits with the number of rows around it; bf16 hides that.
    return bf16_at_least(largest * unit)


@lru_cache(maxsize=16)
def _order(columns: int) -> torch.Tensor:
    """Return the columns in the order of groups (see `codes.inl`)."""
    within = torch.arange(_BLOCK).view(2, 4, 8).permute(1, 2, 0).reshape(-1)
    return (torch.arange(0, columns, _BLOCK)[:, None] + within).view(-1)


def _columns(data: torch.Tensor) -> int:
    return data.shape[1] * _GROUP // (1 + _GROUP // 2)


def _encode(halves: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """Write values int16 `[n, columns]` as `data`; return what `Core.encode` returns."""
    errors, nearest = _look_up()
    native = core()
    if native is not None:
        return native.encode(halves, tables(), errors, nearest, data)
    n, columns = halves.shape
    groups = halves.view(n, -1, 2, 4, 8).permute(0, 1, 3, 4, 2).reshape(-1, _GROUP)  # as codes.inl has them
    at = groups.int() + _MOST
    numbers = F.embedding_bag(at, errors.float(), mode="sum").argmin(dim=1)  # sums of integers, so exact
    codes = nearest.view(-1).take(numbers[:, None] * nearest.shape[1] + at)
    integers = tables()[numbers].gather(1, codes.long()).long()
    data[:, : columns // _GROUP] = numbers.view(n, -1)
    low, high = codes.view(n, -1, 2, 2 * _GROUP).unbind(2)
    data[:, columns // _GROUP :] = (low | high << 4).reshape(n, -1)
    return torch.stack([(integers * other).view(n, -1).sum(dim=1) for other in (groups.long(), integers)], dim=1)


def _integers(data: torch.Tensor) -> torch.Tensor:
    """Return 4-bit rows as int8 `[n, columns]`."""
    n, columns = len(data), _columns(data)
    numbers = data[:, : columns // _GROUP].reshape(-1)
    both = data[:, columns // _GROUP :].reshape(-1, 1, 2 * _GROUP)
    codes = torch.cat([both & 15, both >> 4], dim=1).view(-1, _GROUP)
    integers = tables()[numbers.long()].gather(1, codes.long())
    return integers.view(n, -1, 4, 8, 2).permute(0, 1, 4, 2, 3).reshape(n, columns)


@lru_cache(maxsize=1)
def _look_up() -> tuple[torch.Tensor, torch.Tensor]:
    """Return squared errors uint16 `[values, tables]` and nearest codes uint8 `[tables, values]` of each value."""
    values = torch.arange(-_MOST, _MOST + 1)
    entries = 2 * tables().to(torch.int64)
    middles = (entries[:, 1:] + entries[:, :-1]).contiguous()  # twice
    nearest = torch.searchsorted(middles, (2 * values).expand(len(entries), -1).contiguous())
    errors = (entries.gather(1, nearest) - values).square().clamp_(max=_LARGEST_ERROR)
    return errors.t().contiguous().to(torch.uint16), nearest.to(torch.uint8)
