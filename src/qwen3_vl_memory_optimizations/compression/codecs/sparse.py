"""Sparse: store only nonzero values and their positions. Lossless; worthwhile only for mostly zero tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from ...errors import CodecError
from ..base import Codec, Encoded, LinearInput, Scratch, Segment, columns_of, linear_in_steps

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MOST_COLUMNS = 1 << 15
"""Column indices are int16."""


class SparseCodec(Codec):
    """Stores the nonzero values of each row, padded to the count of the fullest row, and their positions.

    `fit` counts them and chooses the smaller form: `mask`, one bit per column, or `csr`, one 16-bit index per value.
    Stored values keep their bits, including NaN, infinities and negative zeros. All rows have the same length, so
    ranges can be paged and single rows looked up as with other codecs; one full row makes the codec useless.

    Args:
        threshold: values of at most this magnitude are dropped too; 0 is lossless.
        form, width, dtype: of a tensor that is already encoded; otherwise `fit` determines them.
    """

    name = "sparse"
    lossless = True

    def __init__(
        self,
        *,
        threshold: float = 0.0,
        form: str | None = None,
        width: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.threshold = threshold
        self.form, self.width, self.dtype = form, width, dtype

    @property
    def stored_name(self) -> str:
        """`sparse`, with the form, width and dtype of the tensor it was fitted to."""
        if self.form is None:
            return self.name
        return f"{self.name}:{self.form},{self.width},{str(self.dtype).removeprefix('torch.')}"

    def restored(self, parameters: str) -> Codec:
        """Return the codec of a stored tensor."""
        form, width, dtype = parameters.split(",")
        return SparseCodec(form=form, width=int(width), dtype=_DTYPES[dtype])

    def fit(self, values: Callable[[], torch.Tensor]) -> Codec:
        """Choose the form for a tensor.

        Raises:
            CodecError: the encoded form would not be smaller than the tensor.
        """
        loaded = values()
        matrix = loaded.reshape(loaded.shape[0], -1)
        width = max(1, int(self._kept(matrix).sum(dim=1).max()))  # a zero-byte tensor cannot be paged
        columns, itemsize = matrix.shape[1], matrix.element_size()
        mask_bytes, csr_bytes = -(-columns // 8) + width * itemsize, width * (2 + itemsize)
        form = "csr" if csr_bytes < mask_bytes and columns <= _MOST_COLUMNS else "mask"
        row_bytes = csr_bytes if form == "csr" else mask_bytes
        if row_bytes >= columns * itemsize:
            raise CodecError(
                f"sparse would take {row_bytes} bytes per row of {columns * itemsize}: its fullest row has {width} "
                f"nonzero values of {columns}; use another codec"
            )
        return SparseCodec(threshold=self.threshold, form=form, width=width, dtype=matrix.dtype)

    def _kept(self, matrix: torch.Tensor) -> torch.Tensor:
        if self.threshold > 0:
            return ~(matrix.abs() <= self.threshold)  # written this way, NaN is kept
        return matrix.contiguous().view(_INTEGERS[matrix.element_size()]) != 0

    def supports(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Return True for floating-point tensors of two or more dimensions."""
        return dtype in _DTYPES.values() and len(shape) >= 2 and 0 not in shape

    def segments(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Segment, ...]:
        """Return `data` uint8 `[rows, row_bytes]`: the values of a row, then their positions.

        Raises:
            CodecError: the codec was not fitted to a tensor.
        """
        if self.form is None:
            raise CodecError("the sparse codec has no width until it is fitted to a tensor; call fit() first")
        places_bytes = 2 * self.width if self.form == "csr" else -(-columns_of(shape) // 8)
        return (Segment("data", torch.uint8, (shape[0], self._values_bytes + places_bytes)),)

    @property
    def _values_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode rows `[n, ...]` of the tensor that the codec was fitted to.

        Raises:
            CodecError: a row has more nonzero values than the width, or the codec was not fitted.
        """
        matrix = rows.reshape(rows.shape[0], -1).to(self.dtype)
        n, columns = matrix.shape
        data = torch.zeros(self.segments((n, columns), self.dtype)[0].shape, dtype=torch.uint8)
        kept = self._kept(matrix)
        counts = kept.sum(dim=1, dtype=torch.int32)
        if int(counts.max()) > self.width:
            raise CodecError(f"a row has {int(counts.max())} nonzero values, but the codec was fitted to {self.width}")
        filled = torch.arange(self.width) < counts[:, None]
        values = torch.zeros((n, self.width), dtype=self.dtype)
        values[filled] = matrix[kept]
        data[:, : self._values_bytes] = values.view(torch.uint8).view(n, -1)
        if self.form == "csr":
            # Unused slots point at a zero column; a row without zeros has no unused slots.
            places = kept.int().argmin(dim=1).to(torch.int16)[:, None].repeat(1, self.width)
            places[filled] = kept.nonzero()[:, 1].to(torch.int16)
            data[:, self._values_bytes :] = places.view(torch.uint8).view(n, -1)
        else:
            bits = np.packbits(kept.numpy(), axis=1, bitorder="little")
            data[:, self._values_bytes :] = torch.from_numpy(bits)
        return {"data": data}

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        """Fill `out` with zeros and write the values at their positions, in the dtype of `out`."""
        values, places = self._parts(encoded["data"])
        out.zero_()
        if self.form == "csr":
            return out.scatter_(1, places.view(torch.int16).long(), values.to(out.dtype))
        bits = np.unpackbits(places.numpy(), axis=1, count=out.shape[1], bitorder="little")
        mask = torch.from_numpy(bits.view(np.bool_))
        filled = torch.arange(self.width) < mask.sum(dim=1, dtype=torch.int32)[:, None]
        return out.masked_scatter_(mask, values.to(out.dtype).masked_select(filled))

    def _parts(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values `[n, width]` and the bytes of their positions."""
        # Copies: values may be unaligned because row sizes are arbitrary, and `contiguous` may return views.
        values = torch.empty((len(data), self.width), dtype=self.dtype)
        values.view(torch.uint8).copy_(data[:, : self._values_bytes])
        places = data[:, self._values_bytes :]
        return values, torch.empty(places.shape, dtype=torch.uint8).copy_(places)

    def linear(self, x: LinearInput, encoded: Encoded, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        """Compute with torch's CSR kernel, which is several times as fast, or else decode."""
        if self.form != "csr":
            return linear_in_steps(x, encoded, bias, self.decode, scratch)
        product = self._csr_product(x, encoded)
        return product if bias is None else product.add_(bias)

    def wants_whole(self, x: LinearInput) -> bool:
        """Return False for the CSR kernel, which computes each row independently."""
        return self.form != "csr" and super().wants_whole(x)

    def _csr_product(self, x: LinearInput, encoded: Encoded) -> torch.Tensor:
        """Compute torch's product of CSR and dense in fp32; its bf16 product is slower than fp32 with casts."""
        values, places = self._parts(encoded["data"])
        n = len(values)
        _expect_csr()
        starts = torch.arange(0, (n + 1) * self.width, self.width)
        rows = torch.sparse_csr_tensor(
            starts, places.view(torch.int16).reshape(-1).long(), values.reshape(-1).float(), (n, x.x2d.shape[1])
        )
        return (rows @ x.x2d.t().float()).t().to(x.x2d.dtype).contiguous()


@lru_cache(maxsize=1)
def _expect_csr() -> None:
    """Create the first CSR tensor, for which torch warns once that CSR support is in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))
