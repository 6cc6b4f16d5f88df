"""`CollectableStore`: the collector's interface to owners of memory, and the store of the Pager's runtime tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol

from ..paging import Pager


@dataclass(frozen=True, slots=True)
class Held:
    """An item in memory that may go down a stage now.

    Attributes:
        n_bytes: its size in memory.
        compressed: whether it cannot be compressed further.
    """

    n_bytes: int
    compressed: bool


class CollectableStore(Protocol):
    """Holds items in memory. Each stage returns the bytes freed; 0: not possible, nothing changed."""

    def held(self) -> dict[Hashable, Held]:
        """Return the items that may go down a stage."""

    def used(self) -> Iterable[Hashable]:
        """Return the items used since the last call, for stores that do not report uses as they happen."""

    def pressure(self) -> float:
        """Return the memory fill level, 0 to 1."""

    def is_stored(self, key: Hashable) -> bool:
        """Return whether an item is fully on the SSD, so that evicting it loses nothing."""

    def compress(self, key: Hashable) -> int:
        """Compress an item losslessly in memory."""

    def swap(self, key: Hashable) -> int:
        """Move an item to the SSD only."""

    def free(self, key: Hashable) -> int:
        """Free an item; never one that is still referenced."""


class RuntimeStore:
    """The runtime tensors of a Pager.

    Referenced tensors go to the swap file but are never freed; the KV cache of resting sequences may be freed. None are
    compressed: each keeps one address for life, and views of it may exist.

    Args:
        pager: owner of the tensors.

    Attributes:
        forget: frees a tensor that no caller references, by id, and returns the bytes freed; `None`: there are no such
            tensors.
    """

    def __init__(self, pager: Pager) -> None:
        self._pager = pager
        self.forget: Callable[[str], int] | None = None
        self._last_access: dict[str, int] = {}

    def held(self) -> dict[Hashable, Held]:
        """Return the unpinned tensors with bytes in memory; none without a budget, where memory is not scarce."""
        if not self._pager.ledger.limited:
            return {}
        idle = self._pager.runtime.idle_bytes().items()
        return {key: Held(n_bytes, compressed=True) for key, n_bytes in idle}

    def used(self) -> list[Hashable]:
        """Return the tensors whose last access changed."""
        now = self._pager.runtime.last_accesses()
        found: list[Hashable] = [key for key, clock in now.items() if clock > self._last_access.get(key, 0)]
        self._last_access = now
        return found

    def pressure(self) -> float:
        """Return the share of page frames in use: 1 if the weights do not fit."""
        return self._pager.runtime.fill()

    def is_stored(self, key: Hashable) -> bool:
        """Return whether a file holds the whole tensor; modified tensors are in none."""
        return self._pager.runtime.is_stored(str(key))

    def compress(self, key: Hashable) -> int:
        """Return 0: runtime tensors cannot be compressed."""
        return 0

    def swap(self, key: Hashable) -> int:
        """Swap a tensor out."""
        return self._pager.runtime.send_out(str(key))

    def free(self, key: Hashable) -> int:
        """Free the KV cache of a resting sequence; not possible for referenced tensors."""
        return 0 if self.forget is None else self.forget(str(key))
