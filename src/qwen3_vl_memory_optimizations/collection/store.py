"""`CollectableStore`: what a collector asks of those who hold memory, and the store of the Pager's runtime tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol

from ..paging import Pager


@dataclass(frozen=True, slots=True)
class Held:
    """Something in memory that may go down a stage now.

    Attributes:
        n_bytes: that it takes.
        compressed: it can take no less where it is.
    """

    n_bytes: int
    compressed: bool


class CollectableStore(Protocol):
    """Holds things in memory. Stages return the bytes that it frees; 0: not possible, nothing changed."""

    def held(self) -> dict[Hashable, Held]:
        """Return what may go down a stage."""

    def used(self) -> Iterable[Hashable]:
        """Return what was used since the last call, where uses are not told when they happen."""

    def pressure(self) -> float:
        """Return how full the memory is, 0 to 1."""

    def is_stored(self, key: Hashable) -> bool:
        """Return whether all of something is on the SSD: letting it go from memory loses nothing."""

    def compress(self, key: Hashable) -> int:
        """Keep something in memory in a smaller form, without a loss."""

    def swap(self, key: Hashable) -> int:
        """Have something on the SSD alone."""

    def free(self, key: Hashable) -> int:
        """Forget something; never what somebody still refers to."""


class RuntimeStore:
    """The runtime tensors of a Pager.

    Those that callers refer to go to the swap file and no further; keys and values of sequences that rest may be
    forgotten. None are compressed: each has one address for life, and views of it may be alive.

    Args:
        pager: has them.

    Attributes:
        forget: given the id of a tensor that no caller refers to, forgets it and returns the bytes that frees; `None`:
            there are none.
    """

    def __init__(self, pager: Pager) -> None:
        self._pager = pager
        self.forget: Callable[[str], int] | None = None
        self._last_access: dict[str, int] = {}

    def held(self) -> dict[Hashable, Held]:
        """Return the tensors of which something is in memory, not pinned; none without a budget: nobody needs it."""
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
        """Return the share of the page frames that is in use: all, where weights do not fit."""
        return self._pager.runtime.fill()

    def is_stored(self, key: Hashable) -> bool:
        """Return whether a file holds a tensor: what is written to is in none."""
        return self._pager.runtime.is_stored(str(key))

    def compress(self, key: Hashable) -> int:
        """Not possible."""
        return 0

    def swap(self, key: Hashable) -> int:
        """Let a tensor leave for the swap file."""
        return self._pager.runtime.send_out(str(key))

    def free(self, key: Hashable) -> int:
        """Forget keys and values that rest; not possible for what a caller refers to."""
        return 0 if self.forget is None else self.forget(str(key))
