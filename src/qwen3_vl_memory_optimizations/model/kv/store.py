"""`KVStore`: the keys and values of sequences that rest, by what they were computed from.

A block lies where it was encoded: in memory of the Pager, from where it may leave for the SSD, and, where it may
outlive the process, in a file of the cache as it was in memory. A sequence that begins as one before takes references
to its blocks; nothing is decoded, encoded again or copied. The end of a sequence, its tail, rests as it is: the next
turn of a conversation goes on in it, and a prompt that differs within it copies what is equal.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ...cache import EncodedItem, SSDCache, digest
from ...errors import CorruptDataError, MemoryOptimizationError
from ...paging import Block, BlockSpace, FileSource, page_checksums, stored_bytes
from .cache import ManagedKVCache
from .layer import StoredBlock, Tail
from .naming import Token, block_names
from .writer import KVWriter

logger = logging.getLogger(__name__)

KIND = "keys and values"
_OWNER = "kv writer"
_WRITER_BYTES = 4 << 20
"""What writing an entry takes besides the blocks."""
_TAILS_PER_BLOCK = 4
_MOST_FILES = 512


@dataclass(slots=True)
class KVStoreStats:
    """What happened since the start.

    Attributes:
        lookups: prompts that were looked up; `hits`: those that began as a sequence before.
        prompt_tokens: of those prompts; `reused_tokens`: of these, taken from sequences before.
        blocks_shared: references taken to encoded blocks, one per layer; `shared_bytes`: their size.
        blocks_from_ssd: those of them that came from files of the cache.
        tails_continued: tails that were gone on in where they lie; `tails_copied`: copied up to where they differ.
        blocks_written: blocks written to files of the cache; `written_bytes`: their size.
        wanted_bytes: of blocks and tails that were gone on with; `resident_bytes`: of them, what was in memory.
        corrupt: files that were not what was written.
        dropped: blocks that were forgotten, to keep within the size.
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
    corrupt: int = 0
    dropped: int = 0


@dataclass(slots=True)
class RestingBlocks:
    """A block of tokens of a sequence: one encoded block per layer."""

    layers: list[StoredBlock]
    in_file: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(stored.block.n_bytes for stored in self.layers)


@dataclass(slots=True)
class RestingTail:
    """The end of a sequence.

    Attributes:
        tokens: that it holds.
        layers: `[2, 1, heads, capacity, head_dim]` each.
        shape: `(1, heads, capacity, head_dim)`; `dtype`: of the numbers.
    """

    tokens: list[Token]
    layers: list[Block]
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    in_file: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(block.n_bytes for block in self.layers)


@dataclass(slots=True)
class Match:
    """What is known of a prompt.

    Attributes:
        blocks: those it begins with.
        tail: goes on behind them, for `tail_tokens`.
        parent: name of the last of them, or the root.
    """

    parent: str
    blocks: list[RestingBlocks] = field(default_factory=list)
    tail: RestingTail | None = None
    tail_tokens: int = 0

    def n_tokens(self, block_tokens: int) -> int:
        """How many tokens are known."""
        return len(self.blocks) * block_tokens + self.tail_tokens


class KVStore:
    """Keeps what sequences leave, and finds it again. Used by one thread at a time; writing has a thread of its own.

    Args:
        space: where blocks lie.
        files: the level of the cache on the SSD; `None`: nothing outlives the process.
        most_bytes: the most that rests, in memory and in the swap file; above it the longest unused is forgotten.

    Attributes:
        own: called with ids of tensors and whether a sequence that runs holds them; those that rest may be collected.
        on_rest: called when a sequence came to rest.
    """

    def __init__(self, space: BlockSpace, files: SSDCache | None, most_bytes: int) -> None:
        self.space = space
        self.counters = KVStoreStats()
        self.own: Callable[[Iterable[str], bool], None] | None = None
        self.on_rest: Callable[[], None] | None = None
        self._files = files
        self._most_bytes = most_bytes
        self._lock = threading.RLock()
        self._blocks: OrderedDict[str, RestingBlocks] = OrderedDict()  # the longest unused first
        self._tails: OrderedDict[str, list[RestingTail]] = OrderedDict()  # by the name of the block before
        self._resting_bytes = 0
        self._writer = None if files is None else KVWriter(self._write)

    # --- looking up ---------------------------------------------------------------------------------------------------

    def find(self, tokens: Sequence[Token], root: str, cache: ManagedKVCache) -> Match:
        """Return what is known of a prompt; at least one token of it is left to compute.

        Args:
            tokens: of the prompt.
            root: digest of what all of it depends on.
            cache: an empty one, of one sequence, that could go on with what is found; its layers have begun.
        """
        counters, block_tokens = self.counters, cache.block_tokens
        counters.lookups += 1
        counters.prompt_tokens += len(tokens)
        match = Match(root)
        with self._lock:
            for name in block_names(tokens[: len(tokens) - 1], root, block_tokens):
                found = self._blocks.get(name) or self._load_blocks(name, cache)
                if found is None:
                    break
                match.blocks.append(found)
                match.parent = name
            start = len(match.blocks) * block_tokens
            rest = list(tokens[start : len(tokens) - 1])
            for tail in self._tails.get(match.parent, []):
                self._take_longer(match, tail, rest)
            if not match.tail_tokens and rest:
                stored = self._load_tail(match.parent, cache, rest[0])
                if stored is not None:
                    self._take_longer(match, stored, rest)
        n_tokens = match.n_tokens(block_tokens)
        counters.hits += n_tokens > 0
        counters.reused_tokens += n_tokens
        return match

    @staticmethod
    def _take_longer(match: Match, tail: RestingTail, rest: list[Token]) -> None:
        equal = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tail.tokens, rest, strict=False))
        )
        if equal > match.tail_tokens:
            match.tail, match.tail_tokens = tail, equal

    def adopt(self, match: Match, cache: ManagedKVCache) -> int:
        """Have an empty cache begin with what was found; return how many tokens it then holds.

        Raises:
            MemoryBudgetExceeded: its tail does not fit; discard the cache.
        """
        blocks = [stored.block for each in match.blocks for stored in each.layers]
        self._count_resident([*blocks, *(match.tail.layers if match.tail is not None else ())])
        self._own(blocks, True)
        self.space.rest(blocks, used=True)
        self._adopt_tail(match, cache)
        for index, layer in enumerate(cache.layers):
            layer.rows = [[each.layers[index] for each in match.blocks]]
        with self._lock:
            for name in [name for name, each in self._blocks.items() if any(each is found for found in match.blocks)]:
                self._blocks.move_to_end(name)
        self.counters.blocks_shared += len(blocks)
        self.counters.shared_bytes += sum(block.n_bytes for block in blocks)
        return match.n_tokens(cache.block_tokens)

    def _count_resident(self, blocks: Sequence[Block]) -> None:
        entries = [block.entry for block in blocks if block.entry is not None]
        self.counters.wanted_bytes += sum(page.n_bytes for entry in entries for page in entry.pages)
        if self.space.pager is not None:
            self.counters.resident_bytes += self.space.pager.runtime.resident_bytes(entries)

    def _own(self, blocks: Sequence[Block], owned: bool) -> None:
        if self.own is not None:
            self.own([block.entry.tensor_id for block in blocks if block.entry is not None], owned)

    def _adopt_tail(self, match: Match, cache: ManagedKVCache) -> None:
        tail = match.tail
        if tail is None:
            return
        whole = match.tail_tokens == len(tail.tokens)
        pinned = [self.space.pinned(block) for block in tail.layers]
        if whole:
            # The sequence goes on where it stopped. What lies in a file stays there, for another process.
            with self._lock:
                self._forget_tail(match.parent, tail)
            for layer, each in zip(cache.layers, pinned, strict=True):
                layer.set_tail(Tail.of(each, tail.shape, tail.dtype), match.tail_tokens)
            self.counters.tails_continued += 1
            return
        for layer, each in zip(cache.layers, pinned, strict=True):
            there = Tail.of(each, tail.shape, tail.dtype)
            layer.append(there.keys[:, :, : match.tail_tokens], there.values[:, :, : match.tail_tokens])
            each.release()
        self.counters.tails_copied += 1

    # --- keeping ------------------------------------------------------------------------------------------------------

    def rest(
        self, cache: ManagedKVCache, row: int, tokens: Sequence[Token], root: str, *, persist: bool, saved_s: float
    ) -> None:
        """Keep the blocks and the tail of a sequence that ended for now; its cache is of no further use.

        Args:
            cache: holds it.
            row: of its batch; the tail is kept of a batch of one.
            tokens: that it holds.
            root: digest of what all of it depends on.
            persist: other processes may come to the same names, and may find it.
            saved_s: what computing a token takes.
        """
        layers, block_tokens = cache.layers, cache.block_tokens
        n_blocks = min(layer.n_blocks for layer in layers)
        names = block_names(tokens[: n_blocks * block_tokens], root, block_tokens)[:n_blocks]
        new: list[Block] = []
        with self._lock:
            for index, name in reversed(list(enumerate(names))):  # what comes first is to leave last
                known = self._blocks.get(name)
                if known is None:
                    known = self._blocks[name] = RestingBlocks([layer.rows[row][index] for layer in layers])
                    self._resting_bytes += known.n_bytes
                    new += [stored.block for stored in known.layers]
                self._blocks.move_to_end(name)
            tail = self._rest_tail(cache, tokens[n_blocks * block_tokens :]) if layers[0].batch_size == 1 else None
            parent = names[-1] if names else root
            if tail is not None:
                kept = self._tails.setdefault(parent, [])
                kept.insert(0, tail)
                self._tails.move_to_end(parent)
                self._resting_bytes += tail.n_bytes
                new += tail.layers
                for old in kept[_TAILS_PER_BLOCK:]:
                    self._forget_tail(parent, old)
        used = [layer.rows[row][index].block for index in range(n_blocks) for layer in layers]
        self.space.rest(used, used=False)
        self.space.rest(new, used=True)
        self._own([*used, *new], False)
        if persist and self._writer is not None:
            for name in names:
                if not self._blocks[name].in_file:
                    self._writer.add((name, None, saved_s * block_tokens))
            if tail is not None:
                self._writer.add((parent, tail, saved_s * len(tail.tokens)))
        self._keep_within_size()
        if self.on_rest is not None:
            self.on_rest()

    def forget(self, tensor_id: str) -> int:
        """Forget a tensor that rests, with all that is of no use without it; return the bytes of memory this frees."""
        pager = self.space.pager
        with self._lock:
            for name, each in self._blocks.items():
                if any(
                    stored.block.entry is not None and stored.block.entry.tensor_id == tensor_id
                    for stored in each.layers
                ):
                    entries = [stored.block.entry for stored in each.layers if stored.block.entry is not None]
                    freed = 0 if pager is None else pager.runtime.resident_bytes(entries)
                    del self._blocks[name]
                    self._resting_bytes -= each.n_bytes
                    return freed
            for parent, kept in self._tails.items():
                for tail in kept:
                    if any(block.entry is not None and block.entry.tensor_id == tensor_id for block in tail.layers):
                        entries = [block.entry for block in tail.layers if block.entry is not None]
                        freed = 0 if pager is None else pager.runtime.resident_bytes(entries)
                        self._forget_tail(parent, tail)
                        return freed
        return 0

    @staticmethod
    def _rest_tail(cache: ManagedKVCache, tokens: Sequence[Token]) -> RestingTail | None:
        tails = [layer.take_tail() for layer in cache.layers]
        if not tokens or any(tail is None for tail in tails):
            return None
        first = tails[0]
        assert first is not None
        blocks = [tail.pinned.release() for tail in tails if tail is not None]
        shape: Any = tuple(first.keys.shape)
        return RestingTail(list(tokens), blocks, shape, first.keys.dtype)

    def _forget_tail(self, parent: str, tail: RestingTail) -> None:
        kept = self._tails.get(parent, [])
        if any(each is tail for each in kept):
            self._tails[parent] = [each for each in kept if each is not tail]
            self._resting_bytes -= tail.n_bytes
            if not self._tails[parent]:
                del self._tails[parent]

    def _keep_within_size(self) -> None:
        with self._lock:
            while self._resting_bytes > self._most_bytes and (self._tails or self._blocks):
                if self._tails and len(self._tails) >= len(self._blocks):
                    parent, kept = next(iter(self._tails.items()))
                    self._forget_tail(parent, kept[-1])
                elif self._blocks:
                    name, forgotten = self._blocks.popitem(last=False)
                    self._resting_bytes -= forgotten.n_bytes
                    for tail in self._tails.get(name, [])[:]:
                        self._forget_tail(name, tail)
                self.counters.dropped += 1

    def clear(self) -> None:
        """Forget all that rests in this process."""
        with self._lock:
            self._blocks.clear()
            self._tails.clear()
            self._resting_bytes = 0

    def stats(self) -> dict[str, Any]:
        """Return the counters, and what rests now."""
        with self._lock:
            tails = sum(len(kept) for kept in self._tails.values())
            return {
                **asdict(self.counters),
                "resting_bytes": self._resting_bytes,
                "resting_blocks": sum(len(each.layers) for each in self._blocks.values()),
                "resting_tails": tails,
            }

    def close(self) -> None:
        """Write what is to outlive the process, and forget the rest."""
        if self._writer is not None:
            self._writer.close()
        self.clear()

    def flush(self) -> None:
        """Return once all that is to outlive the process is written."""
        if self._writer is not None:
            self._writer.flush()

    # --- files --------------------------------------------------------------------------------------------------------

    def _write(self, job: tuple[str, RestingTail | None, float]) -> None:
        """Write blocks, or a tail, into a file of the cache as they lie in memory; in the thread of the writer."""
        name, tail, saved_s = job
        assert self._files is not None
        with self._lock:
            blocks = self._blocks.get(name) if tail is None else None
            if tail is None and (blocks is None or blocks.in_file):
                return
            if tail is not None and not self._rests(name, tail):
                return
        key = name if tail is None else _tail_key(name)
        layers = tail.layers if tail is not None else [stored.block for stored in blocks.layers]  # type: ignore[union-attr]
        meta: dict[str, Any] = {}
        if tail is not None:
            meta = {"tokens": tail.tokens, "shape": list(tail.shape), "dtype": str(tail.dtype).removeprefix("torch.")}
            self._files.remove(key)
        pager = self.space.pager
        try:
            if pager is not None:
                pager.debit(_OWNER, _WRITER_BYTES)
            try:
                with self.space.held(layers):
                    parts = [_whole(block) for block in layers]
                    sums = [list(page_checksums(block)) for block in layers] if pager is not None else []
                    encoded = EncodedItem({"tensors": [], "bytes": layers[0].n_bytes, "sums": sums, **meta}, parts)
                    if tail is not None and not self._rests(name, tail):
                        return  # the sums may be those of another sequence
                    written = self._files.store_encoded(key, encoded, saved_s=saved_s, kind=KIND)
            finally:
                if pager is not None:
                    pager.debit(_OWNER, -_WRITER_BYTES)
                self.space.rest(layers, used=False)
        except MemoryOptimizationError as error:  # no room to hold them, or closed: they are computed again
            logger.debug("keys and values are not kept on the SSD: %s", str(error))
            return
        if not written:
            return
        if tail is not None and not self._rests(name, tail):
            self._files.remove(key)  # its contents no longer match the checksums
            return
        self.counters.blocks_written += len(layers)
        self.counters.written_bytes += sum(part.nbytes for part in parts)
        (blocks if tail is None else tail).in_file = True  # type: ignore[union-attr]
        if tail is None:
            self._leave_in_file(key, layers)

    def _rests(self, parent: str, tail: RestingTail) -> bool:
        """Whether a tail still rests: one that a sequence goes on in changes where it lies."""
        with self._lock:
            return any(each is tail for each in self._tails.get(parent, []))

    def _leave_in_file(self, key: str, layers: Sequence[Block]) -> None:
        """From now on blocks need not be written when they leave memory: the file holds them."""
        assert self._files is not None
        if self.space.pager is None or not self.space.moves or self._files_open() >= _MOST_FILES:
            return
        opened = self._files.store_files.open(key)
        if opened is None:
            return
        file, meta, offset = opened
        for block, sums in zip(layers, meta["sums"], strict=True):
            if block.entry is not None:
                self.space.pager.runtime.keep_in_file(block.entry, FileSource(file, offset, tuple(sums)))
            offset += stored_bytes(block.n_bytes)

    def _files_open(self) -> int:
        """Return how many files are held open: one for each block that need not be written."""
        with self._lock:
            entries = (each.layers[0].block.entry for each in self._blocks.values())
            return sum(entry is not None and entry.source is not None for entry in entries)

    def _load_blocks(self, name: str, cache: ManagedKVCache) -> RestingBlocks | None:
        """Return blocks of a file of the cache, read and checked; `None`: there is none that can be used."""
        layout = cache.layers[0].layout()
        n_bytes = sum(segment.n_bytes for segment in layout)
        loaded = self._load(name, len(cache.layers), n_bytes)
        if loaded is None:
            return None
        found = RestingBlocks([StoredBlock(block, layout) for block in loaded[0]], in_file=True)
        self._blocks[name] = found
        self._resting_bytes += found.n_bytes
        self.counters.blocks_from_ssd += len(found.layers)
        return found

    def _load_tail(self, parent: str, cache: ManagedKVCache, first: Token) -> RestingTail | None:
        """Return the tail of a file of the cache; `None`: none can be used or begins with `first`."""
        loaded = self._load(_tail_key(parent), len(cache.layers), None, first)
        if loaded is None:
            return None
        blocks, meta = loaded
        dtype = getattr(torch, str(meta["dtype"]))
        tail_shape: Any = tuple(meta["shape"])
        n_bytes = 2 * torch.Size(tail_shape).numel() * dtype.itemsize
        layer = cache.layers[0]
        expected = (1, layer.heads, layer.head_dim)
        if (tail_shape[0], tail_shape[1], tail_shape[3]) != expected or n_bytes != blocks[0].n_bytes:
            return None
        if dtype != layer.tail_dtype:
            return None
        tail = RestingTail(list(meta["tokens"]), blocks, tail_shape, dtype, in_file=True)
        self._tails.setdefault(parent, []).append(tail)
        self._resting_bytes += tail.n_bytes
        self.counters.blocks_from_ssd += len(blocks)
        return tail

    def _load(
        self, key: str, n_layers: int, n_bytes: int | None, first: Token | None = None
    ) -> tuple[list[Block], dict[str, Any]] | None:
        files, pager = self._files, self.space.pager
        if files is None or pager is None or files.store_files.size_of(key) is None:
            return None
        try:
            opened = files.store_files.open(key)
            if opened is None:
                return None
            file, meta, offset = opened
            size = int(meta["bytes"])
            if len(meta["sums"]) != n_layers or (n_bytes is not None and size != n_bytes):
                return None
            if first is not None and meta["tokens"][:1] != [first]:
                return None
            blocks = []
            for sums in meta["sums"]:
                blocks.append(self.space.stored(size, file, offset, tuple(sums)))
                offset += stored_bytes(size)
            for block in blocks:  # read and checked before anything depends on it
                with self.space.held([block], [each for each in blocks if each is not block]):
                    pass
            self.space.rest(blocks, used=False)
        except CorruptDataError as error:
            logger.warning("keys and values of the cache are not used, and are removed: %s", str(error))
            self.counters.corrupt += 1
            files.remove(key)
            return None
        except (MemoryOptimizationError, KeyError, TypeError, ValueError) as error:
            logger.debug("keys and values of the cache are not used: %s", str(error))
            return None
        files.note_hit(key)
        return blocks, meta


def _tail_key(parent: str) -> str:
    return digest("tail", parent)


def _whole(block: Block) -> torch.Tensor:
    """Return all bytes of a block, those that fill its last frame included."""
    if block.entry is None:
        rest = torch.zeros(stored_bytes(block.n_bytes) - block.n_bytes, dtype=torch.uint8)
        return torch.cat([block.data, rest])
    return block.entry.encoded(0, block.entry.rows)["data"].view(-1)
