"""How errors of quantised columns are made up for by later ones, from the inputs of a layer."""

from __future__ import annotations

import torch

from ...errors import CodecError
from ..base import Compensation
from .rotation import rotate

_DAMPING = 0.1
"""Added to the mean square of each input, as a share of their mean: few inputs leave directions undetermined."""
_MOST_NORM = 8
"""Rows with a larger norm, in units of the median, count as this for the damping: in trained models those of a text's
first token may be hundreds of times as large as all others.
"""
_MOST_ATTEMPTS = 6
_ROWS_TOGETHER = 1024
_COLUMNS_TOGETHER = 1024


def error_feedback(inputs: torch.Tensor, order: torch.Tensor) -> Compensation:
    """Return the compensation for rotated weights whose columns are encoded in a given order.

    Args:
        inputs: `[m, columns]` of any floating dtype, not rotated.
        order: int64 `[columns]`.

    Raises:
        CodecError: the inputs are not finite, or so large that squares overflow.
    """
    moments = _moments(inputs, order.flip(0))
    diagonal = moments.diagonal()
    norms = torch.linalg.vector_norm(inputs, dim=1, dtype=torch.float32)
    mean = norms.clamp(max=_MOST_NORM * norms.median()).square().sum() / len(diagonal)
    if not bool(torch.isfinite(diagonal).all()):
        raise CodecError("inputs of a layer are infinite or NaN")
    if float(mean) == 0:
        diagonal.fill_(1)
    for attempt in range(_MOST_ATTEMPTS):
        diagonal.add_(mean * _DAMPING * 10**attempt)
        factor, failed = torch.linalg.cholesky_ex(moments)
        if not bool(failed):
            break
    else:
        raise CodecError("inputs of a layer cannot be factorised")
    del moments, diagonal
    root = factor.flip(0, 1)  # of reversed columns a lower factor becomes an upper one
    on_diagonal = root.diagonal().clone()
    return Compensation(root.div_(on_diagonal), on_diagonal.square())


def _moments(inputs: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return sums of products of rotated inputs, fp32 `[columns, columns]`; only the lower triangle is complete."""
    columns = inputs.shape[1]
    sums = torch.zeros((columns, columns), dtype=torch.float32)
    for part in inputs.split(_ROWS_TOGETHER):
        rotated = rotate(part)[:, order].t().contiguous()
        for start in range(0, columns, _COLUMNS_TOGETHER):
            stop = min(start + _COLUMNS_TOGETHER, columns)
            sums[start:stop, :stop].addmm_(rotated[start:stop], rotated[:stop].t())
    return sums
