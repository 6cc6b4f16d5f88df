"""Hold keys and values of one layer of a `ManagedKVCache` (`ManagedKVLayer`).

Each row of a batch is a sequence: a list of immutable encoded blocks, which several sequences may share. The newest
tokens of all rows are in one non-evictable tail. Attention reads the tokens of a long pass where they were computed;
from there they go into blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from transformers.cache_utils import CacheLayerMixin

from ...compression import KVBlock, KVCodec, Segment
from ...interrupts import shield
from ...paging import Block, BlockSpace, Pinned
from .attention import CachedStates
from .sizes import FEW_TOKENS, TAIL_TOKENS

_GROW_TOKENS = 64
_GROW_SHARE = 8


class LayeredCache(Protocol):
    """What a layer uses of its `ManagedKVCache`, which documents it."""

    codec: KVCodec
    space: BlockSpace
    block_tokens: int
    group_blocks: int
    keeps_all: bool

    @property
    def attends_over_blocks(self) -> bool: ...

    def require_room(self, n_tokens: int) -> None: ...

    def upcoming(self, index: int, row: int, start: int) -> list[Block]: ...


class StoredBlock:
    """An encoded block of one layer and one sequence: its bytes and their layout."""

    def __init__(self, block: Block, layout: Sequence[Segment]) -> None:
        self.block = block
        self.encoded = KVBlock(block.data, layout)
        self.addresses = tuple(segment.data_ptr() for segment in self.encoded.segments.values())


class Tail:
    """Unencoded keys and values of the newest tokens, in non-evictable memory.

    Attributes:
        pinned: their memory.
        keys, values: `[batch, heads, capacity, head_dim]`.
    """

    def __init__(self, space: BlockSpace, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        n_bytes = 2 * torch.Size(shape).numel() * dtype.itemsize
        self.pinned = space.pinned(space.allocate(n_bytes))
        self.keys, self.values = self.pinned.block.data.view(dtype).view(2, *shape)

    @classmethod
    def of(cls, pinned: Pinned, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tail:
        """Return a tail in the memory of one that rested."""
        tail = cls.__new__(cls)
        tail.pinned = pinned
        tail.keys, tail.values = pinned.block.data.view(dtype).view(2, *shape)
        return tail

    @property
    def capacity(self) -> int:
        """Number of tokens that fit its memory."""
        return self.keys.shape[2]


class ManagedKVLayer(CacheLayerMixin):
    """Keys and values of one layer.

    Args:
        cache: the cache that contains it.
        index: of the layer.

    Attributes:
        rows: the blocks of each sequence, in order; all rows have the same number.
        tail_length: tokens in the tail.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: LayeredCache, index: int) -> None:
        self.is_initialized = False
        self.rows: list[list[StoredBlock]] = []
        self.tail_length = 0
        # Weak, to avoid a reference cycle: memory is freed as soon as the last caller drops the cache.
        self._cache: LayeredCache = weakref.proxy(cache)
        self._index = index
        self._tail: Tail | None = None
        self._fresh: tuple[torch.Tensor, torch.Tensor] | None = None  # `[batch, heads, tokens, head_dim]` each

    # --- transformers' cache interface --------------------------------------------------------------------------------

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys, decoded: `[batch, heads, tokens, head_dim]`. A copy."""
        return self.decoded()[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        """All values, decoded: `[batch, heads, tokens, head_dim]`. A copy."""
        return self.decoded()[1] if self.is_initialized else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take shapes and dtype from the first keys and values."""
        self.begin(key_states.shape[0], key_states.shape[1], key_states.shape[3], key_states.dtype)

    def begin(self, batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Initialize the layer with `batch` empty sequences, computed in `dtype`."""
        self.batch_size, self.heads, self.head_dim = batch, heads, head_dim
        self.dtype, self.device = dtype, torch.device("cpu")
        self.rows = [[] for _ in range(batch)]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | CachedStates, torch.Tensor | CachedStates]:
        """Append keys and values `[batch, heads, new tokens, head_dim]`.

        Returns:
            The input of this package's attention for keys and values; for any other attention, all keys and all values,
            decoded.

        Raises:
            MemoryBudgetExceeded: no room; nothing was appended.
        """
        with shield:
            return self._update(key_states, value_states)

    def _update(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor | CachedStates, torch.Tensor | CachedStates]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.settle()  # left over from a failed attention
        n_tokens = key_states.shape[2]
        if self._index == 0:
            self._cache.require_room(n_tokens)
        if self._keeps_all or n_tokens <= FEW_TOKENS or self._stays_in_tail(n_tokens):
            self.append(key_states, value_states)
        else:
            self._fresh = (key_states, value_states)
        if self._cache.attends_over_blocks:
            cached = CachedStates(self)
            return cached, cached
        decoded = self.decoded()
        self.settle()
        return decoded

    def make_room(self, n_tokens: int) -> None:
        """Make room for a few tokens at the end of the tail; what is in use may not be held meanwhile.

        Raises:
            MemoryBudgetExceeded: there is none; nothing was appended.
        """
        self.settle()  # left over from a failed attention
        if self._index == 0:
            self._cache.require_room(n_tokens)
        self._make_tail(self.tail_length + n_tokens)

    def extend(self, n_tokens: int) -> Tail:
        """Append a few tokens to the tail, whose keys and values the caller writes before all else.

        Precondition: `make_room`.
        """
        self.tail_length += n_tokens
        assert self._tail is not None
        return self._tail

    @property
    def attends_over_blocks(self) -> bool:
        """Whether the active attention is that of `attention.py`."""
        return self._cache.attends_over_blocks

    @property
    def block_tokens(self) -> int:
        """Tokens per block."""
        return self._cache.block_tokens

    def upcoming(self) -> list[Block]:
        """Return the blocks that are used after those of this layer."""
        return self._cache.upcoming(self._index, self.batch_size - 1, self.n_blocks)

    def _stays_in_tail(self, n_tokens: int) -> bool:
        """Return whether all tokens still fit the tail, where attention is bit-identical to transformers."""
        short = self.tail_length + n_tokens < self._cache.block_tokens + TAIL_TOKENS
        return short and not self.n_blocks and self.tail_length > 0 and self.tail_dtype == self.dtype

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of tokens after `query_length` more, and the index of the first."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self.n_blocks * self._cache.block_tokens + self.tail_length + self.fresh_length

    def get_max_length(self) -> int:
        """Return -1: the length is unbounded."""
        return -1

    get_max_cache_shape = get_max_length  # until transformers 5.23

    def reset(self) -> None:
        """Forget all tokens."""
        self.rows, self.tail_length, self._tail, self._fresh = [], 0, None, None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens.

        Args:
            tokens_to_remove: the number of tokens, negated.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove, negated; got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.settle()
        length, tokens = max(0, self.get_seq_length() + tokens_to_remove), self._cache.block_tokens
        if self.n_blocks * tokens > length:
            for row in self.rows:
                del row[-(-length // tokens) :]
            self._take_last_block_back()
        self.tail_length = length - self.n_blocks * tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the sequences, as beam search does."""
        same = torch.arange(self.batch_size) if self.is_initialized else beam_idx
        if not torch.equal(beam_idx.to(same.device), same):
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self.is_initialized and repeats != 1:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences with these indices, in this order; repeats are allowed."""
        if not self.is_initialized:
            return
        self.settle()
        selected = torch.arange(self.batch_size)[indices.cpu()]  # boolean masks work too
        self.rows = [list(self.rows[row]) for row in selected.tolist()]
        if self._tail is not None:
            old = self._tail
            if len(selected) == self.batch_size:
                for states in (old.keys, old.values):
                    states[:, :, : self.tail_length] = states[:, :, : self.tail_length].index_select(0, selected)
            else:
                tail = self._new_tail(old.capacity, len(selected))
                for new, states in ((tail.keys, old.keys), (tail.values, old.values)):
                    new[:, :, : self.tail_length] = states[:, :, : self.tail_length].index_select(0, selected)
                self._tail = tail
        self.batch_size = len(selected)

    # --- tail ---------------------------------------------------------------------------------------------------------

    @property
    def n_blocks(self) -> int:
        """Number of blocks per sequence."""
        return len(self.rows[0]) if self.rows else 0

    @property
    def fresh_length(self) -> int:
        """Tokens of the current pass that are in neither a block nor the tail."""
        return 0 if self._fresh is None else self._fresh[0].shape[2]

    @property
    def tail_dtype(self) -> torch.dtype:
        """16 bits if blocks are encoded with loss, otherwise the compute dtype."""
        return self.dtype if self.codec.lossless or self.dtype.itemsize <= 2 else torch.bfloat16

    def tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the tail, `[batch, heads, tail_length, head_dim]`: views in `tail_dtype`."""
        assert self._tail is not None
        return self._tail.keys[:, :, : self.tail_length], self._tail.values[:, :, : self.tail_length]

    def fresh(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the `fresh_length` tokens. Precondition: there are some."""
        assert self._fresh is not None
        return self._fresh

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write keys and values `[batch, heads, new tokens, head_dim]` into the tail."""
        start, length = self.tail_length, self.tail_length + key_states.shape[2]
        tail = self._make_tail(length)
        self.tail_length = length
        tail.keys[:, :, start:length] = key_states
        tail.values[:, :, start:length] = value_states

    def _make_tail(self, length: int) -> Tail:
        """Return the tail with room for `length` tokens."""
        if self._tail is None or length > self._tail.capacity:
            old, self_length = self._tail, self.tail_length
            tail = self._new_tail(self._capacity(length), self.batch_size)
            if old is not None and self_length:
                tail.keys[:, :, :self_length] = old.keys[:, :, :self_length]
                tail.values[:, :, :self_length] = old.values[:, :, :self_length]
            self._tail = tail
        return self._tail

    def _capacity(self, length: int) -> int:
        if self._keeps_all:
            length += length // _GROW_SHARE  # growing copies the whole tail, so grow rarely
        elif self._tail is not None:
            length = max(length, min(2 * self._tail.capacity, self._most_tail_tokens))
        return -(-length // _GROW_TOKENS) * _GROW_TOKENS

    @property
    def _most_tail_tokens(self) -> int:
        return self._cache.block_tokens + TAIL_TOKENS + FEW_TOKENS

    def _new_tail(self, capacity: int, batch: int) -> Tail:
        return Tail(self.space, (batch, self.heads, capacity, self.head_dim), self.tail_dtype)

    def growth_bytes(self, n_tokens: int) -> int:
        """Return the memory that the tail newly allocates for `n_tokens` more tokens."""
        length = self.tail_length + n_tokens
        if n_tokens > FEW_TOKENS and not self._keeps_all:
            length = min(length, self._cache.block_tokens + TAIL_TOKENS - 1)
        if self._tail is not None and length <= self._tail.capacity:
            return 0
        token_bytes = 2 * self.batch_size * self.heads * self.head_dim * self.tail_dtype.itemsize
        return self._capacity(length) * token_bytes

    # --- blocks -------------------------------------------------------------------------------------------------------

    @property
    def codec(self) -> KVCodec:
        """The codec of the blocks."""
        return self._cache.codec

    @property
    def space(self) -> BlockSpace:
        """Where blocks are."""
        return self._cache.space

    @property
    def _keeps_all(self) -> bool:
        """Whether all tokens stay in the tail, with attention bit-identical to transformers."""
        return self._cache.keeps_all

    def settle(self) -> None:
        """Encode the complete blocks among the unencoded tokens, except the newest; the rest goes to the tail.

        Raises:
            MemoryBudgetExceeded: no room for a block; nothing is lost, and the next token retries.
        """
        if self._keeps_all:
            return
        with shield:
            self._settle()

    def _settle(self) -> None:
        tokens, start = self._cache.block_tokens, 0
        length = self.tail_length + self.fresh_length
        try:
            while length - start >= tokens + TAIL_TOKENS:
                self._append_blocks(*self._unencoded(start, start + tokens))
                start += tokens
        finally:
            if start:
                self._drop_unencoded(start)
        if self._fresh is not None:
            fresh, self._fresh = self._fresh, None
            try:
                self.append(*fresh)
            except BaseException:
                self._fresh = fresh
                raise

    def _unencoded(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a range of the tokens of tail and `fresh`, counted from the first of the tail."""
        n_tail = self.tail_length
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        if start < n_tail:
            keys, values = self.tail()
            parts.append((keys[:, :, start:stop], values[:, :, start:stop]))
        if stop > n_tail:
            keys, values = self.fresh()
            part = slice(max(0, start - n_tail), stop - n_tail)
            parts.append((keys[:, :, part], values[:, :, part]))
        if len(parts) == 1:
            return parts[0]
        keys, values = (torch.cat([part[side].to(self.dtype) for part in parts], dim=2) for side in (0, 1))
        return keys, values

    def _drop_unencoded(self, n_tokens: int) -> None:
        """Forget the first tokens of tail and `fresh`."""
        dropped = min(n_tokens, self.tail_length)
        if dropped and self._tail is not None:
            left = self.tail_length - dropped
            for states in (self._tail.keys, self._tail.values):
                # Cloned, because the ranges may overlap; only a few tokens.
                states[:, :, :left] = states[:, :, dropped : self.tail_length].clone()
            self.tail_length = left
        if n_tokens > dropped:
            keys, values = self.fresh()
            self._fresh = (keys[:, :, n_tokens - dropped :], values[:, :, n_tokens - dropped :])

    def _append_blocks(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Encode one block per sequence, for all sequences or none."""
        new = []
        for key, value in zip(keys, values, strict=True):
            stored = self._new_block()
            with self.space.held([stored.block]):
                self.space.encodings.encode_block(self.space.kind, self.codec, key, value, stored.encoded)
                self.space.written(stored.block)
            new.append(stored)
        for row, stored in zip(self.rows, new, strict=True):
            row.append(stored)

    def layout(self) -> tuple[Segment, ...]:
        """Return the memory layout of a block."""
        return self.codec.layout(self.heads, self._cache.block_tokens, self.head_dim, self.dtype)

    def _new_block(self) -> StoredBlock:
        layout = self.layout()
        return StoredBlock(self.space.allocate(sum(segment.n_bytes for segment in layout)), layout)

    def _take_last_block_back(self) -> None:
        """Decode the last block of each sequence into the tail; the tail's own tokens, which follow it, are dropped."""
        self.tail_length = 0
        if not self.n_blocks:
            return
        tail = self._make_tail(self._cache.block_tokens)
        for index, row in enumerate(self.rows):
            keys, values = self._decode(row[-1])
            tail.keys[index, :, : self._cache.block_tokens] = keys
            tail.values[index, :, : self._cache.block_tokens] = values
        self.tail_length = self._cache.block_tokens
        for row in self.rows:
            row.pop()

    def _decode(self, stored: StoredBlock) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a block, `[heads, tokens, head_dim]`."""
        shape = (self.heads, self._cache.block_tokens, self.head_dim)
        keys, values = torch.empty(shape, dtype=self.dtype), torch.empty(shape, dtype=self.dtype)
        with self.space.held([stored.block]):
            self.codec.decode(stored.encoded, keys, values)
        return keys, values

    def copy_of(self, other: ManagedKVLayer) -> None:
        """Become a copy of another layer. Precondition: nothing was appended."""
        if not other.is_initialized:
            return
        other.settle()
        self.begin(other.batch_size, other.heads, other.head_dim, other.dtype)
        self.rows = [list(row) for row in other.rows]
        if other.tail_length:
            self.append(*other.tail())

    def groups(self, row: int) -> Iterator[list[KVBlock]]:
        """Yield the blocks of a sequence in order, some at a time; each group stays in memory until the next is
        requested.
        """
        blocks = self.rows[row]
        if not blocks:
            return
        size = max(1, self.space.held_bytes // blocks[0].block.n_bytes)
        size = min(size, self._cache.group_blocks)
        for start in range(0, len(blocks), size):
            part = blocks[start : start + size]
            upcoming = self._cache.upcoming(self._index, row, start + size) if self.space.moves else ()
            with self.space.held([stored.block for stored in part], upcoming):
                yield [stored.encoded for stored in part]

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and all values, `[batch, heads, tokens, head_dim]`, in the compute dtype."""
        blocks = [[self._decode(stored) for stored in row] for row in self.rows]
        sides = []
        for side in (0, 1):
            parts = [
                torch.stack(column) for column in zip(*([pair[side] for pair in row] for row in blocks), strict=True)
            ]
            if self._tail is not None:
                parts.append(self.tail()[side].to(self.dtype))
            if self._fresh is not None:
                parts.append(self._fresh[side])
            empty = torch.empty((self.batch_size, self.heads, 0, self.head_dim), dtype=self.dtype)
            sides.append(torch.cat([empty, *parts], dim=2))
        return sides[0], sides[1]

    # --- resting sequences --------------------------------------------------------------------------------------------

    def take_tail(self) -> Tail | None:
        """Give the tail away; the layer must not be used afterwards. `None` if the tail is empty."""
        tail, self._tail = self._tail, None
        return tail if self.tail_length else None

    def set_tail(self, tail: Tail, length: int) -> None:
        """Continue with a tail that rested. Precondition: there is none."""
        self._tail, self.tail_length = tail, length

    def storage_bytes(self) -> int:
        """Return the bytes of blocks and tail."""
        blocks = sum(stored.block.n_bytes for row in self.rows for stored in row)
        return blocks + (0 if self._tail is None else self._tail.pinned.block.n_bytes)
