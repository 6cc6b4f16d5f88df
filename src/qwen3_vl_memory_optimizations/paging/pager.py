"""The Pager: the only module that moves bytes between the SSD and memory.

One lock guards pages, frames and the schedule; I/O threads take it only to note that a transfer ended. Lock order: the
Pager's lock, then the I/O queue's. Transfers have two phases: frames are taken and the page marked under the lock, the
bytes move outside it, and the end is noted under the lock again; a failed transfer leaves the old copy valid.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import xxhash

from ..compression import LinearInput, Scratch
from ..errors import (
    CorruptDataError,
    MemoryBudgetExceeded,
    StorageError,
    TensorFreedError,
    UnknownTensorError,
    format_bytes,
)
from ..pools import FRAME_BYTES, FramePool, units_of
from ..prediction import PassSchedule, choose_kept
from ..storage import DEMAND, PREFETCH, IOQueue, SwapFile
from .entry import TRANSITIONS, Page, PageState, TensorEntry, alias_memory
from .ledger import PROCESS, Ledger
from .stats import PagingStats, TensorUse

PAGE_BYTES = 4 * 2**20
READ_AHEAD_BYTES = 5 * PAGE_BYTES
_READ_AHEAD_SHARE = 8
_LOOK_AHEAD_TENSORS = 64
_IO_THREADS = 4
_LEAST_SCRATCH_BYTES = 1 << 16
_ROW_READ_COST_BYTES = 1 << 16


class Pager:
    """Keeps managed tensors within the budget.

    Args:
        ledger: the budget; page frames take what its accounts leave.
        swap_dir: where the swap file goes, should dirty pages have to leave.
        swap_bytes: its largest size.
        reuse_frames: keep freed page frames for the next page (memory pooling).
        timer: a monotonic clock in seconds, for the stall counter.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        swap_dir: Path,
        swap_bytes: int = 1 << 40,
        reuse_frames: bool = True,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.ledger = ledger
        self.frames = FramePool(ledger.frames_limit_bytes(), reuse=reuse_frames)
        self.schedule = PassSchedule()
        self.stats = PagingStats()
        self.entries: dict[str, TensorEntry] = {}
        self.on_pass: Callable[[], None] | None = None
        self._timer = timer
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._queue = IOQueue(_IO_THREADS)
        self._swap = SwapFile(swap_dir, swap_bytes)
        self._scratches = threading.local()
        self._order: list[str] = []
        self._weights_bytes = 0
        self._weights_resident_bytes = 0
        self._ahead_bytes = 0
        self._moving = 0
        self._leaving_bytes = 0
        self._computing: dict[int, int] = {}  # thread -> ranges of pages that it computes on
        self._clock = 0
        self._read_ahead_bytes = READ_AHEAD_BYTES
        self._plan_state: tuple[object, ...] = ()
        self._order_changed = False
        self._write_error: Exception | None = None
        self._closed = False

    # --- registration ----------------------------------------------------------------------------------------------

    def add(self, entry: TensorEntry, *, resident: bool) -> None:
        """Register an entry.

        Args:
            entry: its address space is reserved already.
            resident: back it with memory now (its contents are the caller's to write; it is dirty); otherwise its
                pages are read from its source when they are needed.

        Raises:
            MemoryBudgetExceeded: no room; nothing was changed.
        """
        with self._lock:
            self._check_open()
            shared = entry.shared_frames()
            resident_bytes = sum(page.n_bytes for page in entry.pages) if resident else 0
            self._check_fits(resident_bytes + len(shared) * FRAME_BYTES, entry.kind)
            units = {unit for page in entry.pages for unit in units_of(page.frames_start, page.n_bytes)}
            self.frames.forget(entry.address, entry.n_bytes, keep=units)  # of the tensor that was here before
            backed: list[tuple[int, int]] = []
            try:
                for frame in shared:
                    self._make_room(FRAME_BYTES, entry.kind)
                    self.frames.back(frame, FRAME_BYTES, owner=entry.kind)
                    backed.append((frame, FRAME_BYTES))
                if resident:
                    for page in entry.pages:
                        self._make_room(page.n_bytes, entry.kind)
                        self.frames.back(page.frames_start, page.n_bytes, owner=entry.kind)
                        backed.append((page.frames_start, page.n_bytes))
                        page.state, page.dirty, page.pins = PageState.RESIDENT, True, 1
                        entry.missing -= 1
            except BaseException:
                for page in entry.pages:
                    page.state, page.dirty, page.pins = PageState.SWAPPED, False, 0
                for address, n_bytes in backed:
                    self.frames.release(address, n_bytes)
                raise
            for page in entry.pages:
                page.pins = 0
            self.entries[entry.tensor_id] = entry
            if entry.kind == "weights":
                self._order.append(entry.tensor_id)
                self._order_changed = True
                entry_bytes = sum(page.n_bytes for page in entry.pages)
                self._weights_bytes += entry_bytes
                self._weights_resident_bytes += entry_bytes if resident else 0
                largest = max(page.n_bytes for page in entry.pages)
                self.ledger.frames_floor_bytes = max(self.ledger.frames_floor_bytes, largest)

    def free(self, tensor_id: str, then: Callable[[], None] | None = None) -> None:
        """Forget a tensor and release its memory; views of it that are alive keep theirs until they die.

        Args:
            tensor_id: the tensor; an unknown one is none of this method's business.
            then: called when the memory is released, to give the address range back.
        """
        with self._lock:
            entry = self.entries.pop(tensor_id, None)
            if entry is None:
                return
            entry.freed = True
            entry.on_released = then or entry.on_released
            self._release_freed(entry)

    def _release_freed(self, entry: TensorEntry) -> None:
        """Release a freed tensor once nothing holds or moves its pages; never waits, as finalizers call this."""
        moving = (PageState.LOADING, PageState.WRITING)
        if not entry.freed or any(page.pins or page.state in moving for page in entry.pages):
            return
        if all(page.state is PageState.FREED for page in entry.pages):
            return
        for page in entry.pages:
            if page.state is PageState.RESIDENT:
                self._count_resident(page, -page.n_bytes)
                self.frames.release(page.frames_start, page.n_bytes)
            if page.swap_offset is not None:
                self._swap.free(page.swap_offset)
            page.state = PageState.FREED
        for frame in entry.shared_frames():
            self.frames.release(frame, FRAME_BYTES)
        if entry.kind == "weights":
            self._order.remove(entry.tensor_id)
            self._weights_bytes -= sum(page.n_bytes for page in entry.pages)
        if entry.on_released is not None:
            entry.on_released()
        self._changed.notify_all()

    def entry(self, tensor_id: str) -> TensorEntry:
        """Return a tensor's record.

        Raises:
            UnknownTensorError: no such tensor.
        """
        try:
            return self.entries[tensor_id]
        except KeyError:
            raise UnknownTensorError(tensor_id) from None

    def record(self, entry: TensorEntry) -> None:
        """Note an access that does not go through the Pager."""
        with self._lock:
            self._clock += 1
            for page in entry.pages:
                page.last_access = self._clock

    def reserve(self, owner: str, n_bytes: int) -> None:
        """Set memory of the process aside for an owner; pages leave for it.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what the weights need at least.
        """
        with self._lock:
            before = self.ledger.held_bytes(owner)
            if before != n_bytes:
                self.ledger.set(owner, n_bytes, PROCESS)
                try:
                    self.refit()
                except BaseException:
                    self.ledger.set(owner, before, PROCESS)
                    raise

    # --- computing on tensors ---------------------------------------------------------------------------------------

    @property
    def scratch(self) -> Scratch:
        """Workspace of the calling thread; what it grows by is debited."""
        scratch = getattr(self._scratches, "scratch", None)
        if scratch is None:
            slot_bytes = max(_LEAST_SCRATCH_BYTES, min(4 * PAGE_BYTES, self.frames.limit_bytes // 16))
            scratch = self._scratches.scratch = Scratch(self._debit_workspace, slot_bytes)
        return scratch

    def _debit_workspace(self, n_bytes: int) -> None:
        with self._lock:
            self.ledger.add("workspace", n_bytes)
            try:
                self.refit()
            except BaseException:
                self.ledger.add("workspace", -n_bytes)
                raise

    def linear(self, entry: TensorEntry, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x @ W.T + bias`, computed on the encoded form, rows of W as they become resident."""
        left = LinearInput(x)
        out: torch.Tensor | None = None
        for start, stop in self.row_ranges(entry):
            part_bias = bias if bias is None else bias[start:stop]
            part = entry.codec.linear(left, entry.encoded(start, stop), part_bias, self.scratch)
            if stop - start == entry.rows:
                out = part
            else:
                if out is None:
                    out = part.new_empty((left.rows, entry.rows))
                out[:, start:stop] = part
        assert out is not None
        return out if x.dim() == 2 else out.view(*x.shape[:-1], entry.rows)

    def row_ranges(self, entry: TensorEntry) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows, in order, each resident and pinned until the next is asked for."""
        pages = entry.pages
        with self._lock:
            self._begin_access(entry)
        first, n_pages, thread = 0, len(pages), threading.get_ident()
        while first < n_pages:
            with self._lock:
                self._await(pages[first])
                last = first
                while last < n_pages and pages[last].state is PageState.RESIDENT:
                    pages[last].pins += 1
                    last += 1
                self._computing[thread] = self._computing.get(thread, 0) + 1
            try:
                yield entry.row_range(first, last)
            finally:
                with self._lock:
                    self._computing[thread] -= 1
                    if not self._computing[thread]:
                        del self._computing[thread]
                    self._changed.notify_all()
                    for page in pages[first:last]:
                        self._touch(page)
                        page.pins -= 1
                        if not page.kept:
                            self._evict(page)
                    self._release_freed(entry)
                    self._prefetch()
            first = last

    def _begin_access(self, entry: TensorEntry) -> None:
        if entry.freed or self._closed:
            raise TensorFreedError(f"{entry.tensor_id}: its memory was freed")
        self._clock += 1
        for page in entry.pages:
            page.last_access = self._clock
            missed = page.unused or page.state is not PageState.RESIDENT
            if missed:
                self.stats.misses += 1
                self.stats.miss_bytes += page.n_bytes
            else:
                self.stats.hits += 1
                self.stats.hit_bytes += page.n_bytes
        if entry.kind == "weights":
            if self._order_changed:
                self.schedule, self._order_changed = PassSchedule(self._order), False
            if self.schedule.record(entry.tensor_id) and self.on_pass is not None:
                self.on_pass()
            self._replan()
            if self._weights_resident_bytes < self._weights_bytes:
                self._prefetch()

    def _touch(self, page: Page) -> None:
        if page.unused:
            page.unused = False
            if not page.kept:
                self._ahead_bytes -= page.n_bytes
            if page.prefetched:
                self.stats.prefetches_used += 1
                page.prefetched = False

    def pin(self, entry: TensorEntry) -> None:
        """Make a whole tensor resident and pin it.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what is pinned.
        """
        with self._lock:
            self._begin_access(entry)
            if entry.missing:
                self._check_fits(sum(page.n_bytes for page in entry.pages if not page.pins), entry.kind)
            pinned: list[Page] = []
            try:
                for page in entry.pages:
                    self._await(page)
                    page.pins += 1
                    pinned.append(page)
                    self._touch(page)
            except BaseException:
                for page in pinned:
                    page.pins -= 1
                raise

    def unpin(self, entry: TensorEntry) -> None:
        """Undo one `pin`."""
        with self._lock:
            for page in entry.pages:
                page.pins -= 1
                if not page.kept and page.pins == 0 and page.state is PageState.RESIDENT:
                    self._evict(page)
            self._release_freed(entry)

    def mark_dirty(self, entry: TensorEntry) -> None:
        """Note that a pinned tensor was written to: its source no longer holds it."""
        with self._lock:
            for page in entry.pages:
                page.dirty = True
                if page.swap_offset is not None:
                    self._swap.free(page.swap_offset)
                    page.swap_offset = None

    def read_rows(self, entry: TensorEntry, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the encoded segments of some rows (int64 `[n]`): from memory, or single rows from the SSD.

        An embedding look-up touches few rows of the largest tensor of all; loading it whole would be waste.
        """
        with self._lock:
            if entry.freed or self._closed:
                raise TensorFreedError(f"{entry.tensor_id}: its memory was freed")
            data_name = next(iter(entry.encoded(0, entry.rows)))
            views = entry.encoded(0, entry.rows)
            result = {name: segment[rows] for name, segment in views.items() if name != data_name}
            data = views[data_name]
            picked = data.new_empty((len(rows), data.shape[1]))
            row_bytes = entry.n_bytes // entry.rows
            for position, row in enumerate(rows.tolist()):
                start, stop = row * row_bytes, (row + 1) * row_bytes
                pages = [page for page in entry.pages if page.start_bytes < stop and page.stop_bytes > start]
                readable = entry.source is not None and not any(
                    page.dirty or page.swap_offset is not None for page in pages
                )
                # A read of the whole tensor is cheaper than very many of single rows.
                few = len(rows) * _ROW_READ_COST_BYTES < entry.n_bytes
                if all(page.state is PageState.RESIDENT for page in pages) or not readable or not few:
                    for page in pages:
                        self._await(page)
                        self._touch(page)
                    picked[position] = data[row]
                else:
                    assert entry.source is not None
                    raw = entry.source.file.read_bytes(entry.source.offset_bytes + start, row_bytes)
                    picked[position] = torch.frombuffer(bytearray(raw), dtype=data.dtype)
                    self.stats.row_bytes_read += row_bytes
            result[data_name] = picked
            return result

    # --- residency --------------------------------------------------------------------------------------------------

    def _replan(self) -> None:
        """Choose the pages to keep, when the known passes or the memory for them changed."""
        weights_limit = self.frames.limit_bytes - (self.frames.used_bytes - self._weights_resident_bytes)
        state = (self.schedule.passes, weights_limit, len(self._order))
        if state == self._plan_state:
            return
        self._plan_state = state
        pages = [page for name in self._order for page in self.entries[name].pages]
        total = sum(page.n_bytes for page in pages)
        largest = max((page.n_bytes for page in pages), default=0)
        if total <= weights_limit:
            self._set_kept(pages, set(pages))
            return
        self._read_ahead_bytes = max(largest, min(READ_AHEAD_BYTES, weights_limit // _READ_AHEAD_SHARE))
        capacity = weights_limit - self._read_ahead_bytes
        kept: set[Page] = set()
        planned: set[Page] = set()
        for cycle in self.schedule.cycles():
            cycle_pages = [
                page
                for name in cycle
                if name in self.entries
                for page in self.entries[str(name)].pages
                if page not in planned
            ]
            flags = choose_kept([page.n_bytes for page in cycle_pages], capacity)
            planned.update(cycle_pages)
            for page, keep in zip(cycle_pages, flags, strict=True):
                if keep:
                    kept.add(page)
                    capacity -= page.n_bytes
        self._set_kept(pages, kept)

    def _set_kept(self, pages: Iterable[Page], kept: set[Page]) -> None:
        self._ahead_bytes = 0
        for page in pages:
            page.kept = page in kept
            waiting = page.unused or page.state is PageState.LOADING
            if waiting and not page.kept:
                self._ahead_bytes += page.n_bytes

    def _prefetch(self) -> None:
        """Start reads for what is needed next, as far as frames and the read-ahead window allow."""
        looked = 0
        for name in self.schedule.upcoming():
            looked += 1
            if looked > _LOOK_AHEAD_TENSORS:
                return
            entry = self.entries.get(str(name))
            if entry is None or not entry.missing:
                continue
            for page in entry.pages:
                if page.state is not PageState.SWAPPED or page.error is not None:
                    continue
                if not page.kept and self._ahead_bytes + page.n_bytes > self._read_ahead_bytes:
                    return
                if page.n_bytes > self.frames.available_bytes and not self._evict_for_prefetch(page):
                    return
                self._load(page, PREFETCH)

    def _evict_for_prefetch(self, wanted: Page) -> bool:
        """Make room by dropping pages that are not part of the kept subset, or not expected again."""
        idle = [
            page
            for name in self._order
            for page in self.entries[name].pages
            if page.state is PageState.RESIDENT and not page.pins and not page.unused and not page.kept
        ]
        for page in idle:
            if wanted.n_bytes <= self.frames.available_bytes:
                break
            self._evict(page)
        return wanted.n_bytes <= self.frames.available_bytes

    def _victims(self) -> list[Page]:
        """Return what may leave, best first: streamed pages, then idle tensors, then weights by farthest next use."""
        distances = self.schedule.distances()
        never = len(self._order) * 4

        def rank(page: Page) -> tuple[int, int]:
            if page.entry.kind != "weights":
                return (1, page.last_access)
            distance = distances.get(page.entry.tensor_id, never)
            if not page.kept and not page.unused:
                return (0, -distance)
            return (2, -distance)

        pages = (page for entry in self.entries.values() for page in entry.pages)
        return sorted((p for p in pages if p.state is PageState.RESIDENT and not p.pins), key=rank)

    def _make_room(self, n_bytes: int, owner: str) -> bool:
        """Evict until `n_bytes` fit; return whether the lock was given up meanwhile.

        Raises:
            MemoryBudgetExceeded: what is pinned leaves too little.
        """
        waited = False
        self._write_error = None  # of an attempt that nobody waited for
        while n_bytes > self.frames.available_bytes:
            victims = self._victims()
            others_compute = self._others_compute()
            if not victims and not self._moving and not others_compute:
                raise self._does_not_fit(n_bytes, self.frames.available_bytes, owner)
            for page in victims:
                if n_bytes <= self.frames.available_bytes + self._leaving_bytes:
                    break
                self._evict(page)
            if n_bytes <= self.frames.available_bytes:
                break
            if self._write_error is None and (self._moving or (others_compute and not victims)):
                self._changed.wait()
                waited = True
            if self._write_error is not None:
                error, self._write_error = self._write_error, None
                raise error
        return waited

    def _others_compute(self) -> bool:
        """Whether other threads compute on pages, which they will unpin without waiting for this one."""
        return bool(self._computing) and threading.get_ident() not in self._computing

    def _check_fits(self, n_bytes: int, owner: str) -> None:
        """Refuse what evicting everything would not make room for, before anything is evicted.

        Raises:
            MemoryBudgetExceeded: what is pinned leaves too little.
        """
        if n_bytes <= self.frames.available_bytes or self._others_compute():
            return
        away = (PageState.SWAPPED, PageState.FREED)
        pages = (page for entry in self.entries.values() for page in entry.pages)
        can_leave = sum(page.n_bytes for page in pages if not page.pins and page.state not in away)
        available = self.frames.available_bytes + can_leave
        if n_bytes > available:
            raise self._does_not_fit(n_bytes, available, owner)

    def _does_not_fit(self, n_bytes: int, available: int, owner: str) -> MemoryBudgetExceeded:
        return MemoryBudgetExceeded(
            f"{owner}: {format_bytes(n_bytes)} do not fit into the {format_bytes(self.frames.limit_bytes)} for managed "
            f"tensors, of which {format_bytes(self.frames.limit_bytes - available)} cannot leave; raise the budget",
            requested_bytes=n_bytes,
            available_bytes=max(0, available),
            budget_bytes=self.frames.limit_bytes,
            owner=owner,
        )

    def refit(self) -> None:
        """Bring the frames under the limit that the ledger now leaves."""
        with self._lock:
            limit = self.ledger.frames_limit_bytes() // FRAME_BYTES * FRAME_BYTES
            if limit == self.frames.limit_bytes:
                return
            if limit < self.frames.used_bytes:
                before, self.frames.limit_bytes = self.frames.limit_bytes, limit
                try:
                    self._make_room(0, "budget")
                except BaseException:
                    self.frames.limit_bytes = max(before, self.frames.used_bytes)
                    raise
            self.frames.set_limit(limit)

    # --- moves ------------------------------------------------------------------------------------------------------

    def _set_state(self, page: Page, state: PageState) -> None:
        assert (page.state, state) in TRANSITIONS, f"{page.state} -> {state}"
        if page.state is PageState.RESIDENT:
            page.entry.missing += 1
        if state is PageState.RESIDENT:
            page.entry.missing -= 1
        if state is PageState.LOADING:
            self._count_resident(page, page.n_bytes)
        elif state is PageState.SWAPPED:
            self._count_resident(page, -page.n_bytes)
        page.state = state

    def _count_resident(self, page: Page, n_bytes: int) -> None:
        if page.entry.kind == "weights":
            self._weights_resident_bytes += n_bytes

    def _await(self, page: Page) -> None:
        """Wait until a page is resident; start its load where nobody has."""
        if page.resident:
            return
        self.stats.faults += 1
        start = self._timer()
        page.error = None
        while not page.resident:
            if page.error is not None:
                error, page.error = page.error, None
                raise error
            if self._closed or page.state is PageState.FREED:
                raise TensorFreedError(f"{page.entry.tensor_id}: its memory was freed")
            if page.state is PageState.SWAPPED:
                if self._make_room(page.n_bytes, page.entry.kind):  # it may have waited, and another loaded the page
                    continue
                self._load(page, DEMAND)
                continue
            if page.ticket is not None:
                self._queue.promote(page.ticket, DEMAND)  # type: ignore[arg-type]
            self._changed.wait()
        self.stats.stall_s += self._timer() - start

    def _load(self, page: Page, priority: int) -> None:
        self.frames.back(page.frames_start, page.n_bytes, owner=page.entry.kind)
        self._set_state(page, PageState.LOADING)
        self._moving += 1
        page.unused = True
        page.prefetched = priority != DEMAND
        if page.prefetched:
            self.stats.prefetches += 1
        if not page.kept:
            self._ahead_bytes += page.n_bytes
        page.ticket = self._queue.submit(lambda: self._read(page), priority)

    def _read(self, page: Page) -> None:
        error: Exception | None = None
        n_read = 0
        try:
            n_read = self._transfer_in(page)
        except Exception as caught:  # handed to whoever waits for the page
            error = caught
        with self._lock:
            self._moving -= 1
            page.ticket = None
            if error is None:
                self._set_state(page, PageState.RESIDENT)
                self.stats.bytes_read += n_read
                if page.swap_offset is not None:
                    self.stats.swap_reads += 1
            else:
                self._set_state(page, PageState.SWAPPED)
                self.frames.release(page.frames_start, page.n_bytes)
                self._touch_failed(page)
                page.error = error
            self._release_freed(page.entry)
            self._changed.notify_all()

    def _touch_failed(self, page: Page) -> None:
        page.unused = False
        if not page.kept:
            self._ahead_bytes -= page.n_bytes

    def _transfer_in(self, page: Page) -> int:
        if page.swap_offset is not None:
            self._swap.read(page.swap_offset, page.frames_start, page.n_bytes)
            return page.n_bytes
        source = page.entry.source
        assert source is not None, "a page without a source and without a swap extent was never written"
        offset, n_bytes = source.offset_bytes + page.start_bytes, page.stop_bytes - page.start_bytes
        n_read = source.file.read_into(page.entry.address + page.start_bytes, offset, n_bytes)
        if source.checksums is not None and not page.verified:
            data = alias_memory(page.entry.address + page.start_bytes, n_bytes)
            found = xxhash.xxh3_64_intdigest(data.numpy().data)
            expected = source.checksums[page.index]
            if found != expected:
                raise CorruptDataError(
                    f"{source.file.path}: {page.entry.tensor_id}, bytes {offset} to {offset + n_bytes}: checksum "
                    f"{found:016x} instead of {expected:016x}; the file is damaged; delete its directory to pack again",
                    path=source.file.path,
                )
            page.verified = True
        return n_read

    def _evict(self, page: Page) -> None:
        if page.state is not PageState.RESIDENT or page.pins or self._closed:
            return
        if page.aliased:
            page.dirty = page.dirty or not self._unchanged(page)
            page.aliased = False
        if page.unused:
            page.unused = page.prefetched = False
            if not page.kept:
                self._ahead_bytes -= page.n_bytes
        if not page.dirty:
            self._set_state(page, PageState.SWAPPED)
            self.frames.release(page.frames_start, page.n_bytes)
            self.stats.evictions += 1
            self._changed.notify_all()
            return
        try:
            if page.swap_offset is None:
                page.swap_offset = self._swap.allocate(page.n_bytes)
        except StorageError as error:  # the page stays; the error reaches whoever needs the room
            self._write_error = error
            return
        self._set_state(page, PageState.WRITING)
        self._moving += 1
        self._leaving_bytes += page.n_bytes
        self._queue.submit(lambda: self._write(page), DEMAND)

    def _write(self, page: Page) -> None:
        assert page.swap_offset is not None
        error: Exception | None = None
        try:
            self._swap.write(page.swap_offset, page.frames_start, page.n_bytes)
        except Exception as caught:  # the copy in memory stays valid; the error reaches whoever needs the room
            error = caught
        with self._lock:
            self._moving -= 1
            self._leaving_bytes -= page.n_bytes
            if error is None:
                self._set_state(page, PageState.SWAPPED)
                self.frames.release(page.frames_start, page.n_bytes)
                page.dirty = False
                self.stats.swap_writes += 1
                self.stats.bytes_written += page.n_bytes
            else:
                self._set_state(page, PageState.RESIDENT)
                self._swap.free(page.swap_offset)
                page.swap_offset = None
                self._write_error = error
            self._release_freed(page.entry)
            self._changed.notify_all()

    def _unchanged(self, page: Page) -> bool:
        """Whether a page that views were handed out of still equals its source."""
        source = page.entry.source
        if source is None or page.swap_offset is not None:
            return False
        stored = source.file.read_bytes(source.offset_bytes + page.start_bytes, page.stop_bytes - page.start_bytes)
        data = alias_memory(page.entry.address + page.start_bytes, page.stop_bytes - page.start_bytes)
        return bool(data.numpy().data == memoryview(stored))

    # --- end ----------------------------------------------------------------------------------------------------------

    def usage(self) -> list[TensorUse]:
        """Return what each tensor holds."""
        with self._lock:
            return [
                TensorUse(
                    entry.kind,
                    entry.codec.name,
                    math.prod(entry.shape) * entry.dtype.itemsize,
                    entry.n_bytes,
                    sum(
                        page.stop_bytes - page.start_bytes
                        for page in entry.pages
                        if page.state in (PageState.RESIDENT, PageState.LOADING, PageState.WRITING)
                    ),
                )
                for entry in self.entries.values()
            ]

    @property
    def swap_used_bytes(self) -> int:
        """Bytes in the swap file."""
        return self._swap.used_bytes

    def trim(self) -> None:
        """Return free page frames to the system."""
        with self._lock:
            self.frames.trim()

    def _check_open(self) -> None:
        if self._closed:
            raise TensorFreedError("the memory optimizer is closed")

    def close(self) -> bool:
        """Stop the I/O threads, release all memory, remove the swap file. Managed tensors are unusable afterwards.

        Returns:
            Whether all memory was released now: not where views of managed tensors are still alive.
        """
        with self._lock:
            if self._closed:
                return False
            self._closed = True
            self._changed.notify_all()
        self._queue.close()
        with self._lock:
            entries = list(self.entries.values())
            for entry in entries:
                self.free(entry.tensor_id)
            self.frames.set_limit(0)  # also for what views release later
        self._swap.close()
        return all(page.state is PageState.FREED for entry in entries for page in entry.pages)
