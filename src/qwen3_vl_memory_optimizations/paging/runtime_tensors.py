"""`RuntimeTensors`: all tensors but the weights, as the policies see them that decide which leave and come back."""

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
    """Looks, lets leave, and brings back. Takes the Pager's lock itself.

    Args:
        lock: the Pager's.
        entries: the tensors, by id.
        frames: the memory of the pages.
        mover: moves them.
        resident_set: says who leaves first, and whether there is room.
        access: records uses.
        finalizers: what they left is done first.
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
        """Return the share of the page frames that is in use; 0 without a limit."""
        with self._lock:
            return self._frames.used_bytes / max(self._frames.limit_bytes, 1)

    def last_accesses(self) -> dict[str, int]:
        """Return when each was used last, counted in accesses; 0: never."""
        with self._lock:
            self._finalizers.run()
            return {entry.tensor_id: max((p.last_access for p in entry.pages), default=0) for entry in self._all()}

    def idle_bytes(self) -> dict[str, int]:
        """Return the bytes in memory of each that nobody holds and that is not on its way."""
        with self._lock:
            self._finalizers.run()
            held = {entry.tensor_id: sum(p.n_bytes for p in entry.pages if p.resident) for entry in self._all()}
            return {name: n_bytes for name, n_bytes in held.items() if n_bytes and self._is_idle(self._entries[name])}

    def send_out(self, tensor_id: str) -> int:
        """Let one leave for the SSD; return the bytes that leave. Returns at once: they are written meanwhile.

        Returns 0 for one that is held or unknown, and once the Pager is closed. Where the SSD has no room, it stays.
        """
        with self._lock:
            entry = self._entries.get(tensor_id)
            if entry is None or self._mover.closed or not self._is_idle(entry):
                return 0
            before = sum(page.n_bytes for page in entry.pages if page.resident)
            try:
                for page in entry.pages:
                    self._mover.evict(page)
            except MemoryOptimizationError:  # the checkpoint or the swap file; what is in memory stays valid
                return 0
            return before - sum(page.n_bytes for page in entry.pages if page.resident)

    def rest(self, entries: Sequence[TensorEntry], *, used: bool) -> None:
        """Note that tensors are not used in a cycle any more, and whether this is a use of each."""
        with self._lock:
            for entry in entries:
                self._resident_set.rested(entry)
                if used and not entry.freed:
                    self._access.note_use(entry)

    def keep_in_file(self, entry: TensorEntry, source: FileSource) -> bool:
        """Note that a file holds what a tensor does: from now on it leaves memory without being written.

        Returns:
            `False`, with nothing changed, if it was freed, or written to meanwhile.
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
        """Return whether a file holds all of a tensor, so that it leaves memory without being written."""
        with self._lock:
            entry = self._entries.get(tensor_id)
            return entry is not None and entry.source is not None and not any(page.dirty for page in entry.pages)

    def resident_bytes(self, entries: Sequence[TensorEntry]) -> int:
        """Return how much of some tensors is in memory."""
        with self._lock:
            return sum(page.n_bytes for entry in entries for page in entry.pages if page.resident)

    def swap_ahead(self, share: float) -> int:
        """Let some leave until they fill at most a share of the memory; what is used in a cycle stays.

        Returns:
            The bytes that leave. Returns at once: they are written meanwhile.
        """
        with self._lock:
            return 0 if self._mover.closed else self._resident_set.swap_ahead(share)

    def swapped_out(self) -> list[str]:
        """Return the ids of those of which nothing is in memory."""
        with self._lock:
            away = (entry for entry in self._all() if all(page.state is PageState.SWAPPED for page in entry.pages))
            return [entry.tensor_id for entry in away]

    def bring(self, tensor_ids: Sequence[str]) -> list[str]:
        """Read some into memory that nobody uses, one page at a time and behind all other reads.

        Args:
            tensor_ids: in the order in which they are wanted; unknown ones are skipped.

        Returns:
            Those that are on their way: none where weights still wait for room.
        """
        with self._lock:
            self._finalizers.run()
            entries = (self._entries.get(tensor_id) for tensor_id in tensor_ids)
            return [entry.tensor_id for entry in entries if entry is not None and self._resident_set.bring(entry)]

    @staticmethod
    def _is_idle(entry: TensorEntry) -> bool:
        moving = (PageState.LOADING, PageState.WRITING)
        return not any(page.pins or page.awaited or page.state in moving for page in entry.pages)
