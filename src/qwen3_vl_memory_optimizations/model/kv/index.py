"""Index resting blocks and tails by name and by tensor, with their total size (`RestingIndex`)."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...paging import Block, TensorEntry
from .layer import StoredBlock
from .naming import Token

_TAILS_PER_BLOCK = 4


@dataclass(slots=True, eq=False)
class RestingBlocks:
    """A block of tokens of a sequence: one encoded block per layer.

    Attributes:
        in_file: also stored in a cache file.
    """

    stored: list[StoredBlock]
    in_file: bool = False

    @property
    def layers(self) -> list[Block]:
        """The memory of each layer."""
        return [each.block for each in self.stored]

    @property
    def holds_file(self) -> bool:
        """Whether it keeps its file open for reading."""
        return any(entry.source is not None for entry in entries_of(self.layers[:1]))


@dataclass(slots=True, eq=False)
class RestingTail:
    """The end of a sequence.

    Attributes:
        tokens: the tokens it holds.
        layers: one `[2, 1, heads, capacity, head_dim]` per layer.
        shape: `(1, heads, capacity, head_dim)`; `dtype`: of the numbers.
        in_file: also stored in a cache file.
    """

    tokens: list[Token]
    layers: list[Block]
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    in_file: bool = False

    def n_equal(self, tokens: Sequence[Token]) -> int:
        """Return the length of the common prefix with `tokens`."""
        pairs = zip(self.tokens, tokens, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


Resting = RestingBlocks | RestingTail


@dataclass(slots=True)
class Match:
    """The known beginning of a prompt.

    Attributes:
        parent: name of the last of `blocks`, or the root.
        blocks: the blocks that the prompt begins with.
        tail: continues after them for `tail_tokens`.
    """

    parent: str
    blocks: list[RestingBlocks] = field(default_factory=list)
    tail: RestingTail | None = None
    tail_tokens: int = 0

    def take_longer(self, tail: RestingTail, tokens: Sequence[Token]) -> None:
        """Take a tail if it matches more of the tokens after the blocks than the current one."""
        equal = tail.n_equal(tokens)
        if equal > self.tail_tokens:
            self.tail, self.tail_tokens = tail, equal

    def n_tokens(self, block_tokens: int) -> int:
        """Return the number of known tokens."""
        return len(self.blocks) * block_tokens + self.tail_tokens


class RestingIndex:
    """Blocks by name, tails by the name of the preceding block, and both by their tensor ids. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._blocks: OrderedDict[str, RestingBlocks] = OrderedDict()  # least recently used first
        self._tails: OrderedDict[str, list[RestingTail]] = OrderedDict()
        self._holders: dict[str, tuple[str, Resting]] = {}  # tensor id -> (name, block or tail that contains it)
        self.n_bytes = 0

    def blocks(self, name: str) -> RestingBlocks | None:
        """Return the blocks with a name."""
        with self._lock:
            return self._blocks.get(name)

    def tails(self, parent: str) -> list[RestingTail]:
        """Return the tails after a block, newest first."""
        with self._lock:
            return list(self._tails.get(parent, ()))

    def add_blocks(self, name: str, blocks: RestingBlocks) -> bool:
        """Add blocks, or record a use of those with this name; return whether they were added."""
        with self._lock:
            new = name not in self._blocks
            if new:
                self._blocks[name] = blocks
                self._count(name, blocks, 1)
            self._blocks.move_to_end(name)
            return new

    def add_tail(self, parent: str, tail: RestingTail) -> None:
        """Add a tail; only the newest few per block are kept."""
        with self._lock:
            kept = self._tails.setdefault(parent, [])
            kept.insert(0, tail)
            self._tails.move_to_end(parent)
            self._count(parent, tail, 1)
            for old in kept[_TAILS_PER_BLOCK:]:
                self.remove(parent, old)

    def used(self, blocks: Sequence[RestingBlocks]) -> None:
        """Record a use of blocks; the first of a sequence will be forgotten last."""
        with self._lock:
            for each in reversed(blocks):
                for tensor_id in _ids(each)[:1]:
                    name = self._holders[tensor_id][0] if tensor_id in self._holders else ""
                    if name in self._blocks:
                        self._blocks.move_to_end(name)

    def rests(self, name: str, what: Resting) -> bool:
        """Return whether this object still rests under a name."""
        with self._lock:
            return self._blocks.get(name) is what or any(each is what for each in self._tails.get(name, ()))

    def remove(self, name: str, what: Resting) -> bool:
        """Forget a block or tail; return whether it was present."""
        with self._lock:
            if not self.rests(name, what):
                return False
            if isinstance(what, RestingBlocks):
                del self._blocks[name]
            else:
                self._tails[name] = [each for each in self._tails[name] if each is not what]
                if not self._tails[name]:
                    del self._tails[name]
            self._count(name, what, -1)
            return True

    def holder(self, tensor_id: str) -> tuple[str, Resting] | None:
        """Return the name under which a tensor rests, and the block or tail that contains it."""
        with self._lock:
            return self._holders.get(tensor_id)

    def shrink(self, most_bytes: int) -> int:
        """Forget the least recently used until at most `most_bytes` rest; return the number of blocks and tails
        dropped.
        """
        dropped = 0
        with self._lock:
            while self.n_bytes > most_bytes and (self._blocks or self._tails):
                if len(self._tails) >= len(self._blocks):
                    name, kept = next(iter(self._tails.items()))
                    self.remove(name, kept[-1])
                else:
                    name, blocks = next(iter(self._blocks.items()))
                    self.remove(name, blocks)
                    for tail in self.tails(name):  # unreachable without the block
                        dropped += self.remove(name, tail)
                dropped += 1
        return dropped

    def close_files(self, most: int) -> int:
        """Forget the least recently used blocks with an open file until at most `most` remain; return how many.

        Nothing is lost: the file can be found again by its name.
        """
        with self._lock:
            open_now = [(name, each) for name, each in self._blocks.items() if each.holds_file]
            for name, each in open_now[: max(0, len(open_now) - most)]:
                self.remove(name, each)
            return max(0, len(open_now) - most)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._blocks.clear()
            self._tails.clear()
            self._holders.clear()
            self.n_bytes = 0

    def stats(self) -> dict[str, int]:
        """Return the current totals."""
        with self._lock:
            return {
                "resting_bytes": self.n_bytes,
                "resting_blocks": sum(len(each.stored) for each in self._blocks.values()),
                "resting_tails": sum(len(kept) for kept in self._tails.values()),
            }

    def _count(self, name: str, what: Resting, sign: int) -> None:
        self.n_bytes += sign * sum(block.n_bytes for block in what.layers)
        for tensor_id in _ids(what):
            if sign > 0:
                self._holders[tensor_id] = (name, what)
            elif self._holders.get(tensor_id, (None, None))[1] is what:
                del self._holders[tensor_id]


def entries_of(blocks: Sequence[Block]) -> list[TensorEntry]:
    """Return the Pager's records of blocks; empty without a Pager."""
    return [block.entry for block in blocks if block.entry is not None]


def _ids(what: Resting) -> list[str]:
    return [entry.tensor_id for entry in entries_of(what.layers)]
