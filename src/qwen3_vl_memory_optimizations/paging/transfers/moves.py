"""`PageMover`: transfers of pages between the SSD and memory, and their state transitions.

Transfers have two phases: frames are taken and the page is marked under the lock, and the bytes move outside it. The
end is recorded under the lock again. A failed transfer leaves the old copy valid.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import xxhash

from ...errors import CorruptDataError, StorageError, TensorFreedError
from ...pools import FramePool
from ...storage import DEMAND, IOQueue, SwapFile
from ..records.entry import TRANSITIONS, Page, PageState, TensorEntry, alias_memory
from ..records.stats import PagingStats

logger = logging.getLogger(__name__)

_IO_THREADS = 4


class PageMover:
    """Moves pages; other classes decide which ones, and when.

    Its methods and attributes are used under the Pager's lock, except `close`. Its I/O threads take the lock only to
    record that a transfer ended.

    Args:
        changed: the condition of the Pager's lock; notified when a page was loaded, left or failed to move.
        frames: the memory of the pages.
        swap: the swap file for dirty pages.
        stats: receives the traffic counters.
        on_end: called with the tensor of each page whose transfer ended.
        timer: a monotonic clock in seconds, for the counter of reading time.

    Attributes:
        moving: transfers in progress.
        leaving_bytes: frames of pages that are being written; they will soon be free.
        ahead_bytes: frames of pages that were prefetched and will leave after their first use.
        weights_resident_bytes: frames behind weights.
        untouched_bytes: frames of reads in progress that have not yet taken memory from the system.
        failures: transfers whose end could not be recorded; logged, and the page stays where it was.
        write_error: why a page could not leave; raised to the caller that needs the room.
        closed: no page moves any more.
        on_growth: see `Pager.on_growth`.
        on_left: called with the tensor of each page that left memory or could not be loaded.
    """

    def __init__(
        self,
        changed: threading.Condition,
        frames: FramePool,
        swap: SwapFile,
        stats: PagingStats,
        on_end: Callable[[TensorEntry], None],
        timer: Callable[[], float],
    ) -> None:
        self.moving = 0
        self._reading = 0
        self._reading_since_s = 0.0
        self.leaving_bytes = 0
        self.ahead_bytes = 0
        self.weights_resident_bytes = 0
        self.untouched_bytes = 0
        self.failures = 0
        self.write_error: Exception | None = None
        self.closed = False
        self.on_growth: Callable[[int], None] | None = None
        self.on_left: Callable[[TensorEntry], None] | None = None
        self._changed = changed
        self._frames = frames
        self._swap = swap
        self._stats = stats
        self._on_end = on_end
        self._timer = timer
        self._queue = IOQueue(_IO_THREADS)

    # --- states -----------------------------------------------------------------------------------------------------

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
        if state is PageState.SWAPPED and self.on_left is not None:
            self.on_left(page.entry)

    def _count_resident(self, page: Page, n_bytes: int) -> None:
        if page.entry.kind == "weights":
            self.weights_resident_bytes += n_bytes

    def touch(self, page: Page) -> None:
        """Record that a resident page was used."""
        if page.unused:
            page.unused = False
            if not page.kept:
                self.ahead_bytes -= page.n_bytes
            if page.prefetched:
                self._stats.prefetches_used += 1
                page.prefetched = False

    def discard(self, page: Page) -> None:
        """Release everything that a page of a freed tensor holds. Precondition: it is neither pinned nor moving."""
        if page.state is PageState.RESIDENT:
            self._count_resident(page, -page.n_bytes)
            self._frames.release(page.frames_start, page.n_bytes)
        self.forget_swapped(page)
        page.state = PageState.FREED

    def forget_swapped(self, page: Page) -> None:
        """Free the swap extent of a page, if it has one."""
        if page.swap_offset is not None:
            self._swap.free(page.swap_offset)
            page.swap_offset = None

    # --- into memory ------------------------------------------------------------------------------------------------

    def announce(self, n_bytes: int) -> bool:
        """Call `on_growth` if backing `n_bytes` takes memory from the system beyond what frames held before.

        Returns:
            Whether it was called; it may then have released the lock and used up the room.
        """
        if self.on_growth is None:
            return False
        growth = self._frames.growth_bytes(n_bytes)
        committed = self._frames.committed_bytes + growth
        if growth <= 0 or committed <= self._frames.high_bytes:
            return False
        self.on_growth(growth)
        # Set now, not when the memory is backed: a hook that changes the limit would be called again for these bytes.
        self._frames.high_bytes = max(self._frames.high_bytes, committed)
        return True

    def load(self, page: Page, priority: int) -> None:
        """Start reading a page. Precondition: it is swapped out, and there is room for it."""
        page.untouched_bytes = max(0, self._frames.growth_bytes(page.n_bytes))
        self._frames.back(page.frames_start, page.n_bytes, owner=page.entry.kind)
        self.untouched_bytes += page.untouched_bytes
        self._set_state(page, PageState.LOADING)
        self.moving += 1
        if not self._reading:
            self._reading_since_s = self._timer()
        self._reading += 1
        page.unused = True
        page.prefetched = priority != DEMAND
        if page.prefetched:
            self._stats.prefetches += 1
        if not page.kept:
            self.ahead_bytes += page.n_bytes
        try:
            page.ticket = self._queue.submit(lambda: self._read(page), priority)
        except BaseException as error:
            self.moving -= 1
            self._end_read(page, 0, error)
            page.error = None
            raise

    def hurry(self, page: Page, priority: int = DEMAND) -> None:
        """Raise the priority of a queued read."""
        if page.ticket is not None:
            self._queue.promote(page.ticket, priority)  # type: ignore[arg-type]

    def _read(self, page: Page) -> None:
        error: Exception | None = None
        n_read = 0
        try:
            n_read = self._transfer_in(page)
        except Exception as caught:  # passed to the thread that waits for the page
            error = caught
        with self._changed:
            self.moving -= 1
            try:
                self._end_read(page, n_read, error)
                self._on_end(page.entry)
            except Exception as caught:  # passed to the waiting thread, which would otherwise wait forever
                self._note_failure("read", page, caught)
                if page.state is PageState.LOADING:
                    page.state = PageState.SWAPPED
                    self._count_resident(page, -page.n_bytes)
                    self._frames.release(page.frames_start, page.n_bytes)
                    page.unused = False
                page.error = None if page.resident else error or caught
            finally:
                self._changed.notify_all()

    def _end_read(self, page: Page, n_read: int, error: BaseException | None) -> None:
        self._reading -= 1
        self.untouched_bytes -= page.untouched_bytes
        now_s = self._timer()  # each time: reads may overlap for minutes
        self._stats.reading_s += now_s - self._reading_since_s
        self._reading_since_s = now_s
        page.ticket = None
        if error is None:
            self._set_state(page, PageState.RESIDENT)
            self._stats.bytes_read += n_read
            self._stats.page_reads += 1
            if page.swap_offset is not None:
                self._stats.swap_reads += 1
        else:
            self._set_state(page, PageState.SWAPPED)
            self._frames.release(page.frames_start, page.n_bytes)
            page.unused = False
            if not page.kept:
                self.ahead_bytes -= page.n_bytes
            page.error = error  # type: ignore[assignment]

    def _note_failure(self, action: str, page: Page, error: Exception) -> None:
        self.failures += 1
        name = f"{page.entry.tensor_id}, page {page.index}"
        logger.error("%s: could not record the end of a %s: %r", name, action, error, exc_info=error)

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

    # --- out of memory ----------------------------------------------------------------------------------------------

    def evict(self, page: Page) -> None:
        """Evict a page: a clean one is dropped at once, a dirty one is written first, a pinned one stays."""
        if page.state is not PageState.RESIDENT or page.pins or page.awaited or self.closed:
            return
        if page.aliased:
            page.dirty = page.dirty or not self._unchanged(page)
            page.aliased = False
        if page.unused:
            page.unused = page.prefetched = False
            if not page.kept:
                self.ahead_bytes -= page.n_bytes
        if not page.dirty:
            self._set_state(page, PageState.SWAPPED)
            self._frames.release(page.frames_start, page.n_bytes)
            self._stats.evictions += 1
            self._changed.notify_all()
            return
        try:
            if page.swap_offset is None:
                page.swap_offset = self._swap.allocate(page.n_bytes)
        except StorageError as error:  # the page stays; the error is raised to the caller that needs the room
            self.write_error = error
            return
        self._set_state(page, PageState.WRITING)
        self.moving += 1
        self.leaving_bytes += page.n_bytes
        try:
            self._queue.submit(lambda: self._write(page), DEMAND)
        except BaseException:
            self.moving -= 1
            self.leaving_bytes -= page.n_bytes
            self._set_state(page, PageState.RESIDENT)
            raise

    def _write(self, page: Page) -> None:
        assert page.swap_offset is not None
        error: Exception | None = None
        try:
            self._swap.write(page.swap_offset, page.frames_start, page.n_bytes)
        except Exception as caught:  # the copy in memory stays valid; the caller that needs the room gets the error
            error = caught
        with self._changed:
            self.moving -= 1
            self.leaving_bytes -= page.n_bytes
            try:
                self._end_write(page, error)
                self._on_end(page.entry)
            except Exception as caught:  # passed to the caller that waits for the room
                self._note_failure("write", page, caught)
                if page.state is PageState.WRITING:
                    page.state = PageState.RESIDENT
                    page.entry.missing -= 1
                self.write_error = error or caught
            finally:
                self._changed.notify_all()

    def _end_write(self, page: Page, error: Exception | None) -> None:
        if error is None:
            self._set_state(page, PageState.SWAPPED)
            self._frames.release(page.frames_start, page.n_bytes)
            page.dirty = False
            self._stats.swap_writes += 1
            self._stats.bytes_written += page.n_bytes
        else:
            self._set_state(page, PageState.RESIDENT)
            self.forget_swapped(page)
            self.write_error = error

    def _unchanged(self, page: Page) -> bool:
        """Return whether a page whose views were handed out still equals its source.

        This reads the SSD under the lock. Views of weights that have a source are rare, and going through the I/O queue
        instead would free the page too late for evictions that make room for prefetches.
        """
        source = page.entry.source
        if source is None or page.swap_offset is not None:
            return False
        try:
            stored = source.file.read_bytes(source.offset_bytes + page.start_bytes, page.stop_bytes - page.start_bytes)
        except Exception:  # the evicting code has more pages to unpin; the swap file keeps this page's contents
            return False
        data = alias_memory(page.entry.address + page.start_bytes, page.stop_bytes - page.start_bytes)
        return bool(data.numpy().data == memoryview(stored))

    def check_open(self) -> None:
        """Raise if pages cannot move any more.

        Raises:
            TensorFreedError: the Pager is closed or closing.
        """
        if self.closed:
            raise TensorFreedError("the memory optimizer is closed")

    def close(self) -> None:
        """Finish the transfers in progress. The lock must be free, because their ends are recorded under it."""
        self._queue.close()
