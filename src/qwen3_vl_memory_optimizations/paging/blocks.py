"""Runtime bytes that are written once and then scanned in a cycle, such as the blocks of a KV cache.

A `Block` is a tensor of the Pager: it counts against the budget, is swapped out when room is needed and read back when
it is used. `BlockSpace` creates blocks.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import xxhash

from ..compression import EncodingLog, RawCodec, Scratch
from ..errors import MemoryBudgetExceeded, TensorFreedError
from ..interrupts import shield
from ..pools import FRAME_BYTES, reserve, unreserve
from ..storage import DirectFile
from .pager import Pager
from .records.entry import PAGE_BYTES, FileSource, TensorEntry

_HELD_SHARE = 8
_READ_AHEAD_BYTES = 4 * PAGE_BYTES

_numbers = itertools.count()


class Block:
    """Bytes at a fixed address. Access `data` only while the block is held: even a new one may have been swapped out.

    Attributes:
        data: uint8 `[n_bytes]`.
        entry: the Pager's record; `None` without a Pager.
    """

    def __init__(self, data: torch.Tensor, entry: TensorEntry | None = None) -> None:
        self.data = data
        self.entry = entry

    @property
    def n_bytes(self) -> int:
        """Size of the block."""
        return self.data.numel()


class Pinned:
    """A block pinned in memory until `release` is called or this object is collected."""

    def __init__(self, pager: Pager | None, block: Block) -> None:
        self.block = block
        self._unpin = None
        if pager is not None and block.entry is not None:
            with shield:
                pager.pin(block.entry)
                pager.mark_dirty(block.entry)  # it is about to be written to
                self._unpin = weakref.finalize(self, pager.unpin_later, block.entry)
                self._unpin.atexit = False

    def release(self) -> Block:
        """Allow the block to leave memory from now on; return it."""
        if self._unpin is not None:
            self._unpin()
        return self.block


class BlockSpace:
    """Creates blocks of one kind.

    Args:
        pager: keeps them within the budget; without one they are plain memory.
        kind: kind of the tensors.

    Attributes:
        encodings: record of what was encoded into them, maintained by the code that encodes.
    """

    def __init__(self, pager: Pager | None, kind: str = "kv_cache") -> None:
        self.pager = pager
        self.kind = kind
        self.encodings = EncodingLog() if pager is None else pager.encodings
        self._scratch = Scratch() if pager is None else None

    @property
    def scratch(self) -> Scratch:
        """Workspace of the calling thread."""
        if self._scratch is not None:
            return self._scratch
        assert self.pager is not None
        return self.pager.scratch

    @property
    def moves(self) -> bool:
        """Return whether blocks may leave memory, so that they must be held while in use."""
        return self.pager is not None and self.pager.ledger.limited

    @property
    def held_bytes(self) -> int:
        """Maximum bytes that may be held at a time; one block is always allowed."""
        return self.pager.frames.limit_bytes // _HELD_SHARE if self.pager is not None and self.moves else 1 << 62

    def allocate(self, n_bytes: int) -> Block:
        """Return a block for the caller to write (`held`, `written`); freed when it is collected.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what is pinned.
        """
        if self.pager is None:
            return Block(torch.empty(n_bytes, dtype=torch.uint8))
        with shield:
            return self._add(self.pager, n_bytes, None)

    def stored(self, n_bytes: int, file: DirectFile, offset_bytes: int, checksums: tuple[int, ...]) -> Block:
        """Return a block whose bytes are in a file and are read when needed.

        Args:
            n_bytes: size of the block.
            file: holds `stored_bytes(n_bytes)` of it at `offset_bytes`, a multiple of the frame size.
            offset_bytes: position in the file.
            checksums: checksums of its pages, see `page_checksums`.
        """
        assert self.pager is not None
        with shield:
            return self._add(self.pager, n_bytes, FileSource(file, offset_bytes, checksums))

    def _add(self, pager: Pager, n_bytes: int, source: FileSource | None) -> Block:
        size = stored_bytes(n_bytes)
        address, give_back = self._range(pager, size)
        try:
            entry = TensorEntry(
                f"{self.kind}-block-{next(_numbers)}",
                self.kind,
                (size,),
                torch.uint8,
                RawCodec(),
                address,
                torch.uint8,
                (size, 1),
                {},
                rows_per_page=None,
                page_bytes=PAGE_BYTES,
                source=source,
            )
            pager.add(entry, resident=source is None)
        except BaseException:
            with pager.exclusive():
                give_back()
            raise
        block = Block(entry.encoded(0, size)["data"].view(-1)[:n_bytes], entry)
        weakref.finalize(block, _drop, pager, entry, give_back).atexit = False
        return block

    def pinned(self, block: Block) -> Pinned:
        """Pin a block in memory for writing, for as long as the returned object lives.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what is pinned.
        """
        return Pinned(self.pager, block)

    def require_room(self, n_bytes: int) -> None:
        """Raise if evicting everything that may leave would not make room; nothing is evicted.

        Raises:
            MemoryBudgetExceeded: `n_bytes` do not fit beside what is pinned.
        """
        if self.pager is not None and self.moves:
            self.pager.require_room(n_bytes, self.kind)

    def rest(self, blocks: Sequence[Block], *, used: bool) -> None:
        """Record that blocks left their cycle: from now on the eviction order of runtime tensors applies to them.

        Args:
            blocks: blocks of a sequence that is idle, or about to continue.
            used: whether this counts as a use.
        """
        if self.pager is not None:
            self.pager.runtime.rest([block.entry for block in blocks if block.entry is not None], used=used)

    def _range(self, pager: Pager, size: int) -> tuple[int, Callable[[], None]]:
        """Return an address range, from this kind's pool while it has room, and a function that gives it back."""
        pool = pager.pools.get(self.kind)
        if pool is not None:
            try:
                with pager.exclusive():
                    address = pool.allocate(size)
                return address, lambda: pool.free(address)
            except MemoryBudgetExceeded:  # its address space is used up
                pass
        address = reserve(size)

        def unmap() -> None:
            pager.frames.forget(address, size)
            unreserve(address, size)

        return address, unmap

    @contextmanager
    def held(self, blocks: Sequence[Block], upcoming: Iterable[Block] = ()) -> Iterator[None]:
        """Hold blocks in memory, pinned, while the blocks used next are prefetched.

        Raises:
            MemoryBudgetExceeded: they do not fit beside what is pinned.
            TensorFreedError: the Pager is closed.
        """
        entries = [block.entry for block in blocks if block.entry is not None]
        if any(entry.freed for entry in entries):
            raise TensorFreedError(f"{self.kind}: the memory optimizer is closed")
        # Without a budget, blocks stay once read; blocks stored in a file must still be read.
        if not self.moves and not any(entry.missing for entry in entries):
            yield
            return
        assert self.pager is not None
        ahead = [block.entry for block in upcoming if block.entry is not None]
        # More would evict what is needed before it.
        ahead_bytes = min(_READ_AHEAD_BYTES, self.held_bytes)
        with shield:
            self.pager.hold(entries, ahead, ahead_bytes)
            try:
                yield
            finally:
                self.pager.let_go(entries, ahead, ahead_bytes)

    def written(self, block: Block) -> None:
        """Record that a held block was written to and that its copy in the swap file is stale."""
        if self.pager is not None and block.entry is not None:
            self.pager.mark_dirty(block.entry)


def stored_bytes(n_bytes: int) -> int:
    """Return the bytes of whole frames that a block occupies, in memory and in a file."""
    return -(-n_bytes // FRAME_BYTES) * FRAME_BYTES


def page_checksums(block: Block) -> tuple[int, ...]:
    """Return the checksum (xxh3-64) of each page of a block. Precondition: it is held."""
    assert block.entry is not None
    data = block.entry.encoded(0, block.entry.rows)["data"].view(-1).numpy()
    return tuple(xxhash.xxh3_64_intdigest(data[page.start_bytes : page.stop_bytes].data) for page in block.entry.pages)


def _drop(pager: Pager, entry: TensorEntry, release: Callable[[], None]) -> None:
    """Free a block after its last reference is gone."""
    if entry.freed:  # with the Pager
        pager.do_later(release)
    else:
        pager.free_later(entry.tensor_id, release)
