"""`CacheStore`: what a collector may let go of in a cache."""

from __future__ import annotations

from collections.abc import Hashable

from ..collection import Held
from .memory import CPUCache
from .ssd import SSDCache


class CacheStore:
    """The entries of a cache in memory. Nobody refers to them: what is let go of is computed, or read, again.

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
        """Return whether an entry is on the SSD too."""
        return self._below is not None and self._below.store_files.size_of(str(key)) is not None

    def used(self) -> list[Hashable]:
        """Return nothing: the cache tells of each use."""
        return []

    def pressure(self) -> float:
        """Return the share of the level that is filled; 1 where the budget wants memory back."""
        return self._memory.fill()

    def compress(self, key: Hashable) -> int:
        """Pack an entry without a loss."""
        return self._memory.deflate(str(key))

    def swap(self, key: Hashable) -> int:
        """Move an entry to the SSD; not possible for one that is to stay in memory."""
        if self._below is None or not (self.is_stored(key) or self._memory.may_leave(str(key))):
            return 0
        return self._memory.evict(str(key))

    def free(self, key: Hashable) -> int:
        """Forget an entry."""
        return self._memory.remove(str(key))
