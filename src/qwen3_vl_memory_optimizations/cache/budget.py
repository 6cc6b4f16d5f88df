"""Where the memory of a cache comes from: room that nothing else needs, out of the one budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from ..paging import PROCESS, Pager

CACHE_OWNER = "cache"
WORKSPACE_OWNER = "cache workspace"
STAGE_BYTES = 4 << 20
"""What writing an entry to the SSD takes besides the entry."""
_UNLIMITED = 1 << 62


class CacheBudget(Protocol):
    """What a cache in memory asks before it takes memory."""

    def room_bytes(self) -> int:
        """Return what is free beside all else; negative where the cache should give some back."""

    def take(self, n_bytes: int) -> bool:
        """Debit memory that is about to be allocated; `False`: there is no room, and nothing was debited."""

    def give(self, n_bytes: int) -> None:
        """Credit memory that was released."""

    def workspace(self, n_bytes: int) -> AbstractContextManager[None]:
        """Hold memory for the length of a block, whatever leaves for it.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what is pinned.
        """


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

    def workspace(self, n_bytes: int) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()


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

    @contextmanager
    def workspace(self, n_bytes: int) -> Iterator[None]:
        """Debit for the length of a block."""
        self._pager.debit(WORKSPACE_OWNER, n_bytes, PROCESS)
        try:
            yield
        finally:
            self._pager.debit(WORKSPACE_OWNER, -n_bytes, PROCESS)
