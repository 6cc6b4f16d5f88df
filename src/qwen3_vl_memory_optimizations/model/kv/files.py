"""`KVFiles`: keys and values of sequences that rest, in files of the cache, as they lie in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...cache import EncodedItem, SSDCache, digest
from ...errors import CorruptDataError, MemoryOptimizationError
from ...paging import Block, BlockSpace, FileSource, page_checksums, stored_bytes
from ...storage import DirectFile

logger = logging.getLogger(__name__)

KIND = "keys and values"
_OWNER = "kv writer"
_WRITER_BYTES = 4 << 20
"""What writing an entry takes besides the blocks."""


class KVFiles:
    """Writes blocks, and has them read back by the Pager.

    Args:
        space: where blocks lie.
        level: of the cache, on the SSD.

    Attributes:
        corrupt: files that were not what was written.
    """

    def __init__(self, space: BlockSpace, level: SSDCache) -> None:
        self._space, self._level = space, level
        self.corrupt = 0

    def write(
        self, key: str, layers: Sequence[Block], meta: dict[str, Any], saved_s: float, rests: Callable[[], bool]
    ) -> int:
        """Write blocks into a file.

        Args:
            key: 64 hexadecimal digits.
            layers: of one size.
            meta: comes back with them; JSON.
            saved_s: what finding them is expected to save.
            rests: returns whether they are still what they were when this was asked for: a tail that a sequence goes
                on in changes where it lies.

        Returns:
            The bytes written; 0: there was no room for it, or they changed meanwhile.
        """
        pager = self._space.pager
        try:
            if pager is not None:
                pager.debit(_OWNER, _WRITER_BYTES)
            try:
                with self._space.held(layers):
                    parts = [_whole(block) for block in layers]
                    sums = [list(page_checksums(block)) for block in layers] if pager is not None else []
                    encoded = EncodedItem({"tensors": [], "bytes": layers[0].n_bytes, "sums": sums, **meta}, parts)
                    written = rests() and self._level.store_encoded(key, encoded, saved_s=saved_s, kind=KIND)
            finally:
                if pager is not None:
                    pager.debit(_OWNER, -_WRITER_BYTES)
                self._space.rest(layers, used=False)
        except MemoryOptimizationError as error:  # no room to hold them, or closed: they are computed again
            logger.debug("keys and values are not kept on the SSD: %s", str(error))
            return 0
        if written and not rests():
            self.remove(key)  # its contents no longer match the checksums
            written = False
        return encoded.n_bytes if written else 0

    def remove(self, key: str) -> None:
        """Remove a file."""
        self._level.remove(key)

    def leave(self, key: str, layers: Sequence[Block]) -> None:
        """From now on blocks need not be written when they leave memory: the file holds them."""
        pager = self._space.pager
        opened = None if pager is None or not self._space.moves else self._level.store_files.open(key)
        if opened is None or pager is None:
            return
        file, meta, offset = opened
        for block, sums in zip(layers, meta["sums"], strict=True):
            if block.entry is not None:
                pager.runtime.keep_in_file(block.entry, FileSource(file, offset, tuple(sums)))
            offset += stored_bytes(block.n_bytes)

    def load(
        self, key: str, n_layers: int, accepts: Callable[[dict[str, Any]], bool]
    ) -> tuple[list[Block], dict[str, Any]] | None:
        """Return the blocks of a file, read and checked, with what was written beside them.

        Args:
            key: of the file.
            n_layers: how many there must be.
            accepts: whether `meta` (with `bytes`, the size of a block) is that of blocks the caller can use.

        Returns:
            `None`: there is none that can be used. One whose checksum is another is removed.
        """
        if self._space.pager is None or self._level.store_files.size_of(key) is None:
            return None
        try:
            opened = self._level.store_files.open(key)
            if opened is None:
                return None
            file, meta, offset = opened
            if len(meta["sums"]) != n_layers or not accepts(meta):
                return None
            blocks = self._blocks_of(file, meta, offset)
        except CorruptDataError as error:
            logger.warning("keys and values of the cache are not used, and are removed: %s", str(error))
            self.corrupt += 1
            self.remove(key)
            return None
        except (MemoryOptimizationError, KeyError, TypeError, ValueError, AttributeError) as error:
            logger.debug("keys and values of the cache are not used: %s", str(error))
            return None
        self._level.note_hit(key)
        return blocks, meta

    def _blocks_of(self, file: DirectFile, meta: dict[str, Any], offset: int) -> list[Block]:
        size = int(meta["bytes"])
        blocks = []
        for sums in meta["sums"]:
            blocks.append(self._space.stored(size, file, offset, tuple(sums)))
            offset += stored_bytes(size)
        for index, block in enumerate(blocks):  # read and checked before anything depends on them
            with self._space.held([block], blocks[index + 1 :]):
                pass
        self._space.rest(blocks, used=False)
        return blocks


def tail_key(parent: str) -> str:
    """Return the key of the file of a tail, from the name of the block before it."""
    return digest("tail", parent)


def _whole(block: Block) -> torch.Tensor:
    """Return all bytes of a block, those that fill its last frame included."""
    if block.entry is None:
        rest = torch.zeros(stored_bytes(block.n_bytes) - block.n_bytes, dtype=torch.uint8)
        return torch.cat([block.data, rest])
    return block.entry.encoded(0, block.entry.rows)["data"].view(-1)
