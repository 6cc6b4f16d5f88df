"""Store keys and values of resting sequences in cache files, in their in-memory layout (`KVFiles`)."""

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
"""Memory needed to write an entry, besides the blocks."""


class KVFiles:
    """Writes blocks to files, and lets the Pager read them back.

    Args:
        space: where blocks are.
        level: the SSD level of the cache.

    Attributes:
        corrupt: number of files that did not match their checksums.
    """

    def __init__(self, space: BlockSpace, level: SSDCache) -> None:
        self._space, self._level = space, level
        self.corrupt = 0

    def write(
        self,
        key: str,
        layers: Sequence[Block],
        meta: dict[str, Any],
        saved_s: float,
        rests: Callable[[], bool],
        *,
        label: str | None = None,
        group: str | None = None,
    ) -> int:
        """Write blocks to a file.

        Args:
            key: 64 hexadecimal digits.
            layers: blocks of equal size.
            meta: JSON, returned with the blocks.
            saved_s: expected saving per hit, in seconds.
            rests: returns whether the blocks are unchanged since the request. A sequence that continues in a tail
                changes it in place.
            label, group: for listing, see `SSDCache.store_encoded`.

        Returns:
            The bytes written; 0: no room, or the blocks changed meanwhile.
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
                    written = rests() and self._level.store_encoded(
                        key, encoded, saved_s=saved_s, kind=KIND, label=label, group=group
                    )
            finally:
                if pager is not None:
                    pager.debit(_OWNER, -_WRITER_BYTES)
                self._space.rest(layers, used=False)
        except MemoryOptimizationError as error:  # no room to hold them, or closed: they will be recomputed
            logger.debug("keys and values were not stored on the SSD: %s", str(error))
            return 0
        if written and not rests():
            self.remove(key)  # its contents no longer match the checksums
            written = False
        return encoded.n_bytes if written else 0

    def has(self, key: str) -> bool:
        """Return whether there is a file for a key."""
        return self._space.pager is not None and self._level.store_files.size_of(key) is not None

    def remove(self, key: str) -> None:
        """Remove a file."""
        self._level.remove(key)

    def leave(self, key: str, layers: Sequence[Block]) -> None:
        """Back blocks with their file, so that evicting them needs no write."""
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
        """Return the blocks of a file, read and verified, with their metadata.

        Args:
            key: of the file.
            n_layers: required number of blocks.
            accepts: returns whether `meta` (with `bytes`, the size of a block) describes usable blocks.

        Returns:
            `None` if there is no usable file. A file with a wrong checksum is removed.
        """
        if self._space.pager is None or not self.has(key):
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
            logger.warning("removed corrupt keys and values from the cache; they are recomputed: %s", str(error))
            self.corrupt += 1
            self.remove(key)
            return None
        except (MemoryOptimizationError, KeyError, TypeError, ValueError, AttributeError) as error:
            logger.debug("cached keys and values cannot be used: %s", str(error))
            return None
        self._level.note_hit(key)
        return blocks, meta

    def _blocks_of(self, file: DirectFile, meta: dict[str, Any], offset: int) -> list[Block]:
        size = int(meta["bytes"])
        blocks = []
        for sums in meta["sums"]:
            blocks.append(self._space.stored(size, file, offset, tuple(sums)))
            offset += stored_bytes(size)
        for index, block in enumerate(blocks):  # read and verified before anything depends on them
            with self._space.held([block], blocks[index + 1 :]):
                pass
        self._space.rest(blocks, used=False)
        return blocks


def tail_key(parent: str) -> str:
    """Return the file key of a tail from the name of the block before it."""
    return digest("tail", parent)


def _whole(block: Block) -> torch.Tensor:
    """Return all bytes of a block, including the padding of its last frame."""
    if block.entry is None:
        rest = torch.zeros(stored_bytes(block.n_bytes) - block.n_bytes, dtype=torch.uint8)
        return torch.cat([block.data, rest])
    return block.entry.encoded(0, block.entry.rows)["data"].view(-1)
