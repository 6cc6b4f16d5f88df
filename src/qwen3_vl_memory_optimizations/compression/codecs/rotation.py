"""A fixed orthonormal rotation of the last dimension that spreads outliers (QuaRot, arXiv:2404.00456).

`y = x @ w.T` equals `(x @ R) @ (w @ R).T` for any orthonormal R. R is a Hadamard matrix with random signs, so outliers
in one channel are spread over all channels. Rotated activations and weights have no outlier channels, so 8 bits per
value suffice. R is the Kronecker product of two small factors, which costs 2 (32 + 64) operations per value for 2,048
columns. Its signs are fixed: encoded checkpoints depend on them.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache

import torch

from ..base import STEP_ELEMENTS

_INNER = 64
_LARGEST_BLOCK = 4096


def rotate(matrix: torch.Tensor) -> torch.Tensor:
    """Return `matrix @ R` for floating-point `[rows, columns]`, in fp32.

    Columns are rotated in blocks of the largest power of two that divides their number (at most 4,096).
    """
    return _in_steps(matrix, inverse=False)


def rotate_back(matrix: torch.Tensor) -> torch.Tensor:
    """Return `matrix @ R.T` in fp32: the inverse of `rotate`, up to rounding."""
    return _in_steps(matrix, inverse=True)


@lru_cache(maxsize=32)
def rotation_signs(columns: int) -> torch.Tensor:
    """Return the signs that the native core multiplies each block of columns by before its Hadamard transform, fp32.

    R is a product of two signed Hadamard matrices, which is one Hadamard matrix with the products of their signs. The
    result has the size of a block, and differs from `rotate` by rounding.
    """
    outer, inner = _factors(columns)
    with torch.inference_mode(False):
        return torch.outer(outer[:, 0].sign(), inner[:, 0].sign()).view(-1).contiguous()


def _in_steps(matrix: torch.Tensor, *, inverse: bool) -> torch.Tensor:
    rows, columns = matrix.shape
    step = max(1, STEP_ELEMENTS // columns)
    if rows <= step:
        return _rotate(matrix.float(), inverse)
    out = torch.empty((rows, columns), dtype=torch.float32)
    for start in range(0, rows, step):
        out[start : start + step] = _rotate(matrix[start : start + step].float(), inverse)
    return out


def _rotate(matrix: torch.Tensor, inverse: bool) -> torch.Tensor:
    outer, inner = _factors(matrix.shape[1])
    if inverse:
        outer, inner = outer.t(), inner.t()
    a, b = outer.shape[0], inner.shape[0]
    rotated = torch.mm(matrix.reshape(-1, b), inner)
    if a > 1:
        blocks = rotated.view(-1, a, b)
        if len(blocks) == 1:
            rotated = torch.mm(outer.t(), blocks[0])
        else:
            rotated = torch.bmm(outer.t().expand(len(blocks), a, a), blocks)
    return rotated.view(matrix.shape)


@lru_cache(maxsize=32)
def _factors(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors A and B of R = A (x) B, fp32 and square, for this number of columns."""
    block = min(columns & -columns, _LARGEST_BLOCK)
    inner = min(block, _INNER)
    with torch.inference_mode(False):
        return _signed_hadamard(block // inner), _signed_hadamard(inner)


def _signed_hadamard(n: int) -> torch.Tensor:
    """Return `diag(signs) @ H / sqrt(n)`, orthonormal, `[n, n]`; n is a power of two."""
    hadamard = torch.ones((1, 1), dtype=torch.float32)
    while hadamard.shape[0] < n:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)), 0)
    draw = random.Random(n)  # `random()` gives the same numbers in every version of Python
    signs = torch.tensor([1.0 if draw.random() < 0.5 else -1.0 for _ in range(n)], dtype=torch.float32)
    return signs[:, None] * hadamard / math.sqrt(n)
