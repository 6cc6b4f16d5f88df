"""`FramePool`: the physical memory of all managed tensors, and its limit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container

from ..errors import MemoryBudgetExceeded, MemoryOptimizationError, format_bytes
from .virtual import FRAME_BYTES, can_move_frames, discard, move_frames

logger = logging.getLogger(__name__)

UNIT_BYTES = 512 * 1024
"""Unit in which frames are kept and moved. Each moved unit is one of the kernel's at most 65,530 mappings, and mappings
cannot be moved in parts on kernels before 6.17; smaller remainders are returned to the system and faulted in anew."""


def round_up(n_bytes: int, multiple: int = FRAME_BYTES) -> int:
    """Return `n_bytes` rounded up to a multiple."""
    return -(-n_bytes // multiple) * multiple


def units_of(address: int, n_bytes: int) -> range:
    """Return the addresses of the whole units of a range."""
    return range(address, address + n_bytes // UNIT_BYTES * UNIT_BYTES, UNIT_BYTES)


class FramePool:
    """Counts the frames behind managed tensors, and keeps freed ones for reuse.

    Frames can move between addresses, so free frames never fragment: any frame serves any block. A range must be
    released as it was backed, and forgotten before it is backed in other pieces. Not thread-safe: the Pager locks.

    The most recently freed frames are reused first, so that the surplus stays untouched and `compact` finds it.

    Args:
        limit_bytes: maximum memory of used and free frames together.
        reuse: keep freed frames (True) or return them to the system at once (`enable_memory_pooling=False`).
        timer: a monotonic clock in seconds.

    Attributes:
        backed_bytes: bytes backed since the start.
        reused_bytes: bytes of those that were backed with reused frames.
        compacted_bytes: bytes that `compact` returned to the system.
        high_bytes: maximum committed since the limit was last set; `peak_bytes`: since the start.
    """

    def __init__(self, limit_bytes: int, *, reuse: bool = True, timer: Callable[[], float] = time.monotonic) -> None:
        self.limit_bytes = limit_bytes // FRAME_BYTES * FRAME_BYTES
        self.used_bytes = 0
        self.peak_bytes = 0
        self.high_bytes = 0
        self.backed_bytes = 0
        self.reused_bytes = 0
        self.compacted_bytes = 0
        self._reuse = reuse and can_move_frames()
        self._timer = timer
        # Free units, longest free first: address // UNIT_BYTES (unique per unit) -> address, time freed.
        self._free: dict[int, tuple[int, float]] = {}

    @property
    def free_bytes(self) -> int:
        """Memory of free frames kept for reuse."""
        return len(self._free) * UNIT_BYTES

    def free_units(self) -> list[int]:
        """Return the addresses of the free units kept for reuse."""
        return [address for address, _ in self._free.values()]

    @property
    def committed_bytes(self) -> int:
        """Physical memory held: used and free frames."""
        return self.used_bytes + self.free_bytes

    @property
    def available_bytes(self) -> int:
        """Bytes that can still be backed without an eviction."""
        return self.limit_bytes - self.used_bytes

    @property
    def fragmentation(self) -> float | None:
        """Unused share of the held memory: free frames / all frames; `None` if none is held."""
        return self.free_bytes / self.committed_bytes if self.committed_bytes else None

    def growth_bytes(self, n_bytes: int) -> int:
        """Return by how much backing `n_bytes` would raise `committed_bytes`: the part that no free frame serves."""
        reused = min(n_bytes // UNIT_BYTES, len(self._free))
        growth = n_bytes - reused * UNIT_BYTES
        over = self.committed_bytes + growth - self.limit_bytes
        trimmed = min(-(-over // UNIT_BYTES), len(self._free) - reused) if over > 0 else 0
        return growth - trimmed * UNIT_BYTES

    def back(self, address: int, n_bytes: int, *, owner: str) -> None:
        """Put memory behind `[address, address + n_bytes)`; its contents are undefined.

        Raises:
            MemoryBudgetExceeded: over the limit; nothing was changed.
        """
        if n_bytes > self.available_bytes:
            raise MemoryBudgetExceeded(
                f"{owner}: {format_bytes(n_bytes)} do not fit; {format_bytes(max(0, self.available_bytes))} of "
                f"{format_bytes(self.limit_bytes)} are free",
                requested_bytes=n_bytes,
                available_bytes=max(0, self.available_bytes),
                budget_bytes=self.limit_bytes,
                owner=owner,
            )
        missing = [unit for unit in units_of(address, n_bytes) if not self._take(unit)] if self._free else []
        for unit in missing:
            if not self._free:
                break
            self._move_to(unit)
        self.used_bytes += n_bytes
        self.backed_bytes += n_bytes
        self._trim()
        self.high_bytes = max(self.high_bytes, self.committed_bytes)
        self.peak_bytes = max(self.peak_bytes, self.high_bytes)

    def _take(self, unit: int) -> bool:
        """Take a free unit that is already at its address; return whether there is one."""
        slot = unit // UNIT_BYTES
        if slot not in self._free or self._free[slot][0] != unit:
            return False
        del self._free[slot]
        self.reused_bytes += UNIT_BYTES
        return True

    def _move_to(self, unit: int) -> None:
        _, (source, _) = self._free.popitem()
        try:
            move_frames(source, unit, UNIT_BYTES)
            self.reused_bytes += UNIT_BYTES
        except MemoryOptimizationError as error:
            # Most likely out of mappings: pages are then faulted in anew, which is slower but always works.
            logger.warning(
                "page frames cannot be moved any more (%s); they are returned to the system instead", str(error)
            )
            self._reuse = False
            discard(source, UNIT_BYTES)
            self.trim()

    def release(self, address: int, n_bytes: int) -> None:
        """Release the memory behind a range for reuse; its contents are lost."""
        self.used_bytes -= n_bytes
        whole = n_bytes // UNIT_BYTES * UNIT_BYTES if self._reuse else 0
        now_s = self._timer()
        self._free.update((unit // UNIT_BYTES, (unit, now_s)) for unit in units_of(address, whole))
        discard(address + whole, n_bytes - whole)
        self._trim()

    def set_limit(self, limit_bytes: int) -> None:
        """Change the limit; free frames above it return to the system. The caller must evict used ones first."""
        self.limit_bytes = limit_bytes // FRAME_BYTES * FRAME_BYTES
        self._trim()
        self.high_bytes = self.committed_bytes

    def forget(self, address: int, n_bytes: int, keep: Container[int] = ()) -> None:
        """Return the free frames in a range to the system, because its address space is released or will be split anew.

        Args:
            address, n_bytes: the range.
            keep: units that may stay, because they will be backed unchanged.
        """
        slots = range((address - UNIT_BYTES) // UNIT_BYTES, (address + n_bytes) // UNIT_BYTES + 1)
        near = [slot for slot in slots if slot in self._free] if len(slots) < len(self._free) else list(self._free)
        for slot in near:
            unit = self._free[slot][0]
            if address - UNIT_BYTES < unit < address + n_bytes and unit not in keep:
                self._return(slot)

    def compact(self, idle_s: float) -> int:
        """Return frames that have been free for `idle_s` to the system, longest free first.

        Args:
            idle_s: the time in seconds that a frame may stay free.

        Returns:
            The bytes returned.
        """
        before, freed = self._timer() - idle_s, 0
        while self._free:
            slot = next(iter(self._free))
            if self._free[slot][1] > before:
                break
            freed += self._return(slot)
        self.compacted_bytes += freed
        return freed

    def trim(self) -> int:
        """Return all free frames to the system; return their size in bytes."""
        freed = self.free_bytes
        for unit, _ in self._free.values():
            discard(unit, UNIT_BYTES)
        self._free.clear()
        return freed

    def _return(self, slot: int) -> int:
        unit, _ = self._free.pop(slot)
        discard(unit, UNIT_BYTES)
        return UNIT_BYTES

    def _trim(self) -> None:
        while self._free and self.committed_bytes > self.limit_bytes:
            self._return(next(iter(self._free)))
