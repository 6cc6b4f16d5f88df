"""`ManagedKVLayer`: keys and values of one layer of a `ManagedKVCache`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..compression import KVBlock, KVCodec, Segment
from ..paging import Account, Block, BlockSpace
from .kv_attention import CachedStates

if TYPE_CHECKING:
    from .kv_cache import ManagedKVCache

TAIL_TOKENS = 64
"""The newest tokens, at least, are never encoded: drafts that are not accepted are taken back without a loss."""
_GROW_TOKENS = 64
_GROW_SHARE = 8


class _StoredBlock:
    """A block of one layer: where its bytes are, and what they mean."""

    def __init__(self, block: Block, layout: Sequence[Segment]) -> None:
        self.block = block
        self.encoded = KVBlock(block.data, layout)


class ManagedKVLayer(CacheLayerMixin):
    """Keys and values of one layer.

    Args:
        cache: that it belongs to.
        index: of the layer.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: ManagedKVCache, index: int) -> None:
        self.is_initialized = False
        self.blocks: list[_StoredBlock] = []
        self.tail_length = 0
        # Without a cycle of references, the memory of a cache is back as soon as nobody holds it.
        proxy: Any = weakref.proxy(cache)
        self._cache: ManagedKVCache = proxy
        self._index = index
        self._tail: tuple[torch.Tensor, torch.Tensor] | None = None  # `[batch, heads, capacity, head_dim]` each
        self._account: Account = cache.space.account()

    # --- what transformers asks --------------------------------------------------------------------------------------

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys, decoded: `[batch, heads, tokens, head_dim]`. A copy."""
        return self.decoded()[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        """All values, decoded: `[batch, heads, tokens, head_dim]`. A copy."""
        return self.decoded()[1] if self.is_initialized else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Learn shapes and dtype from the first keys and values."""
        self.batch_size, self.heads, _, self.head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append keys and values `[batch, heads, new tokens, head_dim]`.

        Returns:
            What the attention of `kv_attention` takes for keys and values, or for any other attention all keys and
            all values, decoded.

        Raises:
            MemoryBudgetExceeded: no room for them; nothing was appended.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.settle()
        if self._index == 0:
            self._cache.check_room(key_states.shape[2])
        self._make_tail(self.tail_length + key_states.shape[2])
        assert self._tail is not None
        start, self.tail_length = self.tail_length, self.tail_length + key_states.shape[2]
        for tail, states in zip(self._tail, (key_states, value_states), strict=True):
            tail.narrow(2, start, states.shape[2]).copy_(states)
        if self._cache.attends_over_blocks:
            cached = CachedStates(self)
            return cached, cached
        decoded = self.decoded()
        self.settle()
        return decoded

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens there will be after `query_length` more, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return len(self.blocks) * self._cache.block_tokens + self.tail_length

    def get_max_length(self) -> int:
        """There is no largest length."""
        return -1

    get_max_cache_shape = get_max_length  # until transformers 5.23

    def reset(self) -> None:
        """Forget all tokens."""
        self.blocks.clear()
        self.tail_length = 0
        self._set_tail(None)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens back.

        Args:
            tokens_to_remove: how many, negated.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove, negated; {tokens_to_remove} was given")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        length, tokens = max(0, self.get_seq_length() + tokens_to_remove), self._cache.block_tokens
        if len(self.blocks) * tokens > length:
            del self.blocks[-(-length // tokens) :]
            self._take_last_block_back()
        self.tail_length = length - len(self.blocks) * tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put the sequences in another order, as beam search does."""
        same = torch.arange(self.batch_size) if self.is_initialized else beam_idx
        if not torch.equal(beam_idx.to(same.device), same):
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self.is_initialized and repeats != 1:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences with these indices, in this order; one may be there several times."""
        if not self.is_initialized:
            return
        selected = torch.arange(self.batch_size)[indices.cpu()]  # a mask of bools is fine
        same_size = len(selected) == self.batch_size
        for stored in self.blocks:
            self._select_in_block(stored, selected, in_place=same_size)
        if self._tail is not None:
            before, old = self._account.n_bytes, self._tail
            self._account.add(before // self.batch_size * len(selected))
            self._tail = (old[0].index_select(0, selected), old[1].index_select(0, selected))
            self._account.add(-before)
        self.batch_size = len(selected)

    # --- tail ---------------------------------------------------------------------------------------------------------

    def tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the tail, `[batch, heads, tail_length, head_dim]`: views."""
        assert self._tail is not None
        keys, values = self._tail
        return keys[:, :, : self.tail_length], values[:, :, : self.tail_length]

    def _make_tail(self, length: int) -> None:
        """Have room for so many tokens in the tail."""
        capacity = 0 if self._tail is None else self._tail[0].shape[2]
        if length > capacity:
            if self._keeps_all:
                length += length // _GROW_SHARE  # it is copied whole when it grows: seldom
            self._resize_tail(-(-length // _GROW_TOKENS) * _GROW_TOKENS)

    def _tail_bytes(self, capacity: int) -> int:
        return 2 * self.batch_size * self.heads * capacity * self.head_dim * self.dtype.itemsize

    def growth_bytes(self, n_tokens: int) -> int:
        """Return by how much the tail is larger after so many tokens more, once it is settled."""
        length = min(self.tail_length + n_tokens, self._cache.block_tokens + TAIL_TOKENS)
        capacity = -(-length // _GROW_TOKENS) * _GROW_TOKENS
        return max(0, self._tail_bytes(capacity) - self._account.n_bytes)

    def _resize_tail(self, capacity: int) -> None:
        shape = (self.batch_size, self.heads, capacity, self.head_dim)
        before, old = self._account.n_bytes, self._tail
        self._account.add(self._tail_bytes(capacity))
        tail = (torch.empty(shape, dtype=self.dtype), torch.empty(shape, dtype=self.dtype))
        if old is not None and self.tail_length:
            for new, states in zip(tail, old, strict=True):
                new[:, :, : self.tail_length] = states[:, :, : self.tail_length]
        self._tail = tail
        self._account.add(-before)

    def _set_tail(self, tail: None) -> None:
        self._tail = tail
        self._account.add(-self._account.n_bytes)

    # --- blocks -------------------------------------------------------------------------------------------------------

    @property
    def codec(self) -> KVCodec:
        """How blocks are encoded."""
        return self._cache.codec

    @property
    def space(self) -> BlockSpace:
        """Where blocks are."""
        return self._cache.space

    @property
    def _keeps_all(self) -> bool:
        """Whether all tokens stay in the tail, where blocks would save nothing and attention is bit by bit that of
        transformers."""
        return self.codec.lossless and not self.space.moves

    def settle(self) -> None:
        """Encode the complete blocks of the tail, all but the newest tokens.

        Raises:
            MemoryBudgetExceeded: no room for a block; it stays in the tail.
        """
        if self._keeps_all:
            return
        tokens, start = self._cache.block_tokens, 0
        try:
            while self.tail_length - start >= tokens + TAIL_TOKENS:
                self._append_block(start)
                start += tokens
        finally:
            if start:
                self._drop_from_tail(start)

    def _append_block(self, start: int) -> None:
        assert self._tail is not None
        tokens = self._cache.block_tokens
        keys, values = (states[:, :, start : start + tokens].flatten(0, 1) for states in self._tail)
        stored = self._new_block(len(keys))
        with self.space.held([stored.block]):
            self.space.encodings.encode_block(self.space.kind, self.codec, keys, values, stored.encoded)
            self.space.written(stored.block)
        self.blocks.append(stored)

    def _new_block(self, n: int) -> _StoredBlock:
        layout = self.codec.layout(n, self._cache.block_tokens, self.head_dim, self.dtype)
        return _StoredBlock(self.space.allocate(sum(segment.n_bytes for segment in layout)), layout)

    def _drop_from_tail(self, n_tokens: int) -> None:
        assert self._tail is not None
        left = self.tail_length - n_tokens
        largest = -(-(self._cache.block_tokens + TAIL_TOKENS) // _GROW_TOKENS) * _GROW_TOKENS
        for states in self._tail:
            # Cloned: a few tokens, and the ranges may overlap.
            states[:, :, :left] = states[:, :, n_tokens : self.tail_length].clone()
        self.tail_length = left
        if self._tail[0].shape[2] > largest:
            self._resize_tail(largest)

    def _take_last_block_back(self) -> None:
        """Decode the last block into the tail, whose tokens are dropped: they come after it."""
        self.tail_length = 0
        if not self.blocks:
            return
        self._make_tail(self._cache.block_tokens)
        stored = self.blocks[-1]
        keys, values = self._decode(stored)
        assert self._tail is not None
        for states, decoded in zip(self._tail, (keys, values), strict=True):
            states[:, :, : self._cache.block_tokens] = decoded
        self.tail_length = self._cache.block_tokens
        self.blocks.pop()

    def _decode(self, stored: _StoredBlock) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a block, `[batch, heads, tokens, head_dim]`."""
        shape = (self.batch_size * self.heads, self._cache.block_tokens, self.head_dim)
        keys, values = torch.empty(shape, dtype=self.dtype), torch.empty(shape, dtype=self.dtype)
        with self.space.held([stored.block]):
            self.codec.decode(stored.encoded, keys, values)
        return keys.view(self.batch_size, self.heads, *shape[1:]), values.view(self.batch_size, self.heads, *shape[1:])

    def _select_in_block(self, stored: _StoredBlock, selected: torch.Tensor, *, in_place: bool) -> None:
        rows = (selected[:, None] * self.heads + torch.arange(self.heads)).view(-1)
        with self.space.held([stored.block]):
            picked = {name: part.index_select(0, rows) for name, part in stored.encoded.segments.items()}
            if in_place:
                for name, part in stored.encoded.segments.items():
                    part.copy_(picked[name])
                self.space.written(stored.block)
                return
        new = self._new_block(len(rows))
        with self.space.held([new.block]):
            for name, part in new.encoded.segments.items():
                part.copy_(picked[name])
            self.space.written(new.block)
        stored.block, stored.encoded = new.block, new.encoded

    def copy_of(self, other: ManagedKVLayer) -> None:
        """Become a copy of another layer. Precondition: nothing was appended."""
        if other._tail is None:
            return
        self.batch_size, self.heads, self.head_dim = other.batch_size, other.heads, other.head_dim
        self.dtype, self.device, self.is_initialized = other.dtype, other.device, True
        for stored in other.blocks:
            copied = self._new_block(self.batch_size * self.heads)
            with self.space.held([stored.block, copied.block]):
                copied.block.data.copy_(stored.block.data)
                self.space.written(copied.block)
            self.blocks.append(copied)
        self._make_tail(other.tail_length)
        assert self._tail is not None
        for states, source in zip(self._tail, other.tail(), strict=True):
            states[:, :, : other.tail_length] = source
        self.tail_length = other.tail_length

    def groups(self) -> Iterator[list[KVBlock]]:
        """Yield the blocks in order, some at a time, in memory until the next are asked for."""
        if not self.blocks:
            return
        size = max(1, self.space.held_bytes // self.blocks[0].block.n_bytes)
        size = min(size, self._cache.group_blocks)
        for start in range(0, len(self.blocks), size):
            part = self.blocks[start : start + size]
            upcoming = self._cache.upcoming(self._index, start + size) if self.space.moves else ()
            with self.space.held([stored.block for stored in part], upcoming):
                yield [stored.encoded for stored in part]

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and all values, `[batch, heads, tokens, head_dim]`, in the dtype of the computation."""
        parts = [self._decode(stored) for stored in self.blocks]
        if self._tail is not None:
            parts.append(self.tail())
        return torch.cat([keys for keys, _ in parts], dim=2), torch.cat([values for _, values in parts], dim=2)

    def storage_bytes(self) -> int:
        """Bytes of blocks and tail."""
        return sum(stored.block.n_bytes for stored in self.blocks) + self._account.n_bytes
