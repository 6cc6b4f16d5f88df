"""`ShadowLRU`: what a memory of the same size that evicts by recency would have found, on the accesses that happen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container

from ..paging import PagingStats

_FORGET_EVERY = 4096


class ShadowLRU:
    """Keys and sizes alone: it is called at each access, under the Pager's lock, and takes about a microsecond.

    First accesses are left out on both sides: no policy could have found what was never there.

    Args:
        stats: of the Pager; what it counted since the call before is what the access found.
        capacity_bytes: returns the memory there is.
        entries: the tensors that are there, by id: those that were freed are forgotten.

    Attributes:
        found_bytes: of the accesses, what was in memory; `shadow_bytes`: what LRU would have had there.
        used_bytes: of the accesses.
    """

    def __init__(self, stats: PagingStats, capacity_bytes: Callable[[], int], entries: Container[str]) -> None:
        self._stats = stats
        self._capacity_bytes = capacity_bytes
        self._entries = entries
        self._known: set[str] = set()
        self._inside: OrderedDict[str, int] = OrderedDict()  # the longest unused first
        self._inside_bytes = 0
        self._hit_bytes_before = 0
        self._until_forget = _FORGET_EVERY
        self.found_bytes = 0
        self.shadow_bytes = 0
        self.used_bytes = 0

    @property
    def improvement(self) -> float | None:
        """The byte hit rate less that of LRU, -1.0 to 1.0; `None` before the first access that could have hit."""
        return (self.found_bytes - self.shadow_bytes) / self.used_bytes if self.used_bytes else None

    def __call__(self, tensor_id: str, n_bytes: int, kind: str) -> None:
        """Note an access, after the Pager counted it."""
        hit_bytes, self._hit_bytes_before = self._stats.hit_bytes - self._hit_bytes_before, self._stats.hit_bytes
        found = tensor_id in self._inside
        if tensor_id in self._known:
            self.used_bytes += n_bytes
            self.found_bytes += min(hit_bytes, n_bytes)  # of pages, which are whole frames
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
