"""`RangeAllocator`: page-aligned ranges of an address space, best fit, neighbours coalesced."""

from __future__ import annotations

from bisect import bisect_left, insort

from ..errors import MemoryBudgetExceeded, format_bytes
from .virtual import FRAME_BYTES


class RangeAllocator:
    """Allocates ranges of `[0, size_bytes)` in multiples of `page_bytes`.

    Args:
        size_bytes: the length of the space.
        page_bytes: the granularity; every block starts and ends on it.
    """

    def __init__(self, size_bytes: int, page_bytes: int = FRAME_BYTES) -> None:
        self.page_bytes = page_bytes
        self.size_bytes = size_bytes // page_bytes * page_bytes
        self._holes: dict[int, int] = {0: self.size_bytes} if self.size_bytes else {}
        self._starts: list[int] = sorted(self._holes)
        self._blocks: dict[int, tuple[int, int]] = {}
        self.requested_bytes = 0
        self.granted_bytes = 0

    def allocate(self, n_bytes: int, *, owner: str) -> int:
        """Return the offset of a block of at least `n_bytes`.

        Raises:
            MemoryBudgetExceeded: no hole is large enough.
        """
        granted = max(1, -(-n_bytes // self.page_bytes)) * self.page_bytes
        fitting = [(size, start) for start, size in self._holes.items() if size >= granted]
        if not fitting:
            largest = max(self._holes.values(), default=0)
            raise MemoryBudgetExceeded(
                f"the {owner} pool has no free range of {format_bytes(granted)}; the largest is "
                f"{format_bytes(largest)} of {format_bytes(self.size_bytes)}",
                requested_bytes=granted,
                available_bytes=largest,
                budget_bytes=self.size_bytes,
                owner=owner,
            )
        size, start = min(fitting)
        self._remove_hole(start)
        if size > granted:
            self._add_hole(start + granted, size - granted)
        self._blocks[start] = (granted, n_bytes)
        self.granted_bytes += granted
        self.requested_bytes += n_bytes
        return start

    def free(self, offset: int) -> int:
        """Free a block; return its allocated size."""
        granted, requested = self._blocks.pop(offset)
        self.granted_bytes -= granted
        self.requested_bytes -= requested
        start, size = offset, granted
        index = bisect_left(self._starts, offset)
        if index < len(self._starts) and self._starts[index] == offset + granted:
            follower = self._starts[index]
            size += self._holes[follower]
            self._remove_hole(follower)
        if index > 0:
            before = self._starts[index - 1]
            if before + self._holes[before] == offset:
                start, size = before, size + self._holes[before]
                self._remove_hole(before)
        self._add_hole(start, size)
        return granted

    def _add_hole(self, start: int, size: int) -> None:
        self._holes[start] = size
        insort(self._starts, start)

    def _remove_hole(self, start: int) -> None:
        del self._holes[start]
        del self._starts[bisect_left(self._starts, start)]

    @property
    def internal_fragmentation(self) -> float | None:
        """1 - requested / granted; `None` while nothing is allocated."""
        return 1 - self.requested_bytes / self.granted_bytes if self.granted_bytes else None

    @property
    def external_fragmentation(self) -> float | None:
        """1 - largest hole / free bytes; `None` when nothing is free."""
        free = self.size_bytes - self.granted_bytes
        return 1 - max(self._holes.values()) / free if free else None
