"""INT8 with one symmetric scale an output channel (LLM.int8(), arXiv:2208.07339; SmoothQuant, arXiv:2211.10438)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import CodecError
from .base import Codec, Encoded, LinearInput, Scratch, Segment, bf16_at_least, columns_of, linear_in_steps
from .kernels import KernelSelector, int8_product_saturates, row_class

_LEVELS = 127
_BLOCK_ELEMENTS = 1 << 18
_MOST_SUMMED_COLUMNS = 1 << 17
"""fp32 sums so many integers of 7 bits without rounding."""
_PACKED_COLUMNS = 32
_PACKED_ROWS = 4
_MOST_PACKED_ROWS = 32
_LEAST_SPLIT_ROWS = 5
_FOLD = 2


class INT8Codec(Codec):
    """One byte a weight; a fp32 scale and the integer sum of each row.

    The scale is rounded up to a bf16 value when it is chosen, so that kernels that take bf16 scales lose nothing.

    Args:
        kernels: the measured choice of kernels, shared between codecs.
    """

    name = "int8"
    lossless = False

    def __init__(self, kernels: KernelSelector | None = None) -> None:
        self.kernels = kernels or KernelSelector()

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
        block = torch.empty((min(step, n), columns))
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
        return out.copy_(encoded["data"]).mul_(encoded["scale"].to(out.dtype)[:, None])

    def linear(self, x: LinearInput, encoded: Encoded, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        """Product on the encoded rows by the kernel that measures fastest for this number of rows."""
        data = encoded["data"]
        n, k = data.shape
        candidates: dict[str, Callable[[], torch.Tensor]] = {}
        if x.rows <= _MOST_PACKED_ROWS and k % _PACKED_COLUMNS == 0 and n % _PACKED_ROWS == 0:
            candidates["packed"] = lambda: _packed_product(x, encoded)
            if x.rows == 1 and n % (_PACKED_ROWS * _FOLD) == 0:
                candidates["folded"] = lambda: _folded_product(x, encoded)
        if x.rows >= _LEAST_SPLIT_ROWS or not candidates:
            candidates["decoded"] = lambda: linear_in_steps(x, encoded, None, self.decode, scratch)
        if x.rows >= _LEAST_SPLIT_ROWS:
            candidates["split"] = lambda: _split_product(x, encoded)
        if len(candidates) == 1:
            product = next(iter(candidates.values()))()
        else:
            key = (self.name, row_class(x.rows), n.bit_length(), k, x.x2d.dtype, *candidates)
            product = self.kernels.run(key, candidates, work=n)
        return product if bias is None else product.add_(bias)


def _packed_product(x: LinearInput, encoded: Encoded) -> torch.Tensor:
    """Few rows: torch's weight-only kernel, which reads each weight byte once. Its only fast form takes bf16.

    Shapes it does not divide (32 columns, 4 rows) crash it; the caller checks.
    """
    activations = x.derived("bf16", lambda x2d: x2d.to(torch.bfloat16))
    assert isinstance(activations, torch.Tensor)
    product = torch._weight_int8pack_mm(activations, encoded["data"], encoded["scale"].to(torch.bfloat16))
    return product.to(x.x2d.dtype)


def _folded_product(x: LinearInput, encoded: Encoded) -> torch.Tensor:
    """One row, by the same kernel, with the weight seen as `[n / 2, 2 k]` and the row as `[[x, 0], [0, x]]`.

    The kernel reads four rows of the weight side by side. In rows twice as long the processor's prefetcher, which
    starts anew with each, keeps up with the memory: 20 GB/s instead of 14 for k = 2048. The products with zeros cost
    nothing while the memory is what limits. Scales differ inside a folded row, so they are applied afterwards.
    """
    data, scale = encoded["data"], encoded["scale"]
    n, k = data.shape
    folded = x.derived("folded", _fold)
    ones = x.derived(("ones", n), lambda x2d: torch.ones(n // _FOLD, dtype=torch.bfloat16))
    assert isinstance(folded, torch.Tensor) and isinstance(ones, torch.Tensor)
    product = torch._weight_int8pack_mm(folded, data.view(n // _FOLD, _FOLD * k), ones)
    return product.t().reshape(1, n).to(scale.dtype).mul_(scale).to(x.x2d.dtype)


def _fold(x2d: torch.Tensor) -> torch.Tensor:
    k = x2d.shape[1]
    folded = torch.zeros((_FOLD, _FOLD * k), dtype=torch.bfloat16)
    for part in range(_FOLD):
        folded[part, part * k : (part + 1) * k] = x2d[0]
    return folded


def _split_product(x: LinearInput, encoded: Encoded) -> torch.Tensor:
    """Many rows: integer product with each activation written as two integers, `hi * base + lo`.

    One 8-bit number a value would not do for rows with outliers, which real models have; two cost a second product and
    leave a relative error of 2**-14 of the largest value of the row, so outliers need no special case. Where the
    integer product saturates, digits are taken in [0, 127] and moved to [-128, -1]: oneDNN adds the 128 back, and
    127 * 127 * 2 fits its 16-bit sums; the offset is taken out again through `row_sum`.
    """
    data, scale = encoded["data"], encoded["scale"]
    digits: torch.Tensor
    row_scale: torch.Tensor
    if int8_product_saturates():
        digits, row_scale = x.derived("digits7", _digits_of_seven_bits)  # type: ignore[misc]
        base, offset = 128, 64 * 129
    else:
        digits, row_scale = x.derived("digits8", _digits_of_eight_bits)  # type: ignore[misc]
        base, offset = 254, 0
    product = torch._int_mm(digits, data.t())
    m = x.rows
    # In fp32, as int32 would overflow; operations on mixed dtypes take several times as long.
    total = product[:m].float().mul_(base).add_(product[m:].float())
    if offset:
        total.add_(encoded["row_sum"].float(), alpha=offset)
    return total.mul_(row_scale).mul_(scale).to(x.x2d.dtype)


def _scaled(x2d: torch.Tensor, largest_integer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as rounded multiples, in fp32, of a scale `[M, 1]` that makes the largest value `largest_integer`."""
    values = x2d.float()
    largest = torch.maximum(values.amax(dim=1, keepdim=True), values.amin(dim=1, keepdim=True).neg_())
    scale = torch.where(largest > 0, largest / largest_integer, torch.ones_like(largest))
    return torch.div(values, scale).round_(), scale


def _digits_of_eight_bits(x2d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits `[2M, K]` int8 with value = hi * 254 + lo, both in [-127, 127], and the scale `[M, 1]` of a row."""
    value, scale = _scaled(x2d, 127 * 254)
    m = value.shape[0]
    digits = torch.empty((2 * m, value.shape[1]), dtype=torch.int8)
    hi = torch.mul(value, 1 / 254).round_()
    digits[:m], digits[m:] = hi, value.sub_(hi, alpha=254)
    return digits, scale


def _digits_of_seven_bits(x2d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits `[2M, K]` int8 in [-128, -1] with value + 64 * 129 = (hi + 128) * 128 + (lo + 128)."""
    value, scale = _scaled(x2d, 63 * 128)
    m = value.shape[0]
    digits = torch.empty((2 * m, value.shape[1]), dtype=torch.int8)
    hi = torch.mul(value.add_(64 * 129), 1 / 128).floor_()
    value.sub_(hi, alpha=128).sub_(128)
    digits[:m], digits[m:] = hi.sub_(128), value
    return digits, scale
