"""INT8 with one symmetric scale per output channel (LLM.int8(), arXiv:2208.07339; SmoothQuant, arXiv:2211.10438).

This file has the kernels that multiply activations by INT8 rows, the rule that picks one (`kernel_for`), and the codec.
Encoded rows have `data` int8 `[n, k]`, `scale` fp32 `[n]` and `row_sum` int32 `[n]`. Each kernel returns `[M, n]` in
the dtype of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..errors import CodecError
from .base import Codec, Encoded, LinearInput, Scratch, Segment, bf16_at_least, columns_of, linear_in_steps
from .kernels import has_native_bf16, int8_product_saturates

_LEVELS = 127
_MOST_SUMMED_COLUMNS = 1 << 17
"""fp32 sums this many 7-bit integers without rounding."""
_BLOCK_ELEMENTS = 1 << 18
_PACKED_COLUMNS = 32
_PACKED_ROWS = 4
_MOST_PACKED_ROWS, _MOST_PACKED_ROWS_SATURATING = 16, 24
_LEAST_DECODED_ROWS = 128
_FOLD = 2

Kernel = Callable[[LinearInput, Encoded, Scratch], torch.Tensor]
_Split = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def kernel_for(rows: int, columns: int, dtype: torch.dtype) -> str:
    """Return the name of the kernel for `rows` activations of this dtype and a matrix of `columns` columns.

    The choice is independent of the matrix's rows: a weight is multiplied whole or in ranges, as its pages are loaded,
    and each kernel returns the same bits for a row in any range.
    """
    packs = columns % _PACKED_COLUMNS == 0
    if rows == 1:
        return "row" if packs else "decoded"
    if packs and rows <= (_MOST_PACKED_ROWS_SATURATING if int8_product_saturates() else _MOST_PACKED_ROWS):
        return "packed"
    if dtype == torch.bfloat16 and rows >= _LEAST_DECODED_ROWS and has_native_bf16():
        return "decoded"
    return "split"


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


def _decoded_product(x: LinearInput, encoded: Encoded, scratch: Scratch) -> torch.Tensor:
    """Multiply any number of rows, decoding weights to the dtype of the activations, some rows at a time."""
    return linear_in_steps(x, encoded, None, dequantize, scratch)


def _packed_product(x: LinearInput, encoded: Encoded, scratch: Scratch) -> torch.Tensor:
    """Multiply few rows with torch's weight-only kernel, which reads each byte once; only its bf16 form is fast."""
    activations = x.derived("bf16", lambda x2d: x2d.to(torch.bfloat16))
    assert isinstance(activations, torch.Tensor)
    product = _weight_only(activations, encoded["data"], encoded["scale"].to(torch.bfloat16))
    return product.to(x.x2d.dtype)


def _row_product(x: LinearInput, encoded: Encoded, scratch: Scratch) -> torch.Tensor:
    """Multiply one row with the same kernel, with the weight as `[n / 2, 2 k]` and the row as `[[x, 0], [0, x]]`.

    The kernel reads four rows of the weight side by side. The processor's prefetcher restarts at each row, and keeps up
    with memory if rows are twice as long: 20 GB/s instead of 14 for k = 2048. The products with zeros are free while
    memory bandwidth is the limit. Scales differ within a folded row, so they are applied afterwards, even if the rows
    do not fold: the sums are the same.
    """
    data, scale = encoded["data"], encoded["scale"]
    n, k = data.shape
    fold = _FOLD if n % (_PACKED_ROWS * _FOLD) == 0 else 1
    row = x.derived("folded", _fold) if fold > 1 else x.derived("bf16", lambda x2d: x2d.to(torch.bfloat16))
    assert isinstance(row, torch.Tensor)
    product = _weight_only(row, data.view(n // fold, fold * k), _ones(n // fold))
    out = x.x2d.new_empty((1, n))
    torch.mul(product.t(), scale.view(n // fold, fold), out=out.view(n // fold, fold))
    return out


def _weight_only(activations: torch.Tensor, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Call torch's kernel, which crashes on row counts that are not multiples of 4; the last rows are zero-padded."""
    n = len(data)
    rest = n % _PACKED_ROWS
    if not rest:
        return torch._weight_int8pack_mm(activations, data, scale)
    added = _PACKED_ROWS - rest
    last = F.pad(data[n - rest :], (0, 0, 0, added)), F.pad(scale[n - rest :], (0, added))
    parts = [torch._weight_int8pack_mm(activations, *last)[:, :rest]]
    if n > rest:
        parts.insert(0, torch._weight_int8pack_mm(activations, data[: n - rest], scale[: n - rest]))
    return torch.cat(parts, dim=1)


def _fold(x2d: torch.Tensor) -> torch.Tensor:
    row = x2d.to(torch.bfloat16)
    return torch.cat((row, _zeros(_FOLD * row.shape[1]), row), dim=1).view(_FOLD, -1)


@lru_cache(maxsize=64)
def _zeros(n: int) -> torch.Tensor:
    return torch.zeros((1, n), dtype=torch.bfloat16)


@lru_cache(maxsize=64)
def _ones(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.bfloat16)


def _split_product(x: LinearInput, encoded: Encoded, scratch: Scratch) -> torch.Tensor:
    """Multiply many rows: integer product with each activation written as two integers, `hi * base + lo`.

    One 8-bit number per value is too coarse for rows with outliers, which real models have. Two cost a second product
    and leave a relative error of 2**-14 of the row's largest value, so outliers need no special case. If the integer
    product saturates, digits are taken in [0, 127] and shifted to [-128, -1]: oneDNN adds the 128 back, and
    127 * 127 * 2 fits its 16-bit sums. The offset is removed through `row_sum`.
    """
    data, scale = encoded["data"], encoded["scale"]
    digits: torch.Tensor
    row_scale: torch.Tensor
    if int8_product_saturates():
        digits, row_scale = x.once("digits7", lambda: _split_digits(x, 63 * 128, _seven_bits))  # type: ignore[misc]
        base, offset = 128, 64 * 129
    else:
        digits, row_scale = x.once("digits8", lambda: _split_digits(x, 127 * 254, _eight_bits))  # type: ignore[misc]
        base, offset = 254, 0
    m, n = x.rows, data.shape[0]
    out = torch.empty((m, n), dtype=x.given_dtype)
    for start, stop in row_steps(m, n, scratch, slots=3):
        high = integer_product(digits[start:stop], data, scratch, "high").mul_(base)
        total = high.add_(integer_product(digits[m + start : m + stop], data, scratch, "low"))
        if offset:
            total.add_(encoded["row_sum"].float(), alpha=offset)
        out[start:stop] = total.mul_(row_scale[start:stop]).mul_(scale)
    return out


def row_steps(n_rows: int, n_columns: int, scratch: Scratch, *, slots: int) -> Iterator[tuple[int, int]]:
    """Yield row ranges of a product `[n_rows, n_columns]` whose 4-byte forms in `slots` slots fit one slot's size."""
    step = max(1, scratch.slot_bytes // (4 * slots * n_columns))
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)


def integer_product(digits: torch.Tensor, data: torch.Tensor, scratch: Scratch, slot: str) -> torch.Tensor:
    """Return `digits @ data.T` (both int8) as fp32 `[m, n]` in the memory of a slot.

    fp32, because sums of two would overflow int32, and mixed dtypes take several times as long. The memory is reused,
    because temporaries of many sizes would fragment the heap.
    """
    shape = (digits.shape[0], data.shape[0])
    integers = torch._int_mm(digits, data.t(), out=scratch.get("integers", shape, torch.int32))
    return scratch.get(slot, shape, torch.float32).copy_(integers)


def _split_digits(x: LinearInput, largest_integer: int, split: _Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the digits `[2M, K]` int8 of rows, high ones first, and the scale `[M, 1]` of each row.

    Args:
        x: the rows.
        largest_integer: the integer that a row's largest value maps to.
        split: splits rounded values into high and low digits, in fp32.
    """
    m, columns = x.shape
    digits = torch.empty((2 * m, columns), dtype=torch.int8)
    scale = torch.empty((m, 1), dtype=torch.float32)
    for start, stop, values in x.parts():
        largest = torch.maximum(values.amax(dim=1, keepdim=True), values.amin(dim=1, keepdim=True).neg_())
        part = torch.where(largest > 0, largest / largest_integer, torch.ones_like(largest))
        scale[start:stop] = part
        digits[start:stop], digits[m + start : m + stop] = split(values.div_(part).round_())
    return digits, scale


def _eight_bits(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return digits with value = hi * 254 + lo, both in [-127, 127]."""
    hi = torch.mul(values, 1 / 254).round_()
    return hi, values.sub_(hi, alpha=254)


def _seven_bits(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return digits in [-128, -1] with value + 64 * 129 = (hi + 128) * 128 + (lo + 128)."""
    hi = torch.mul(values.add_(64 * 129), 1 / 128).floor_()
    values.sub_(hi, alpha=128).sub_(128)
    return hi.sub_(128), values


KERNELS: dict[str, Kernel] = {
    "row": _row_product,
    "packed": _packed_product,
    "decoded": _decoded_product,
    "split": _split_product,
}


class INT8Codec(Codec):
    """One byte per weight; an fp32 scale and the integer sum of each row.

    The scale is rounded up to a bf16 value, so that kernels that take bf16 scales lose nothing.
    """

    name = "int8"
    lossless = False

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
        """Compute the product on the encoded rows, with the kernel for this number of rows of activations."""
        product = self._kernel(x)(x, encoded, scratch)
        return product if bias is None else product.add_(bias)

    def wants_whole(self, x: LinearInput) -> bool:
        """Return False: any range of rows gives the same bits."""
        return False

    def _kernel(self, x: LinearInput) -> Kernel:
        return KERNELS[kernel_for(*x.shape, x.given_dtype)]
