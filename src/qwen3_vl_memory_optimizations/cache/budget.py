"""Where the memory of a cache comes from: room that nothing else needs, out of the one budget."""

from __future__ import annotations

from typing import Protocol

from ..paging import Pager

CACHE_OWNER = "cache"
_UNLIMITED = 1 << 62


class CacheBudget(Protocol):
    """What a cache in memory asks before it takes memory."""

    def room_bytes(self) -> int:
        """Return what is free beside all else; negative where the cache should give some back."""

    def take(self, n_bytes: int) -> bool:
        """Debit memory that is about to be allocated; `False`: there is no room, and nothing was debited."""

    def give(self, n_bytes: int) -> None:
        """Credit memory that was released."""


class Unlimited:
    """No limit but the size of the cache."""

    def room_bytes(self) -> int:
        """Return more than there is."""
        return _UNLIMITED

    def take(self, n_bytes: int) -> bool:
        """Always."""
        return True

    def give(self, n_bytes: int) -> None:
        """Nothing to do."""


class LedgerBudget:
    """The budget of a Pager: a cache gets what is left when every weight is in memory, and debits it.

    Reading a weight again at each token costs more than any hit saves: weights that do not fit leave nothing.

    Args:
        pager: whose ledger is debited (account `cache`).
    """

    def __init__(self, pager: Pager) -> None:
        self._pager = pager

    def room_bytes(self) -> int:
        """Return what is left when all managed tensors are in memory."""
        return self._pager.spare_bytes()

    def take(self, n_bytes: int) -> bool:
        """Debit, if that leaves all managed tensors their place."""
        return self._pager.lend(CACHE_OWNER, n_bytes)

    def give(self, n_bytes: int) -> None:
        """Credit."""
        if n_bytes:
            self._pager.lend(CACHE_OWNER, -n_bytes)
