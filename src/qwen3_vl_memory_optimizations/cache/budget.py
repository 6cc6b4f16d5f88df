"""Memory for a cache: room in the one budget that nothing else needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from ..paging import PROCESS, Pager

CACHE_OWNER = "cache"
WORKSPACE_OWNER = "cache workspace"
STAGE_BYTES = 4 << 20
"""Extra memory for writing an entry to the SSD."""
_UNLIMITED = 1 << 62


class CacheBudget(Protocol):
    """The budget that a cache asks before it takes memory."""

    def room_bytes(self) -> int:
        """Return the free bytes beside everything else; negative if the cache should give some back."""

    def take(self, n_bytes: int) -> bool:
        """Debit memory that is about to be allocated; `False`: there is no room, and nothing was debited."""

    def give(self, n_bytes: int) -> None:
        """Credit memory that was released."""

    def workspace(self, n_bytes: int) -> AbstractContextManager[None]:
        """Reserve memory during a block, evicting whatever is needed.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what is pinned.
        """


class Unlimited:
    """A budget without a limit; only the cache's size applies."""

    def room_bytes(self) -> int:
        """Return a number larger than any memory."""
        return _UNLIMITED

    def take(self, n_bytes: int) -> bool:
        """Always."""
        return True

    def give(self, n_bytes: int) -> None:
        """Do nothing."""

    def workspace(self, n_bytes: int) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()


class LedgerBudget:
    """The budget of a Pager: a cache gets, and debits, what is left when every weight is in memory.

    Rereading a weight per token costs more than any hit saves, so weights that do not fit leave nothing for a cache.

    Args:
        pager: owner of the ledger that is debited (account `cache`).
    """

    def __init__(self, pager: Pager) -> None:
        self._pager = pager

    def room_bytes(self) -> int:
        """Return what is left when all managed tensors are in memory."""
        return self._pager.spare_bytes()

    def take(self, n_bytes: int) -> bool:
        """Debit the memory if all managed tensors still fit beside it."""
        return self._pager.lend(CACHE_OWNER, n_bytes)

    def give(self, n_bytes: int) -> None:
        """Credit."""
        if n_bytes:
            self._pager.lend(CACHE_OWNER, -n_bytes)

    @contextmanager
    def workspace(self, n_bytes: int) -> Iterator[None]:
        """Debit the memory during a block."""
        self._pager.debit(WORKSPACE_OWNER, n_bytes, PROCESS)
        try:
            yield
        finally:
            self._pager.debit(WORKSPACE_OWNER, -n_bytes, PROCESS)
