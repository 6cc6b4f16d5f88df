"""`RuntimeTensors`: all tensors except weights, as seen by the policies that swap them out and back in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from ..errors import MemoryOptimizationError
from ..pools import FramePool
from .records.entry import FileSource, PageState, TensorEntry
from .transfers.access import Access
from .transfers.finalizers import FinalizerQueue
from .transfers.moves import PageMover
from .transfers.resident_set import ResidentSet


class RuntimeTensors:
    """Inspects runtime tensors, swaps them out and brings them back. Takes the Pager's lock itself.

    Args:
        lock: the Pager's.
        entries: the tensors, by id.
        frames: the memory of the pages.
        mover: moves the pages.
        resident_set: decides the eviction order, and whether there is room.
        access: records uses.
        finalizers: their queued actions run first.
    """

    def __init__(
        self,
        lock: AbstractContextManager[object],
        entries: Mapping[str, TensorEntry],
        frames: FramePool,
        mover: PageMover,
        resident_set: ResidentSet,
        access: Access,
        finalizers: FinalizerQueue,
    ) -> None:
        self._lock = lock
        self._entries = entries
        self._frames = frames
        self._mover = mover
        self._resident_set = resident_set
        self._access = access
        self._finalizers = finalizers

    def _all(self) -> Iterator[TensorEntry]:
        return (entry for entry in self._entries.values() if entry.kind != "weights")

    def fill(self) -> float:
        """Return the share of the page frames in use; 0 without a limit."""
        with self._lock:
            return self._frames.used_bytes / max(self._frames.limit_bytes, 1)

    def last_accesses(self) -> dict[str, int]:
        """Return when each tensor was last used, counted in accesses; 0: never."""
        with self._lock:
            self._finalizers.run()
            return {entry.tensor_id: max((p.last_access for p in entry.pages), default=0) for entry in self._all()}

    def idle_bytes(self) -> dict[str, int]:
        """Return the resident bytes of each tensor that is neither held nor moving."""
        with self._lock:
            self._finalizers.run()
            held = {entry.tensor_id: sum(p.n_bytes for p in entry.pages if p.resident) for entry in self._all()}
            return {name: n_bytes for name, n_bytes in held.items() if n_bytes and self._is_idle(self._entries[name])}

    def send_out(self, tensor_id: str) -> int:
        """Swap out one tensor and return the bytes that leave. Returns immediately; writes run in the background.

        Returns 0 for a held or unknown tensor, and once the Pager is closed. If the SSD is full, the tensor stays.
        """
        with self._lock:
            entry = self._entries.get(tensor_id)
            if entry is None or self._mover.closed or not self._is_idle(entry):
                return 0
            before = sum(page.n_bytes for page in entry.pages if page.resident)
            try:
                for page in entry.pages:
                    self._mover.evict(page)
            except MemoryOptimizationError:  # of the checkpoint or the swap file; the copy in memory stays valid
                return 0
            return before - sum(page.n_bytes for page in entry.pages if page.resident)

    def rest(self, entries: Sequence[TensorEntry], *, used: bool) -> None:
        """Record that tensors left their cycle, and whether this counts as a use of each."""
        with self._lock:
            for entry in entries:
                self._resident_set.rested(entry)
                if used and not entry.freed:
                    self._access.note_use(entry)

    def keep_in_file(self, entry: TensorEntry, source: FileSource) -> bool:
        """Use a file that holds a tensor's contents as its source, so that it can be dropped without a write.

        Returns:
            `False`, with nothing changed, if the tensor was freed or written to meanwhile.
        """
        with self._lock:
            if entry.freed or self._mover.closed or entry.source is not None:
                return False
            if any(page.state is PageState.WRITING for page in entry.pages):
                return False
            entry.source = source
            for page in entry.pages:
                page.dirty = False
                page.verified = True
                if page.resident:
                    self._mover.forget_swapped(page)
            return True

    def is_stored(self, tensor_id: str) -> bool:
        """Return whether a file holds all of a tensor, so that it can be dropped without a write."""
        with self._lock:
            entry = self._entries.get(tensor_id)
            return entry is not None and entry.source is not None and not any(page.dirty for page in entry.pages)

    def resident_bytes(self, entries: Sequence[TensorEntry]) -> int:
        """Return how many bytes of some tensors are in memory."""
        with self._lock:
            return sum(page.n_bytes for entry in entries for page in entry.pages if page.resident)

    def swap_ahead(self, share: float) -> int:
        """Swap tensors out until they fill at most a share of the memory; tensors used in a cycle stay.

        Returns:
            The bytes that leave. Returns immediately; writes run in the background.
        """
        with self._lock:
            return 0 if self._mover.closed else self._resident_set.swap_ahead(share)

    def swapped_out(self) -> list[str]:
        """Return the ids of tensors that are entirely out of memory."""
        with self._lock:
            away = (entry for entry in self._all() if all(page.state is PageState.SWAPPED for page in entry.pages))
            return [entry.tensor_id for entry in away]

    def bring(self, tensor_ids: Sequence[str]) -> list[str]:
        """Prefetch tensors into unused memory, one page at a time and at the lowest read priority.

        Args:
            tensor_ids: in the order in which they are wanted; unknown ids are ignored.

        Returns:
            The tensors whose reads were started; none while weights still wait for room.
        """
        with self._lock:
            self._finalizers.run()
            entries = (self._entries.get(tensor_id) for tensor_id in tensor_ids)
            return [entry.tensor_id for entry in entries if entry is not None and self._resident_set.bring(entry)]

    @staticmethod
    def _is_idle(entry: TensorEntry) -> bool:
        moving = (PageState.LOADING, PageState.WRITING)
        return not any(page.pins or page.awaited or page.state in moving for page in entry.pages)
