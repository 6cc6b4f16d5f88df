"""Read GPTQ and AWQ: packed codes of a weight `[out, in]`, stored as `[in, out]`, with zero points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ....storage import TensorExtent
from .bits import STREAM_BITS, unpack
from .parts import Parts, Settings, UnreadParts, allow, matrix_shape, require
from .scaled import Grid, ScaledMatrix, group_size, stored_groups
from .tensors import Files, LogicalTensor, Rows

_AWQ_BITS = 4
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The position in a word of the code of each of 8 columns."""
_ONE_IN_EACH = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def gptq_matrix(name: str, parts: Parts, settings: Settings) -> LogicalTensor:
    """Return a GPTQ weight with 2, 3, 4 or 8 bits.

    Parts: `qweight` int32 `[in * bits / 32, out]`, `qzeros` int32 `[groups, out * bits / 32]` (in the first version of
    the format the zero points minus one), `scales` `[groups, out]` and, if columns are out of order, `g_idx`.

    Raises:
        UnreadParts: the parts do not form such a weight.
    """
    allow(parts, "qweight", "qzeros", "scales", "g_idx")
    weight, zeros, scales = _words(parts)
    n_groups, rows = matrix_shape(scales)
    bits = zeros.shape[1] * 32 // rows
    columns = weight.shape[0] * 32 // bits if bits else 0
    if bits not in STREAM_BITS or zeros.shape != (n_groups, rows * bits // 32) or weight.shape[1] != rows:
        raise UnreadParts(_misfit(parts))
    order = parts.get("g_idx")
    if order is not None and order.shape != (columns,):
        raise UnreadParts(_misfit(parts))
    first_version = settings.quantization.get("checkpoint_format", "gptq") == "gptq"

    def codes(files: Files) -> Rows:
        words = files.whole(weight)
        return lambda start, stop: unpack(words[:, start:stop].T, bits)

    def zero_points(files: Files) -> torch.Tensor:
        words = files.whole(zeros)
        if first_version and bits != 3:
            # Add to whole words: a zero point of 0 borrowed from its neighbor when it was stored.
            words = words + _ONE_IN_EACH[bits]
        found = unpack(words, bits)
        return (found + 1) & 7 if first_version and bits == 3 else found

    return _matrix(name, (rows, columns), weight, scales, codes, zero_points, order, settings)


def awq_matrix(name: str, parts: Parts, settings: Settings) -> LogicalTensor:
    """Return an AWQ weight in the GEMM layout.

    Parts: `qweight` int32 `[in, out / 8]`, `qzeros` int32 `[groups, out / 8]` and `scales` `[groups, out]`.

    Raises:
        UnreadParts: the parts do not form such a weight.
    """
    allow(parts, "qweight", "qzeros", "scales")
    weight, zeros, scales = _words(parts)
    n_groups, rows = matrix_shape(scales)
    if weight.shape[1] * 8 != rows or zeros.shape != (n_groups, rows // 8):
        raise UnreadParts(_misfit(parts))

    def codes(files: Files) -> Rows:
        words = files.whole(weight)

        def read(start: int, stop: int) -> torch.Tensor:
            first = start // 8
            return _in_order(words[:, first : -(-stop // 8)])[:, start - 8 * first : stop - 8 * first].T

        return read

    def zero_points(files: Files) -> torch.Tensor:
        return _in_order(files.whole(zeros))

    return _matrix(name, (rows, weight.shape[0]), weight, scales, codes, zero_points, None, settings)


def _words(parts: Parts) -> tuple[TensorExtent, TensorExtent, TensorExtent]:
    weight, zeros, scales = require(parts, "qweight", "qzeros", "scales")
    for extent in (weight, zeros):
        if extent.dtype != "I32" or not all(matrix_shape(extent)):
            raise UnreadParts(f"{extent.name} is {extent.dtype}, not I32")
    if scales.dtype not in ("F16", "BF16", "F32"):
        raise UnreadParts(f"{scales.name} is {scales.dtype}, not a float")
    return weight, zeros, scales


def _misfit(parts: Parts) -> str:
    shapes = ", ".join(f"{part} {list(extent.shape)}" for part, extent in sorted(parts.items()))
    return f"these shapes do not match: {shapes}"


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """Return the codes `[rows, 8 * n]` of AWQ words `[rows, n]`."""
    codes = unpack(words, _AWQ_BITS).view(len(words), -1, 8)
    return codes[..., list(_AWQ_PLACES)].view(len(words), -1)


def _matrix(
    name: str,
    shape: tuple[int, int],
    weight: TensorExtent,
    scales: TensorExtent,
    codes: Callable[[Files], Rows],
    zero_points: Callable[[Files], torch.Tensor],
    order: TensorExtent | None,
    settings: Settings,
) -> LogicalTensor:
    n_groups = scales.shape[0]
    given: Any = settings.quantization.get("group_size", settings.quantization.get("q_group_size"))
    group = given if isinstance(given, int) and given > 0 else None

    def grid(files: Files) -> Grid:
        groups: int | torch.Tensor
        if order is None:
            groups = group_size(shape[1], n_groups, group)
        else:
            groups = stored_groups(files.whole(order), n_groups)
        scale = files.whole(scales).to(torch.float32)
        return Grid(scale.T.contiguous(), zero_points(files).T.to(torch.float32).contiguous(), 1, groups)

    held_bytes = weight.n_bytes + 12 * n_groups * shape[0] + 8 * shape[1]
    return ScaledMatrix(name, weight.path, shape, settings.dtype_beside(scales), codes, grid, held_bytes)
