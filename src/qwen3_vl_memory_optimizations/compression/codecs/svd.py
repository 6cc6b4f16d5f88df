"""Truncated SVD: two thin factors replace a low-rank matrix (the form of LoRA, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...errors import CodecError
from ..base import Codec, Encoded, LinearInput, Scratch, Segment, columns_of
from ..kernels import has_native_bf16

_LEAST_ENERGY = 0.95
_TOLERANCE = 0.01
SKETCHES = (32, 128)
"""Ranks to try before factoring the whole matrix, which takes cubic time."""
_MOST_CAST = 128
"""Rows of activations times rank up to which bf16 factors are cast to fp32 even if bf16 products are fast."""
_ROUNDING = 2.0**-8
"""Maximum relative error added by the bf16 factors."""


class SVDCodec(Codec):
    """`left @ right`, both bf16: `left` `[rows, rank]` is paged, `right` `[rank, columns]` is shared by all rows.

    `fit` determines the rank. It refuses a tensor whose factors would not be smaller than the tensor in 16 bits, which
    holds for dense trained weights at any error that a model tolerates (docs/compression.md).

    Args:
        tolerance: maximum relative error (in the Frobenius norm). At least 95 % of the energy is kept as well.
        rank: of a tensor that is already encoded; otherwise `fit` determines it.
        right: the right factor that `encode` projects on; set by `fit`.
    """

    name = "svd"
    lossless = False
    fallback = "int8"

    def __init__(
        self,
        *,
        tolerance: float = _TOLERANCE,
        rank: int | None = None,
        right: torch.Tensor | None = None,
    ) -> None:
        self.tolerance = tolerance
        self.rank = rank
        self._right = right

    @property
    def stored_name(self) -> str:
        """`svd`, with the rank of the tensor it was fitted to."""
        return self.name if self.rank is None else f"{self.name}:{self.rank}"

    def restored(self, parameters: str) -> Codec:
        """Return the codec of a stored tensor, which can decode and multiply."""
        return SVDCodec(tolerance=self.tolerance, rank=int(parameters))

    def fit(self, values: Callable[[], torch.Tensor]) -> Codec:
        """Find the lowest rank that keeps the energy and the tolerance.

        Raises:
            CodecError: NaN or infinite values, or a rank that saves nothing.
        """
        loaded = values()
        matrix = loaded.reshape(loaded.shape[0], -1).double()
        if not bool(matrix.isfinite().all()):
            raise CodecError("SVD cannot factor NaN or infinite values; use another codec")
        n, columns = matrix.shape
        total = float(matrix.square().sum())
        allowed = min(1 - _LEAST_ENERGY, max(self.tolerance - _ROUNDING, 0.0) ** 2) * total
        for width in (*SKETCHES, None):
            if width is not None and width > min(n, columns) // 2:
                continue
            energies, right = _spectrum(matrix) if width is None else _leading_spectrum(matrix, width)
            left_over = total - energies.cumsum(0)
            rank = 1 + int((left_over > allowed).sum())
            if rank <= len(energies):
                break
        if rank * (n + columns) >= n * columns:
            raise CodecError(
                f"SVD would need rank {rank} of {min(n, columns)} for a relative error of {self.tolerance:g}: its "
                "factors would be no smaller than the tensor"
            )
        return SVDCodec(tolerance=self.tolerance, rank=rank, right=right[:rank].float())

    def supports(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Return True for floating-point tensors of two or more dimensions."""
        return dtype.is_floating_point and len(shape) >= 2 and 0 not in shape

    def segments(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Segment, ...]:
        """Return `left` bf16 `[rows, rank]` and the shared `right` bf16 `[rank, columns]`.

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
            raise CodecError("SVD has no rank until it is fitted to a tensor; call fit() first")
        return self.rank

    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Project rows `[n, ...]` of the tensor that the codec was fitted to.

        Raises:
            CodecError: the codec was not fitted; a stored tensor cannot be written to.
        """
        if self._right is None:
            raise CodecError("SVD encodes only the tensor it was fitted to; fit the codec to this tensor first")
        projected = rows.reshape(rows.shape[0], -1).float() @ self._right.t()
        return {"left": projected.bfloat16(), "right": self._right.bfloat16()}

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        """Write `left @ right`, computed in fp32 or the dtype of `out`, whichever is more precise."""
        dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        return out.copy_(encoded["left"].to(dtype) @ encoded["right"].to(dtype))

    def linear(self, x: LinearInput, encoded: Encoded, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        """Compute two thin products; the first is the same for every range of rows.

        They are in fp32 unless bf16 is faster: for thin factors the casts cost less than the fixed 20 microseconds of a
        bf16 product.
        """
        left, right, dtype = encoded["left"], encoded["right"], x.x2d.dtype
        narrow = dtype == torch.bfloat16 and x.rows * len(right) > _MOST_CAST and has_native_bf16()
        computed = torch.bfloat16 if narrow else torch.promote_types(dtype, torch.float32)
        key = ("svd", right.data_ptr(), right.shape, computed)
        thin = x.derived(key, lambda x2d: F.linear(x2d.to(computed), right.to(computed)))
        assert isinstance(thin, torch.Tensor)
        found = F.linear(thin, left.to(computed)).to(dtype)
        return found if bias is None else found.add_(bias)


def _spectrum(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return energies (squared singular values, descending) of an fp64 matrix and its right singular vectors as rows.

    They are computed from the smaller Gram matrix. That halves the digits of precision, but fp64 has plenty.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    energies, vectors = torch.linalg.eigh(matrix @ matrix.t() if wide else matrix.t() @ matrix)
    right = vectors.flip(1).t() @ matrix if wide else vectors.flip(1).t()
    return energies.clamp_(min=0).flip(0), _normalized(right)


def _leading_spectrum(matrix: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `width` energies and vectors, by random projection and one power iteration (arXiv:0909.4061).

    Exact if the rank is at most `width`. Whatever the projection misses counts as lost, so an error is never hidden.
    """
    start = torch.randn(matrix.shape[1], width, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start).Q
    basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    _, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return values.square(), _normalized(right)


def _normalized(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_(min=torch.finfo(rows.dtype).tiny)
