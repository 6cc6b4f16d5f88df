"""Runtime bytes that are written once and then scanned in a cycle, such as the blocks of a KV cache.

A `Block` is a tensor of the Pager: it counts against the budget, leaves for the swap file when room is needed and comes
back when it is used. `BlockSpace` makes blocks, and keeps an `Account` for what lies beside them.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..compression import EncodingLog, RawCodec, Scratch
from ..errors import MemoryBudgetExceeded, TensorFreedError
from ..pools import FRAME_BYTES, reserve, unreserve
from .entry import PAGE_BYTES, TensorEntry
from .ledger import PROCESS
from .pager import Pager

_HELD_SHARE = 8
_READ_AHEAD_BYTES = 4 * PAGE_BYTES

_numbers = itertools.count()


class Block:
    """Bytes at one address for life. `data` may be touched while the block is held: a new one may have left again.

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


class Account:
    """What an owner holds outside of blocks: memory of the process, but no managed tensor.

    It is given back when the account is collected.
    """

    def __init__(self, pager: Pager | None, owner: str) -> None:
        self._pager, self._owner = pager, owner
        self._held = [0]
        if pager is not None:
            weakref.finalize(self, _settle, pager, owner, self._held).atexit = False

    @property
    def n_bytes(self) -> int:
        """What is held."""
        return self._held[0]

    def add(self, n_bytes: int) -> None:
        """Hold more (or less); called before the memory is taken.

        Raises:
            MemoryBudgetExceeded: it does not fit; nothing was changed.
        """
        if self._pager is not None and n_bytes:
            self._pager.debit(self._owner, n_bytes, PROCESS)
        self._held[0] += n_bytes


class BlockSpace:
    """Makes blocks of one kind.

    Args:
        pager: keeps them within the budget; without one they are plain memory.
        kind: of the tensors.

    Attributes:
        encodings: what was encoded into them, for who encodes to note.
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
        """Whether blocks may leave memory: they must be held while they are used."""
        return self.pager is not None and self.pager.ledger.limited

    @property
    def held_bytes(self) -> int:
        """How much may be held at a time; one block may always be."""
        return self.pager.frames.limit_bytes // _HELD_SHARE if self.pager is not None and self.moves else 1 << 62

    def account(self) -> Account:
        """Return a new account of this kind."""
        return Account(self.pager, self.kind)

    def allocate(self, n_bytes: int) -> Block:
        """Return a block whose contents are the caller's to write (`held`, `written`); freed when it is collected.

        Raises:
            MemoryBudgetExceeded: there is no room, whatever else leaves.
        """
        if self.pager is None:
            return Block(torch.empty(n_bytes, dtype=torch.uint8))
        pager, codec = self.pager, RawCodec()
        size = -(-n_bytes // FRAME_BYTES) * FRAME_BYTES
        address, give_back = self._range(pager, size)
        try:
            entry = TensorEntry(
                f"{self.kind}-block-{next(_numbers)}",
                self.kind,
                (n_bytes,),
                torch.uint8,
                codec,
                address,
                torch.uint8,
                (n_bytes, 1),
                {},
                rows_per_page=None,
                page_bytes=PAGE_BYTES,
            )
            pager.add(entry, resident=True)
        except BaseException:
            with pager.exclusive():
                give_back()
            raise
        block = Block(entry.encoded(0, n_bytes)["data"].view(-1), entry)
        weakref.finalize(block, _drop, pager, entry, give_back).atexit = False
        return block

    def _range(self, pager: Pager, size: int) -> tuple[int, Callable[[], None]]:
        """Return an address range, of the pool of this kind while that has one, and what gives it back."""
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
        """Have blocks in memory and pinned; blocks that will be used next are read meanwhile.

        Raises:
            MemoryBudgetExceeded: they do not fit beside what is pinned.
            TensorFreedError: the Pager is closed.
        """
        entries = [block.entry for block in blocks if block.entry is not None]
        if any(entry.freed for entry in entries):
            raise TensorFreedError(f"{self.kind}: the memory optimizer is closed")
        if not self.moves:
            yield
            return
        assert self.pager is not None
        ahead = [block.entry for block in upcoming if block.entry is not None]
        # More would displace what is needed before it.
        ahead_bytes = min(_READ_AHEAD_BYTES, self.held_bytes)
        self.pager.hold(entries, ahead, ahead_bytes)
        try:
            yield
        finally:
            self.pager.let_go(entries, ahead, ahead_bytes)

    def written(self, block: Block) -> None:
        """Note that a held block was written to: what the swap file has of it is stale."""
        if self.pager is not None and block.entry is not None:
            self.pager.mark_dirty(block.entry)


def _drop(pager: Pager, entry: TensorEntry, release: Callable[[], None]) -> None:
    """The last reference to a block went."""
    if entry.freed:  # with the Pager
        pager.do_later(release)
    else:
        pager.free_later(entry.tensor_id, release)


def _settle(pager: Pager, owner: str, held: list[int]) -> None:
    n_bytes, held[0] = held[0], 0
    if n_bytes:
        pager.debit_later(owner, -n_bytes, PROCESS)
