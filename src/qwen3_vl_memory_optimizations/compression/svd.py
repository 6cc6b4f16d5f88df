"""Truncated SVD: two thin factors in the place of a matrix of low rank (LoRA, arXiv:2106.09685, has the form)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import CodecError
from .base import Codec, Encoded, LinearInput, Scratch, Segment, columns_of

_LEAST_ENERGY = 0.95
_TOLERANCE = 0.01
_ROUNDING = 2.0**-8
"""What the bf16 factors add to the relative error, at most."""


class SVDCodec(Codec):
    """`left @ right` with `left` `[rows, rank]`, paged, and `right` `[rank, columns]`, shared by all rows; both bf16.

    `fit` finds the rank. It refuses a tensor whose factors would be no smaller than the tensor in 16 bits: dense
    trained weights are, for any error that a model survives (docs/compression.md).

    Args:
        tolerance: the largest relative error (of the Frobenius norm). The energy kept is at least 95 % besides.
        rank: of a tensor that is encoded already; `fit` finds it.
        right: the right factor that `encode` projects on; `fit` finds it.
    """

    name = "svd"
    lossless = False
    fallback = "int8"

    def __init__(
        self, *, tolerance: float = _TOLERANCE, rank: int | None = None, right: torch.Tensor | None = None
    ) -> None:
        self.tolerance = tolerance
        self.rank = rank
        self._right = right

    @property
    def stored_name(self) -> str:
        """`svd`, with the rank of a tensor that it was fitted to."""
        return self.name if self.rank is None else f"{self.name}:{self.rank}"

    def restored(self, parameters: str) -> Codec:
        """Return the codec of a stored tensor: it decodes and multiplies."""
        return SVDCodec(tolerance=self.tolerance, rank=int(parameters))

    def fit(self, values: Callable[[], torch.Tensor]) -> Codec:
        """Find the least rank that keeps the energy and the tolerance.

        Raises:
            CodecError: NaN or infinite values, or a rank that saves nothing.
        """
        loaded = values()
        matrix = loaded.reshape(loaded.shape[0], -1).double()
        if not bool(matrix.isfinite().all()):
            raise CodecError("SVD cannot factor NaN or infinite values")
        n, columns = matrix.shape
        wide = n < columns
        energies, vectors = torch.linalg.eigh(matrix @ matrix.t() if wide else matrix.t() @ matrix)
        energies = energies.clamp_(min=0).flip(0)
        total = float(energies.sum())
        allowed = min(1 - _LEAST_ENERGY, max(self.tolerance - _ROUNDING, 0.0) ** 2) * total
        left_over = total - energies.cumsum(0)
        rank = 1 + int((left_over > allowed).sum())
        if rank * (n + columns) >= n * columns:
            raise CodecError(
                f"SVD would need rank {rank} of {min(n, columns)} for a relative error of {self.tolerance:g}: its "
                "factors would be no smaller than the tensor"
            )
        vectors = vectors.flip(1)[:, :rank]
        right = vectors.t() @ matrix if wide else vectors.t()
        right = right / right.norm(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float64).tiny)
        return SVDCodec(tolerance=self.tolerance, rank=rank, right=right.to(torch.float32))

    def supports(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Floating-point tensors of two dimensions or more."""
        return dtype.is_floating_point and len(shape) >= 2 and 0 not in shape

    def segments(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Segment, ...]:
        """`left` bf16 `[rows, rank]` and `right` bf16 `[rank, columns]`, shared.

        Raises:
            CodecError: the codec was not fitted to a tensor.
        """
        rank = self._fitted_rank()
        return (
            Segment("left", torch.bfloat16, (shape[0], rank)),
            Segment("right", torch.bfloat16, (rank, columns_of(shape)), shared=True),
        )

    def _fitted_rank(self) -> int:
        if self.rank is None:
            raise CodecError("SVD has no rank until it is fitted to a tensor")
        return self.rank

    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Project rows `[n, ...]` of the tensor that the codec was fitted to.

        Raises:
            CodecError: it was not; a stored tensor cannot be written to.
        """
        if self._right is None:
            raise CodecError("SVD encodes the tensor it was fitted to, and no other values")
        projected = rows.reshape(rows.shape[0], -1).float() @ self._right.t()
        return {"left": projected.bfloat16(), "right": self._right.bfloat16()}

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        """`left @ right`, computed in fp32 or the dtype of `out`, whichever is more exact."""
        dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        return out.copy_(encoded["left"].to(dtype) @ encoded["right"].to(dtype))

    def linear(self, x: LinearInput, encoded: Encoded, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        """Two thin products in the dtype of `x`; the first is the same for every range of rows."""
        right, dtype = encoded["right"], x.x2d.dtype
        key = ("svd", right.data_ptr(), right.shape)
        thin = x.derived(key, lambda x2d: F.linear(x2d, right.to(dtype)))
        assert isinstance(thin, torch.Tensor)
        return F.linear(thin, encoded["left"].to(dtype), bias)
