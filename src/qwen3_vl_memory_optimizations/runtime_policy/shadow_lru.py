"""`ShadowLRU`: the hit rate that LRU would have in a memory of the same size, on the actual accesses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container

from ..paging import PagingStats

_FORGET_EVERY = 4096


class ShadowLRU:
    """LRU on keys and sizes only. Called at each access under the Pager's lock; adds about 1 us.

    First accesses are excluded on both sides, since no policy can hit them.

    Args:
        stats: counters of the Pager; their growth since the previous call is the bytes that hit.
        capacity_bytes: returns the available memory.
        entries: ids of the existing tensors; freed ones are forgotten.

    Attributes:
        found_bytes: accessed bytes that were in memory; `shadow_bytes`: those that LRU would have had in memory.
        used_bytes: accessed bytes.
    """

    def __init__(self, stats: PagingStats, capacity_bytes: Callable[[], int], entries: Container[str]) -> None:
        self._stats = stats
        self._capacity_bytes = capacity_bytes
        self._entries = entries
        self._known: set[str] = set()
        self._inside: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._inside_bytes = 0
        self._hit_bytes_before = 0
        self._until_forget = _FORGET_EVERY
        self.found_bytes = 0
        self.shadow_bytes = 0
        self.used_bytes = 0

    @property
    def improvement(self) -> float | None:
        """Byte hit rate minus that of LRU, -1.0 to 1.0; `None` before the first access that could hit."""
        return (self.found_bytes - self.shadow_bytes) / self.used_bytes if self.used_bytes else None

    def __call__(self, tensor_id: str, n_bytes: int, kind: str) -> None:
        """Record an access after the Pager has counted it."""
        hit_bytes, self._hit_bytes_before = self._stats.hit_bytes - self._hit_bytes_before, self._stats.hit_bytes
        found = tensor_id in self._inside
        if tensor_id in self._known:
            self.used_bytes += n_bytes
            self.found_bytes += min(hit_bytes, n_bytes)  # pages are rounded up to whole frames
            if found:
                self.shadow_bytes += n_bytes
        else:
            self._known.add(tensor_id)
        if found:
            self._inside.move_to_end(tensor_id)
            return
        self._until_forget -= 1
        if self._until_forget <= 0:
            self._forget()
        room = self._capacity_bytes() - n_bytes
        if room < 0:
            return
        while self._inside_bytes > room:
            _, left = self._inside.popitem(last=False)
            self._inside_bytes -= left
        self._inside[tensor_id] = n_bytes
        self._inside_bytes += n_bytes

    def _forget(self) -> None:
        self._until_forget = _FORGET_EVERY
        self._known = {each for each in self._known if each in self._entries}
        for each in [each for each in self._inside if each not in self._entries]:
            self._inside_bytes -= self._inside.pop(each)
