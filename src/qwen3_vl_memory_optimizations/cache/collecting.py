"""`CacheStore`: the cache entries that a collector may release."""

from __future__ import annotations

from collections.abc import Hashable

from ..collection import Held
from .memory import CPUCache
from .ssd import SSDCache


class CacheStore:
    """The entries of a cache in memory. Nothing references them: a released entry is computed or read again.

    Args:
        memory: the level in memory.
        below: the level on the SSD; `None`: there is none.
    """

    def __init__(self, memory: CPUCache, below: SSDCache | None) -> None:
        self._memory = memory
        self._below = below

    def held(self) -> dict[Hashable, Held]:
        """Return the entries in memory."""
        return {
            key: Held(entry.n_bytes, compressed=entry.deflated or entry.dense)
            for key, entry in self._memory.entries().items()
        }

    def is_stored(self, key: Hashable) -> bool:
        """Return whether an entry is also on the SSD."""
        return self._below is not None and self._below.store_files.size_of(str(key)) is not None

    def used(self) -> list[Hashable]:
        """Return nothing: the cache reports each use itself."""
        return []

    def pressure(self) -> float:
        """Return the filled share of the level; 1 if the budget needs memory back."""
        return self._memory.fill()

    def compress(self, key: Hashable) -> int:
        """Pack an entry losslessly."""
        return self._memory.deflate(str(key))

    def swap(self, key: Hashable) -> int:
        """Move an entry to the SSD; does nothing for entries that must stay in memory."""
        if self._below is None or not (self.is_stored(key) or self._memory.may_leave(str(key))):
            return 0
        return self._memory.evict(str(key))

    def free(self, key: Hashable) -> int:
        """Remove an entry."""
        return self._memory.remove(str(key))
