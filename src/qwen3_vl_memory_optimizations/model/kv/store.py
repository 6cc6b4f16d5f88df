"""Store keys and values of resting sequences, keyed by what they were computed from (`KVStore`).

A block stays where it was encoded: in memory of the Pager, which may move it to the SSD. If it may outlive the process,
its bytes are also in a cache file (`files.py`). A sequence with a known beginning takes references to existing blocks,
without decoding, encoding or copying. The end of a sequence, its tail, rests unencoded: the next turn of a conversation
continues in it, and a prompt that diverges within it copies the common part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...cache import SSDCache
from ...paging import Block, BlockSpace
from .cache import ManagedKVCache
from .files import KVFiles, tail_key
from .index import Match, Resting, RestingBlocks, RestingIndex, RestingTail, entries_of
from .layer import StoredBlock, Tail
from .naming import Token, block_names
from .writer import KVWriter

_MOST_OPEN_FILES = 512


@dataclass(slots=True)
class KVStoreStats:
    """Counters since the start.

    Attributes:
        lookups: prompts looked up; `hits`: prompts with a known beginning.
        prompt_tokens: tokens of all prompts; `reused_tokens`: those taken from earlier sequences.
        blocks_shared: references taken to encoded blocks, one per layer; `shared_bytes`: their size.
        blocks_from_ssd: blocks loaded from cache files.
        tails_continued: tails continued in place; `tails_copied`: tails copied up to the first difference.
        blocks_written: blocks written to cache files; `written_bytes`: their size.
        wanted_bytes: blocks and tails that sequences continued with; `resident_bytes`: the part that was in memory.
        dropped: blocks and tails forgotten to stay within the size limit.
    """

    lookups: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    blocks_shared: int = 0
    shared_bytes: int = 0
    blocks_from_ssd: int = 0
    tails_continued: int = 0
    tails_copied: int = 0
    blocks_written: int = 0
    written_bytes: int = 0
    wanted_bytes: int = 0
    resident_bytes: int = 0
    dropped: int = 0


class KVStore:
    """Keeps the keys and values of ended sequences, and finds them again.

    One sequence at a time is looked up or stored; the collector and the writer have their own threads.

    Args:
        space: where blocks are.
        files: the SSD level of the cache; `None`: nothing outlives the process.
        most_bytes: size limit in memory and the swap file; beyond it the least recently used is forgotten.

    Attributes:
        index: the resting blocks and tails.
        own: called with tensor ids and whether a running sequence holds them; those of resting ones may be collected.
        on_rest: called after a sequence came to rest.
    """

    def __init__(self, space: BlockSpace, files: SSDCache | None, most_bytes: int) -> None:
        self.space = space
        self.counters = KVStoreStats()
        self.index = RestingIndex()
        self.own: Callable[[Iterable[str], bool], None] | None = None
        self.on_rest: Callable[[], None] | None = None
        self._most_bytes = most_bytes
        self._files = None if files is None else KVFiles(space, files)
        self._writer = None if files is None else KVWriter(self._write)

    # --- lookup -------------------------------------------------------------------------------------------------------

    def find(self, tokens: Sequence[Token], root: str, cache: ManagedKVCache) -> Match:
        """Return the known beginning of a prompt; at least one token is left to compute.

        Args:
            tokens: of the prompt.
            root: digest of everything else they depend on.
            cache: an empty cache of one sequence, with initialized layers, for the result.
        """
        counters, block_tokens = self.counters, cache.block_tokens
        counters.lookups += 1
        counters.prompt_tokens += len(tokens)
        match = Match(root)
        for name in block_names(tokens[: len(tokens) - 1], root, block_tokens):
            found = self.index.blocks(name) or self._load_blocks(name, cache)
            if found is None:
                break
            match.blocks.append(found)
            match.parent = name
        rest = list(tokens[len(match.blocks) * block_tokens : len(tokens) - 1])
        for tail in self.index.tails(match.parent):
            match.take_longer(tail, rest)
        if not match.tail_tokens and rest:
            stored = self._load_tail(match.parent, cache, rest[0])
            if stored is not None:
                match.take_longer(stored, rest)
        n_tokens = match.n_tokens(block_tokens)
        counters.hits += n_tokens > 0
        counters.reused_tokens += n_tokens
        return match

    def n_known(self, tokens: Sequence[Token], root: str, block_tokens: int) -> int:
        """Return how many tokens `find` would find, tails in files left out; reads nothing."""
        n_known, parent = 0, root
        for name in block_names(tokens[: len(tokens) - 1], root, block_tokens):
            if self.index.blocks(name) is None and (self._files is None or not self._files.has(name)):
                break
            n_known, parent = n_known + block_tokens, name
        rest = tokens[n_known : len(tokens) - 1]
        return n_known + max((tail.n_equal(rest) for tail in self.index.tails(parent)), default=0)

    def adopt(self, match: Match, cache: ManagedKVCache) -> int:
        """Start an empty cache with the match; return how many tokens it then holds.

        Raises:
            MemoryBudgetExceeded: its tail does not fit; discard the cache.
        """
        blocks = [block for each in match.blocks for block in each.layers]
        self._count_resident([*blocks, *(match.tail.layers if match.tail is not None else ())])
        self.space.rest(blocks, used=True)
        if match.tail is not None:
            self._adopt_tail(match.parent, match.tail, match.tail_tokens, cache)
        self._own(blocks, True)
        for index, layer in enumerate(cache.layers):
            layer.rows = [[each.stored[index] for each in match.blocks]]
        self.index.used(match.blocks)
        self.index.close_files(_MOST_OPEN_FILES)
        self.counters.blocks_shared += len(blocks)
        self.counters.shared_bytes += sum(block.n_bytes for block in blocks)
        return match.n_tokens(cache.block_tokens)

    def _adopt_tail(self, parent: str, tail: RestingTail, n_tokens: int, cache: ManagedKVCache) -> None:
        """Continue a tail in place, or copy the common part."""
        if n_tokens == len(tail.tokens):
            pinned = [self.space.pinned(block) for block in tail.layers]
            self.index.remove(parent, tail)  # its file stays, for other processes
            for layer, each in zip(cache.layers, pinned, strict=True):
                layer.set_tail(Tail.of(each, tail.shape, tail.dtype), n_tokens)
            self.counters.tails_continued += 1
            return
        for layer, block in zip(cache.layers, tail.layers, strict=True):
            with self.space.held([block]):
                keys, values = block.data.view(tail.dtype).view(2, *tail.shape)
                layer.append(keys[:, :, :n_tokens], values[:, :, :n_tokens])
        self.space.rest(tail.layers, used=True)
        self.counters.tails_copied += 1

    def _count_resident(self, blocks: Sequence[Block]) -> None:
        entries = entries_of(blocks)
        self.counters.wanted_bytes += sum(page.n_bytes for entry in entries for page in entry.pages)
        self.counters.resident_bytes += self._resident_bytes(blocks)

    def _resident_bytes(self, blocks: Sequence[Block]) -> int:
        return 0 if self.space.pager is None else self.space.pager.runtime.resident_bytes(entries_of(blocks))

    def _own(self, blocks: Sequence[Block], owned: bool) -> None:
        if self.own is not None:
            self.own([entry.tensor_id for entry in entries_of(blocks)], owned)

    # --- keeping ------------------------------------------------------------------------------------------------------

    def rest(
        self,
        cache: ManagedKVCache,
        row: int,
        tokens: Sequence[Token],
        root: str,
        *,
        persist: bool,
        saved_s: float,
        label: str | None = None,
    ) -> None:
        """Store the blocks and the tail of an ended sequence; its cache must not be used afterwards.

        Args:
            cache: holds the sequence.
            row: of its batch; the tail is kept only for a batch of one.
            tokens: of the sequence.
            root: digest of everything else they depend on.
            persist: other processes can derive the same names and may use the entries.
            saved_s: compute time per token.
            label: what the sequence began with, for listing cache files.
        """
        layers, block_tokens = cache.layers, cache.block_tokens
        n_blocks = min(layer.n_blocks for layer in layers)
        names = block_names(tokens[: n_blocks * block_tokens], root, block_tokens)[:n_blocks]
        resting: list[tuple[str, Resting]] = []
        new: list[Block] = []
        for index, name in reversed(list(enumerate(names))):  # the first blocks are evicted last
            blocks = RestingBlocks([layer.rows[row][index] for layer in layers])
            if self.index.add_blocks(name, blocks):
                new += blocks.layers
            known = self.index.blocks(name)
            if known is not None:
                resting.append((name, known))
        tail = self._tail_of(cache, tokens[n_blocks * block_tokens :]) if layers[0].batch_size == 1 else None
        if tail is not None:
            parent = names[-1] if names else root
            self.index.add_tail(parent, tail)
            resting.insert(0, (parent, tail))
            new += tail.layers
        used = [layer.rows[row][index].block for index in range(n_blocks) for layer in layers]
        self.space.rest(used, used=False)
        self.space.rest(new, used=True)
        self._own([*used, *new], False)
        if persist and self._writer is not None:
            for name, what in reversed(resting):  # in token order
                n_tokens = len(what.tokens) if isinstance(what, RestingTail) else block_tokens
                if not what.in_file:
                    group = names[0] if names else tail_key(root)
                    self._writer.add((name, what, saved_s * n_tokens, label, group))
        self.counters.dropped += self.index.shrink(self._most_bytes)
        if self.on_rest is not None:
            self.on_rest()

    @staticmethod
    def _tail_of(cache: ManagedKVCache, tokens: Sequence[Token]) -> RestingTail | None:
        """Take the tail away from a cache, as a resting tail."""
        tails = [tail for tail in (layer.take_tail() for layer in cache.layers) if tail is not None]
        if not tokens or len(tails) != len(cache.layers):
            return None
        shape: Any = tuple(tails[0].keys.shape)
        return RestingTail(list(tokens), [tail.pinned.release() for tail in tails], shape, tails[0].keys.dtype)

    def forget(self, tensor_id: str) -> int:
        """Forget the block or tail that contains a resting tensor; return the bytes of memory freed."""
        held = self.index.holder(tensor_id)
        if held is None:
            return 0
        name, what = held
        freed = self._resident_bytes(what.layers)
        return freed if self.index.remove(name, what) else 0

    def stats(self) -> dict[str, Any]:
        """Return the counters and the current totals."""
        corrupt = 0 if self._files is None else self._files.corrupt
        return {**asdict(self.counters), "corrupt": corrupt, **self.index.stats()}

    def flush(self) -> None:
        """Wait until everything to be persisted is written."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write everything to be persisted, and forget the rest."""
        if self._writer is not None:
            self._writer.close()
        self.index.clear()

    # --- files --------------------------------------------------------------------------------------------------------

    def _write(self, job: tuple[str, Resting, float, str | None, str]) -> None:
        """Write blocks or a tail to a cache file, in the writer's thread."""
        name, what, saved_s, label, group = job
        if self._files is None or what.in_file or not self.index.rests(name, what):
            return
        key, meta = name, {}
        if isinstance(what, RestingTail):
            dtype = str(what.dtype).removeprefix("torch.")
            key, meta = tail_key(name), {"tokens": what.tokens, "shape": list(what.shape), "dtype": dtype}
            self._files.remove(key)  # written for an earlier sequence
        n_bytes = self._files.write(
            key, what.layers, meta, saved_s, lambda: self.index.rests(name, what), label=label, group=group
        )
        if not n_bytes:
            return
        what.in_file = True
        self.counters.blocks_written += len(what.layers)
        self.counters.written_bytes += n_bytes
        if isinstance(what, RestingBlocks):
            self._files.leave(key, what.layers)
            self.index.close_files(_MOST_OPEN_FILES)

    def _load_blocks(self, name: str, cache: ManagedKVCache) -> RestingBlocks | None:
        """Return blocks from a cache file, or `None` if there is no usable one."""
        if self._files is None:
            return None
        layout = cache.layers[0].layout()
        n_bytes = sum(segment.n_bytes for segment in layout)
        loaded = self._files.load(name, len(cache.layers), lambda meta: int(meta["bytes"]) == n_bytes)
        if loaded is None:
            return None
        found = RestingBlocks([StoredBlock(block, layout) for block in loaded[0]], in_file=True)
        self.index.add_blocks(name, found)
        self.counters.blocks_from_ssd += len(found.stored)
        return found

    def _load_tail(self, parent: str, cache: ManagedKVCache, first: Token) -> RestingTail | None:
        """Return a tail from a cache file, or `None` if none is usable and begins with `first`."""
        if self._files is None:
            return None
        layer = cache.layers[0]

        def accepts(meta: dict[str, Any]) -> bool:
            batch, heads, capacity, head_dim = meta["shape"]
            n_bytes = 2 * batch * heads * capacity * head_dim * layer.tail_dtype.itemsize
            return (
                (batch, heads, head_dim) == (1, layer.heads, layer.head_dim)
                and getattr(torch, meta["dtype"]) is layer.tail_dtype
                and int(meta["bytes"]) == n_bytes
                and meta["tokens"][:1] == [first]
            )

        loaded = self._files.load(tail_key(parent), len(cache.layers), accepts)
        if loaded is None:
            return None
        blocks, meta = loaded
        tail = RestingTail(list(meta["tokens"]), blocks, tuple(meta["shape"]), layer.tail_dtype, in_file=True)
        self.index.add_tail(parent, tail)
        self.counters.blocks_from_ssd += len(blocks)
        return tail
