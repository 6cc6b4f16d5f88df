"""Read 4-bit weights of bitsandbytes: NF4 and FP4, in blocks over the flattened weight."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from ....storage import TensorExtent
from .parts import CONFIG_FLOATS, Parts, Settings, UnreadParts, allow, require
from .tensors import Files, LogicalTensor, Rows

_STATE = "weight.quant_state.bitsandbytes__"
_STATES = (f"{_STATE}nf4", f"{_STATE}fp4")
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


def four_bit_matrix(name: str, parts: Parts, settings: Settings) -> LogicalTensor:
    """Return a weight with two codes per byte, the first in the high bits.

    Parts: `weight` uint8 `[n / 2, 1]`, `weight.absmax` (the largest value per block, itself in 8 bits if there is
    `weight.nested_absmax`), `weight.quant_map` (the values of the codes), and a quant state as JSON in bytes.

    Raises:
        UnreadParts: the parts do not form such a weight.
    """
    allow(parts, "weight", "weight.absmax", "weight.quant_map", *_NESTED, *_STATES)
    state_part = next((part for part in _STATES if part in parts), _STATES[0])
    codes, absmax, meaning, state = require(parts, "weight", "weight.absmax", "weight.quant_map", state_part)
    with Files() as files:
        fields = _state(files.whole(state))
    shape = fields.get("shape")
    block = fields.get("blocksize")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape) or len(shape) != 2:
        raise UnreadParts(f"the quant state gives the shape {shape!r}, not that of a matrix")
    if not isinstance(block, int) or block < 1:
        raise UnreadParts(f"the quant state gives the block size {block!r}")
    n_values = math.prod(shape)
    if codes.dtype != "U8" or codes.n_bytes != -(-n_values // 2) or math.prod(absmax.shape) != -(-n_values // block):
        raise UnreadParts(
            f"weight is {codes.dtype} {list(codes.shape)} with {math.prod(absmax.shape)} blocks; a weight of {shape} "
            f"in blocks of {block} has {-(-n_values // 2)} bytes and {-(-n_values // block)} blocks"
        )
    if meaning.shape != (16,):
        raise UnreadParts(f"quant_map has shape {list(meaning.shape)}, not [16]")
    nested = None
    if absmax.dtype != "F32":
        nested = require(parts, *_NESTED)
        if absmax.dtype != "U8" or nested[1].shape != (256,):
            raise UnreadParts(f"absmax is {absmax.dtype} with a nested quant_map of {list(nested[1].shape)}")
    dtype = settings.dtype or CONFIG_FLOATS.get(str(fields.get("dtype")), torch.bfloat16)
    return FourBitMatrix(name, codes, (shape[0], shape[1]), dtype, absmax, meaning, block, nested, fields)


class FourBitMatrix(LogicalTensor):
    """A matrix of NF4 or FP4 codes (see `four_bit_matrix`)."""

    def __init__(
        self,
        name: str,
        codes: TensorExtent,
        shape: tuple[int, int],
        dtype: torch.dtype,
        absmax: TensorExtent,
        meaning: TensorExtent,
        block: int,
        nested: tuple[TensorExtent, ...] | None,
        state: Mapping[str, Any],
    ) -> None:
        super().__init__(name, codes.path, shape, dtype)
        self._codes, self._absmax, self._meaning = codes, absmax, meaning
        self._block, self._nested, self._state = block, nested, state
        self.held_bytes = 4 * math.prod(absmax.shape)

    def reader(self, files: Files) -> Rows:
        """Return a function that decodes rows; it holds the largest values of all blocks."""
        scales = self._scales(files)
        meaning = files.whole(self._meaning).to(torch.float32)
        columns, block = self.shape[1], self._block

        def read(start: int, stop: int) -> torch.Tensor:
            begin, end = start * columns, stop * columns
            both = files.data(self._codes, begin // 2, -(-end // 2))
            codes = torch.stack([both >> 4, both & 15], dim=-1).view(-1)[begin % 2 :][: end - begin]
            values = meaning[codes.int()]
            first = begin // block
            spread = scales[first : -(-end // block)].repeat_interleave(block)
            return values.mul_(spread[begin - first * block :][: end - begin]).view(stop - start, columns)

        return read

    def _scales(self, files: Files) -> torch.Tensor:
        absmax = files.whole(self._absmax).flatten()
        if self._nested is None:
            return absmax
        outer, meaning = (files.whole(part).to(torch.float32).flatten() for part in self._nested)
        block = self._state.get("nested_blocksize")
        if not isinstance(block, int) or block < 1 or -(-len(absmax) // block) != len(outer):
            raise self.error(f"{len(outer)} nested blocks of {block!r} for {len(absmax)} blocks")
        spread = outer.repeat_interleave(block)[: len(absmax)]
        return meaning[absmax.int()] * spread + float(self._state.get("nested_offset") or 0.0)


def _state(text: torch.Tensor) -> dict[str, Any]:
    try:
        fields = json.loads(bytes(text.flatten().tolist()))
    except ValueError as error:
        raise UnreadParts(f"the quant state is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UnreadParts("the quant state is not a JSON object")
    return fields
