"""What the native core needs to know of a `ManagedKVLayer`: where its blocks and its tail are."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ...native import DTYPES, Attention, LayerStart
from .layer import ManagedKVLayer, StoredBlock

_LARGEST_HEAD = 256
_HEAD_MULTIPLE = 16


class TokenAddresses:
    """Writes the addresses of one layer's keys and values into structures of the native core."""

    def __init__(self) -> None:
        self._blocks: list[StoredBlock] = []
        self._arrays: Sequence[ctypes.Array[ctypes.c_void_p]] = ()

    @staticmethod
    def knows(tokens: ManagedKVLayer) -> bool:
        """Return whether the native core can attend to all tokens of a layer: in INT8 blocks, and in the tail."""
        known = tokens.head_dim % _HEAD_MULTIPLE == 0 and tokens.head_dim <= _LARGEST_HEAD
        return known and (not tokens.n_blocks or tokens.codec.name == "int8") and tokens.tail_dtype in DTYPES

    def extend(self, tokens: ManagedKVLayer, length: int, start: LayerStart) -> None:
        """Append `length` tokens, for which there is room, to be written where `start` says."""
        tail = tokens.extend(length)
        keys = tail.keys
        offset = (tokens.tail_length - length) * keys.stride(2) * keys.element_size()
        start.keys = keys.data_ptr() + offset
        start.values = tail.values.data_ptr() + offset
        start.cache_dtype = DTYPES[keys.dtype]
        start.sequence_stride, start.head_stride = keys.stride(0), keys.stride(1)

    def describe(self, tokens: ManagedKVLayer, start: LayerStart, attention: Attention) -> None:
        """Describe all tokens, the newest of which `extend` appended. Precondition: `knows`."""
        stored = tokens.rows[0] if len(tokens.rows) == 1 else [block for row in tokens.rows for block in row]
        if stored != self._blocks:
            self._blocks = list(stored)
            self._arrays = [(ctypes.c_void_p * len(stored))(*column) for column in _columns(stored)]
            places = [ctypes.addressof(array) for array in self._arrays] or [0] * 4
            attention.block_keys, attention.block_values, attention.key_scales, attention.value_scales = places
        attention.n_blocks, attention.block_tokens = tokens.n_blocks, tokens.block_tokens
        before = (tokens.tail_length - start.length) * tokens.head_dim * tokens.tail_dtype.itemsize
        attention.keys, attention.values = start.keys - before, start.values - before
        attention.cache_dtype = start.cache_dtype
        attention.sequence_stride, attention.head_stride = start.sequence_stride, start.head_stride
        attention.tokens = tokens.tail_length


@contextmanager
def held_blocks(layers: Sequence[ManagedKVLayer]) -> Iterator[bool]:
    """Hold the blocks of some layers in memory.

    Yields:
        Whether they are; `False`, with nothing held, if they take too much at once, or if those of several layers are
        not all in memory already: they are then read for one layer at a time.
    """
    space = layers[0].space
    blocks = [stored.block for each in layers for row in each.rows for stored in row] if space.moves else []
    if not blocks:
        yield True
        return
    too_many = sum(block.n_bytes for block in blocks) > space.held_bytes
    if too_many or (len(layers) > 1 and any(block.entry is None or block.entry.missing for block in blocks)):
        yield False
        return
    with space.held(blocks, layers[0].upcoming() if len(layers) == 1 else ()):
        yield True


def _columns(stored: Sequence[StoredBlock]) -> list[tuple[int, ...]]:
    """Return the addresses of keys, values and their scales, each for all blocks."""
    return list(zip(*(block.addresses for block in stored), strict=True))
