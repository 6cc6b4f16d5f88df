"""`CPUCache` and `GPUCache`: levels in memory, bounded by their size and by the budget."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigurationError, MemoryBudgetExceeded
from ..prediction import choose_victims, worth
from .budget import CacheBudget, Unlimited
from .deflate import DeflatedItem, deflate
from .item import CODECS, LOSSLESS, CacheItem, EncodedItem, decode, encode
from .stats import LevelStats

MOST_SHARE = 4
"""An entry takes at most 1/4 of a level: a larger one would flush it."""
_MOST_SHARE_OF_ROOM = 2


@dataclass(slots=True)
class _Held:
    """An entry: its form, its worth, and the inputs of that worth.

    Attributes:
        dense: it cannot be packed into fewer bytes.
    """

    encoded: EncodedItem | DeflatedItem
    n_bytes: int
    worth: float
    saved_s: float
    kind: str | None
    reused: bool = False
    dense: bool = False

    @property
    def deflated(self) -> bool:
        """Return whether it is packed."""
        return isinstance(self.encoded, DeflatedItem)


class CPUCache:
    """Entries in memory.

    Its lock is never held while the budget is called: the budget has its own lock, and may call `shrink`.

    Args:
        size: maximum bytes held.
        budget: debited for the bytes held; without one, only `size` applies.
        codec: `lossless`, or `int8` for floating-point tensors that lose less than 2 %.
        on_evict: called with the key, form, seconds saved and kind of an entry evicted for another use.

    Raises:
        ConfigurationError: an unknown codec.
    """

    level = "cpu"

    def __init__(
        self,
        size: int = 2**30,
        *,
        budget: CacheBudget | None = None,
        codec: str = LOSSLESS,
        on_evict: Callable[[str, EncodedItem, float, str | None], None] | None = None,
    ) -> None:
        if codec not in CODECS:
            raise ConfigurationError(f"codec: {codec!r} is not one of {', '.join(CODECS)}")
        self.size_bytes = int(size)
        self.codec = codec
        self.on_evict = on_evict
        self.counters = LevelStats()
        self._budget = budget or Unlimited()
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Held] = OrderedDict()  # least recently used first
        self._used_bytes = 0
        self._clock = 0.0

    @property
    def used_bytes(self) -> int:
        """Bytes held."""
        return self._used_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def load(self, key: str, *, uses: int = 1, copy: bool = True) -> CacheItem | None:
        """Return an entry, or `None`.

        Args:
            key: key of the entry.
            uses: number of recent requests for it.
            copy: return separate memory; otherwise the entry may share memory with the cache and must not be modified.
        """
        with self._lock:
            held = self._entries.get(key)
            if held is None:
                self.counters.misses += 1
                return None
            self._entries.move_to_end(key)
            held.worth = worth(self._clock, uses, held.saved_s, held.n_bytes)
            self.counters.hits += 1
            self.counters.hit_bytes += held.n_bytes
            self.counters.reused += not held.reused
            held.reused = True
            encoded = held.encoded
        if isinstance(encoded, DeflatedItem):
            return decode(encoded.inflate(), copy=False)
        return decode(encoded, copy=copy)

    def store(self, key: str, item: CacheItem, *, saved_s: float, uses: int = 1, kind: str | None = None) -> bool:
        """Store an item if it is worth more than what it would evict; return whether it is stored.

        Args:
            key: key of the entry.
            item: copied.
            saved_s: expected seconds saved per hit.
            uses: number of recent requests for it.
            kind: kind of the item; `None`: keep it out of the levels below.
        """
        n_bytes = item.n_bytes
        if key in self._entries:
            return True
        room = self._budget.room_bytes()
        with self._lock:
            limit = min(self.size_bytes, self._used_bytes + room)
            fits = n_bytes <= self.size_bytes // MOST_SHARE and n_bytes <= limit // _MOST_SHARE_OF_ROOM
            value = worth(self._clock, uses, saved_s, n_bytes)
            leaving = self._choose(self._used_bytes + n_bytes - limit, value) if fits else None
            if leaving is None:
                self.counters.refused += 1
                return False
            self._used_bytes += n_bytes
        self._let_go(leaving)
        if not self._budget.take(n_bytes):
            with self._lock:
                self._used_bytes -= n_bytes
                self.counters.refused += 1
            return False
        try:
            encoded = encode(item, self.codec).owned()
        except BaseException:
            self._release(n_bytes)
            raise
        self._release(n_bytes - encoded.n_bytes)
        self._insert(key, _Held(encoded, encoded.n_bytes, value, saved_s, kind))
        return True

    def _insert(self, key: str, held: _Held) -> None:
        with self._lock:
            twice = key in self._entries
            if not twice:
                self._entries[key] = held
                self.counters.admitted += 1
                self.counters.admitted_bytes += held.n_bytes
        if twice:  # another thread stored it meanwhile
            self._release(held.n_bytes)

    def resize(self, size: int) -> None:
        """Change the size; if it shrinks, the least valuable entries are evicted.

        Raises:
            ConfigurationError: below one byte.
        """
        if size < 1:
            raise ConfigurationError(f"size: {size} bytes; use at least one byte")
        self.size_bytes = int(size)
        self.shrink(self.size_bytes)

    def shrink(self, to_bytes: int) -> int:
        """Evict the least valuable entries until at most `to_bytes` are held; return the bytes released."""
        if self._used_bytes <= to_bytes:
            return 0
        with self._lock:
            leaving = self._choose(self._used_bytes - to_bytes, None) or []
        return self._let_go(leaving)

    def fit(self, growth_bytes: int = 0) -> None:
        """Give back the memory that the budget needs now, and for `growth_bytes` about to be reserved."""
        if self._used_bytes:
            room = self._budget.room_bytes() - growth_bytes
            if room < 0:
                self.shrink(max(0, self._used_bytes + room))

    def remove(self, key: str) -> int:
        """Remove an entry; return the bytes released."""
        with self._lock:
            held = self._entries.pop(key, None)
        if held is None:
            return 0
        self._release(held.n_bytes)
        return held.n_bytes

    # --- for a collector ----------------------------------------------------------------------------------------------

    def entries(self) -> dict[str, _Held]:
        """Return a snapshot of the entries, least recently used first; they must not be modified."""
        with self._lock:
            return dict(self._entries)

    def fill(self) -> float:
        """Return the filled share of the level; 1 if the budget has no room."""
        return 1.0 if self._budget.room_bytes() <= 0 else self._used_bytes / max(self.size_bytes, 1)

    def may_leave(self, key: str) -> bool:
        """Return whether an entry may move to the level below."""
        held = self._entries.get(key)
        return held is not None and held.kind is not None

    def evict(self, key: str) -> int:
        """Move an entry to the level below; return the bytes released."""
        with self._lock:
            held = self._entries.pop(key, None)
            if held is None:
                return 0
            self.counters.evictions += 1
            self.counters.evicted_bytes += held.n_bytes
        return self._let_go([(key, held)])

    def deflate(self, key: str) -> int:
        """Pack an entry losslessly; return the bytes released."""
        held = self._entries.get(key)
        if held is None or not isinstance(held.encoded, EncodedItem) or held.dense:
            return 0
        try:
            with self._budget.workspace(held.n_bytes):
                packed = deflate(held.encoded)
        except MemoryBudgetExceeded:
            return 0
        with self._lock:
            if packed is None or self._entries.get(key) is not held:
                held.dense = packed is None
                return 0
            freed = held.n_bytes - packed.n_bytes
            held.encoded, held.n_bytes = packed, packed.n_bytes
        self._release(freed)
        return freed

    def clear(self) -> None:
        """Remove all entries."""
        with self._lock:
            freed = sum(held.n_bytes for held in self._entries.values())
            self._entries.clear()
        self._release(freed)

    def stats(self) -> dict[str, Any]:
        """Return counters, bytes held and ratios."""
        return self.counters.as_dict(entries=len(self), used_bytes=self._used_bytes, size_bytes=self.size_bytes)

    def _choose(self, needed_bytes: int, value: float | None) -> list[tuple[str, _Held]] | None:
        """Remove and return the entries to evict for something worth `value`; called under the lock."""
        victims = choose_victims(
            {key: (held.worth, held.n_bytes) for key, held in self._entries.items()} if needed_bytes > 0 else {},
            needed_bytes,
            value,
        )
        if victims is None:
            return None
        leaving = [(key, self._entries.pop(key)) for key in victims]
        for _, held in leaving:
            self._clock = max(self._clock, held.worth)
            self.counters.evictions += 1
            self.counters.evicted_bytes += held.n_bytes
        return leaving

    def _let_go(self, leaving: list[tuple[str, _Held]]) -> int:
        freed = 0
        for key, held in leaving:
            freed += held.n_bytes
            if self.on_evict is not None:
                encoded = held.encoded.inflate() if isinstance(held.encoded, DeflatedItem) else held.encoded
                self.on_evict(key, encoded, held.saved_s, held.kind)
                del encoded
            del held
        leaving.clear()  # free the memory before crediting the budget
        self._release(freed)
        return freed

    def _release(self, n_bytes: int) -> None:
        if n_bytes:
            with self._lock:
                self._used_bytes -= n_bytes
            self._budget.give(n_bytes)


class GPUCache(CPUCache):
    """Entries in the memory of a CUDA device; empty if there is no device.

    Args:
        size: maximum bytes held.

    Attributes:
        available: whether there is a device.
    """

    level = "gpu"

    def __init__(self, size: int = 512 * 2**20) -> None:
        super().__init__(size)
        self.available = torch.cuda.is_available()

    def load(self, key: str, *, uses: int = 1, copy: bool = True) -> CacheItem | None:
        """Return an entry on the device, or `None`."""
        return super().load(key, uses=uses, copy=copy) if self.available else None

    def store(self, key: str, item: CacheItem, *, saved_s: float, uses: int = 1, kind: str | None = None) -> bool:
        """Store an item whose tensors are on the device; other items are refused."""
        on_device = all(tensor.is_cuda for tensor in item.tensors.values())
        return self.available and on_device and super().store(key, item, saved_s=saved_s, uses=uses, kind=kind)

    def stats(self) -> dict[str, Any]:
        """Return counters, bytes held and ratios, and whether there is a device."""
        return {"available": self.available, **super().stats()}
