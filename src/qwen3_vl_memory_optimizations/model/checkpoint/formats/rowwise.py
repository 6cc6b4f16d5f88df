"""Read FP8 and compressed-tensors: codes in the weight's own rows, with scales for blocks of any shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ....storage import TensorExtent
from .bits import unpack
from .parts import Parts, Settings, UnreadParts, allow, matrix_shape, require
from .scaled import Grid, ScaledMatrix, stored_groups
from .tensors import Files, LogicalTensor, Rows

FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "F16", "BF16")
_PACKED_BITS = (2, 4, 8)


def fp8_matrix(name: str, parts: Parts, settings: Settings) -> LogicalTensor:
    """Return an FP8 weight: `weight` times `weight_scale_inv` (per block) or `weight_scale` (per row, or one for all).

    Raises:
        UnreadParts: the parts do not form such a weight.
    """
    allow(parts, "weight", "weight_scale", "weight_scale_inv")
    (codes,) = require(parts, "weight")
    if codes.dtype not in FP8:
        raise UnreadParts(f"weight is {codes.dtype}, not FP8, beside {', '.join(sorted(parts.keys() - {'weight'}))}")
    if len(parts) != 2:
        raise UnreadParts("there are both weight_scale and weight_scale_inv")
    scale = parts.get("weight_scale_inv") or parts["weight_scale"]
    block = settings.quantization.get("weight_block_size")
    return _matrix(name, codes, scale, None, None, [block or (128, 128)], settings)


def compressed_matrix(name: str, parts: Parts, settings: Settings) -> LogicalTensor:
    """Return a weight of compressed-tensors: INT8, FP8, or integers of a few bits packed into int32.

    Raises:
        UnreadParts: it is none of these.
    """
    allow(parts, "weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")
    schemes = _weight_schemes(settings.quantization)
    (scale,) = require(parts, "weight_scale")
    zero, order = parts.get("weight_zero_point"), parts.get("weight_g_idx")
    blocks = [tuple(each["block_structure"]) for each in schemes if isinstance(each.get("block_structure"), list)]
    blocks += [(1, each["group_size"]) for each in schemes if isinstance(each.get("group_size"), int)]
    if "weight_packed" not in parts:
        (codes,) = require(parts, "weight")
        if codes.dtype not in (*FP8, "I8"):
            raise UnreadParts(f"weight is {codes.dtype} beside weight_scale, neither INT8 nor FP8")
        return _matrix(name, codes, scale, zero, order, blocks, settings)
    if "weight" in parts:
        raise UnreadParts("there are both weight and weight_packed")
    packed, shape = require(parts, "weight_packed", "weight_shape")
    if packed.dtype != "I32":
        raise UnreadParts(f"weight_packed is {packed.dtype}, not I32")
    with Files() as files:
        rows, columns = (int(size) for size in files.whole(shape).flatten().tolist())
    words = matrix_shape(packed)
    widths = {each["num_bits"] for each in schemes if each.get("num_bits") in _PACKED_BITS} or set(_PACKED_BITS)
    fitting = [bits for bits in sorted(widths) if words == (rows, -(-columns // (32 // bits)))]
    if len(fitting) != 1:
        raise UnreadParts(
            f"weight_packed has shape {list(words)}, which for a weight of {[rows, columns]} is not one of "
            f"{', '.join(map(str, sorted(widths)))} bits"
        )
    (bits,) = fitting

    def codes_of(files: Files) -> Rows:
        return lambda start, stop: (
            unpack(files.rows(packed, start, stop), bits)[:, :columns].to(torch.int16) - (1 << bits - 1)
        )

    return _scaled(name, packed, (rows, columns), codes_of, scale, zero, order, blocks, settings, bits)


def eight_bit_matrix(name: str, parts: Parts, settings: Settings) -> LogicalTensor:
    """Return an 8-bit weight of bitsandbytes: INT8 rows, and the largest value of each in `SCB`.

    Raises:
        UnreadParts: the parts do not form such a weight, or use a layout of old GPUs.
    """
    allow(parts, "weight", "SCB", "weight_format")
    codes, largest = require(parts, "weight", "SCB")
    shape = matrix_shape(codes)
    if codes.dtype != "I8" or largest.shape not in ((shape[0],), (shape[0], 1)):
        raise UnreadParts(f"weight is {codes.dtype} {list(shape)} with SCB {list(largest.shape)}, not INT8 with rows")
    if "weight_format" in parts:
        with Files() as files:
            if files.whole(parts["weight_format"]).any():
                raise UnreadParts("weight_format is not 'row': save the weight again with a newer bitsandbytes")

    def grid(files: Files) -> Grid:
        return Grid(files.whole(largest).to(torch.float32).view(-1, 1) / 127, None, 1, shape[1])

    dtype = settings.dtype or torch.float16
    return ScaledMatrix(name, codes.path, shape, dtype, _stored(codes), grid, 4 * shape[0])


def _weight_schemes(quantization: Any) -> list[dict[str, Any]]:
    groups = quantization.get("config_groups") or {}
    return [
        group["weights"]
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]


def _stored(codes: TensorExtent) -> Callable[[Files], Rows]:
    return lambda files: lambda start, stop: files.rows(codes, start, stop)


def _matrix(
    name: str,
    codes: TensorExtent,
    scale: TensorExtent,
    zero: TensorExtent | None,
    order: TensorExtent | None,
    blocks: Iterable[Any],
    settings: Settings,
) -> LogicalTensor:
    return _scaled(name, codes, matrix_shape(codes), _stored(codes), scale, zero, order, blocks, settings, 8)


def _scaled(
    name: str,
    codes: TensorExtent,
    shape: tuple[int, int],
    codes_of: Callable[[Files], Rows],
    scale: TensorExtent,
    zero: TensorExtent | None,
    order: TensorExtent | None,
    blocks: Iterable[Any],
    settings: Settings,
    bits: int,
) -> LogicalTensor:
    rows, columns = shape
    if scale.dtype not in _SCALES:
        raise UnreadParts(f"the scales are {scale.dtype}; supported are {', '.join(_SCALES)}")
    grid_shape, block = _block(shape, scale.shape, blocks)
    if order is not None and order.shape != (columns,):
        raise UnreadParts(f"weight_g_idx has shape {list(order.shape)} for {columns} columns")

    def grid(files: Files) -> Grid:
        scales = files.whole(scale).to(torch.float32).view(grid_shape)
        zeros = None if zero is None else _zeros(files.whole(zero), grid_shape, bits)
        groups: int | torch.Tensor = block[1]
        if order is not None:
            given = files.whole(order)
            if not bool((given == -1).all()):  # the initial value: columns are in order
                groups = stored_groups(given, grid_shape[1])
        return Grid(scales, zeros, block[0], groups)

    held_bytes = 8 * grid_shape[0] * grid_shape[1] + 8 * columns
    return ScaledMatrix(name, codes.path, shape, settings.dtype_beside(scale), codes_of, grid, held_bytes)


def _block(
    shape: tuple[int, int], scale: tuple[int, ...], declared: Iterable[Any]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the scales' shape as a matrix, and the rows and columns that share a scale.

    Raises:
        UnreadParts: they do not cover the weight.
    """
    rows, columns = shape
    if scale in ((), (1,), (1, 1)):
        return (1, 1), (rows, columns)
    if scale in ((rows,), (rows, 1)):
        return (rows, 1), (1, columns)
    if len(scale) == 2 and 0 not in scale:
        for block in declared:
            if isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
                if scale == (-(-rows // block[0]), -(-columns // block[1])):
                    return (scale[0], scale[1]), (block[0], block[1])
        if scale[0] == rows and columns % scale[1] == 0:
            return (rows, scale[1]), (1, columns // scale[1])
    raise UnreadParts(f"scales of shape {list(scale)} do not fit a weight of {list(shape)}")


def _zeros(stored: torch.Tensor, grid_shape: tuple[int, int], bits: int) -> torch.Tensor:
    if stored.dtype == torch.int32 and tuple(stored.shape) != grid_shape:  # packed along the rows
        codes = unpack(stored.T, bits)[:, : grid_shape[0]].T
        stored = codes.to(torch.int16) - (1 << bits - 1)
    return stored.to(torch.float32).reshape(grid_shape)
