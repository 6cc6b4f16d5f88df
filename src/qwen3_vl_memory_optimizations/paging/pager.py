"""The Pager: public interface of the only package that moves bytes between the SSD and memory.

    records/            records of tensors and pages; adding and freeing tensors
    transfers/          page transfers, the resident set, prefetch and eviction
    budget/             accounts, memory used by others, memory returned to the system
    products.py         products on the encoded form
    managed_tensor.py   the tensor that replaces a module's parameter
    runtime_tensors.py  all tensors except weights
    pager.py            the budget, shutdown

One lock guards pages, frames and the schedule. The Pager creates it and passes it to the other parts: `Access` takes
it, and the other parts run under it. I/O threads take it only to record that a transfer ended. The order of all locks:
docs/locking.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..compression import EncodingLog, Scratch
from ..errors import ConfigurationError, MemoryOptimizationError, UnknownTensorError
from ..interrupts import ShieldedLock, shield
from ..pools import FramePool, TensorPool
from ..prediction import PassSchedule
from ..storage import BACKGROUND, PREFETCH, SwapFile
from .budget.ledger import PROCESS, TENSORS, Ledger
from .budget.workspace import Workspaces
from .products import Products
from .records.check import check
from .records.entry import PageState, TensorEntry, alias_memory
from .records.stats import PagingStats
from .records.tensor_table import Lives, TensorTable
from .records.views import TensorPages, TensorUse, describe_pages, describe_use
from .runtime_tensors import RuntimeTensors
from .transfers.access import Access
from .transfers.finalizers import FinalizerQueue
from .transfers.moves import PageMover
from .transfers.resident_set import EvictionPolicy, ResidentSet
from .transfers.room import Room


class Pager:
    """Keeps managed tensors within the budget.

    Args:
        ledger: the budget; page frames use what its accounts leave.
        swap_dir: directory of the swap file, which is created when dirty pages must leave; of several directories, the
            first that accepts a file.
        swap_bytes: maximum size of the swap file; `None`: 80 % of the free space on its disk.
        reuse_frames: keep freed page frames for later pages (memory pooling).
        policy: chooses which runtime tensors leave memory; `None`: least recently used first.
        timer: a monotonic clock in seconds, for the stall counter and the age of free frames.

    Attributes:
        products: computes products with weights.
        encodings: record of the encodings of its tensors, maintained by the code that encodes.
        runtime: all tensors except weights.
        owner: returns the object that must live as long as the tensors; the Pager is closed with it.
        pools: kind -> address ranges for blocks of this kind; changed under `exclusive`. A kind without a pool, or with
            a full one, gets its own ranges from the system.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        swap_dir: Path | Sequence[Path],
        swap_bytes: int | None = None,
        reuse_frames: bool = True,
        policy: EvictionPolicy | None = None,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.ledger = ledger
        self.frames = FramePool(ledger.frames_limit_bytes(), reuse=reuse_frames, timer=timer)
        self.stats = PagingStats()
        self.encodings = EncodingLog()
        self.entries: dict[str, TensorEntry] = {}
        self.pools: Mapping[str, TensorPool] = {}
        self.owner: Callable[[], object] = lambda: None
        self._lock = ShieldedLock()
        self._changed = threading.Condition(self._lock)  # type: ignore[arg-type]
        self._finalizers = FinalizerQueue(self._lock)
        self._swap = SwapFile(swap_dir, swap_bytes)

        def release(entry: TensorEntry) -> None:
            self._tensors.release(entry)

        self._mover = PageMover(self._changed, self.frames, self._swap, self.stats, release, timer)
        self._resident_set = ResidentSet(self.entries, self.frames, self._mover, policy)
        self._room = Room(
            self._changed, ledger, self.entries, self.frames, self._mover, self._resident_set, self._finalizers
        )
        self._access = Access(
            self._lock, self._changed, self._mover, self._room, self._resident_set, self.stats, release, timer
        )
        self.runtime = RuntimeTensors(
            self._lock, self.entries, self.frames, self._mover, self._resident_set, self._access, self._finalizers
        )
        self._tensors = TensorTable(
            self._changed, ledger, self.entries, self.frames, self._mover, self._resident_set, self._room
        )
        self._workspaces = Workspaces(self)
        self.products = Products(self._access, self.frames, lambda: self.scratch)

    @property
    def schedule(self) -> PassSchedule:
        """The learned order of accesses."""
        return self._resident_set.schedule

    @property
    def lives(self) -> Lives | None:
        """Observer of runtime tensors' creation and release, called under the lock; `None`: no observer."""
        return self._tensors.lives

    @lives.setter
    def lives(self, lives: Lives | None) -> None:
        self._tensors.lives = lives

    @property
    def on_pass(self) -> Callable[[], None] | None:
        """Hook called under the lock when an access begins a pass."""
        return self._resident_set.on_pass

    @on_pass.setter
    def on_pass(self, hook: Callable[[], None] | None) -> None:
        self._resident_set.on_pass = hook

    @property
    def on_growth(self) -> Callable[[int], None] | None:
        """Hook called under the lock before pages take new memory from the system instead of reusing frames.

        It runs when `frames.committed_bytes` is about to exceed its maximum since the last refit that changed the
        limit, and receives the number of bytes. It may call `reserve`, which evicts pages before the new one is
        loaded. An exception reaches the caller that needs the page; `MemoryBudgetExceeded` only stops prefetching.
        """
        return self._mover.on_growth

    @on_growth.setter
    def on_growth(self, hook: Callable[[int], None] | None) -> None:
        self._mover.on_growth = hook

    @contextmanager
    def recording(self, recorder: Callable[[str, int, str], None]) -> Iterator[None]:
        """Call `recorder` at each access in a block, with the tensor's id, encoded bytes and kind."""
        with self._lock:
            self._access.recorders = (*self._access.recorders, recorder)
        try:
            yield
        finally:
            with self._lock:
                self._access.recorders = tuple(each for each in self._access.recorders if each is not recorder)

    def listen(self, listener: Callable[[str, int, str], None], *, to_all: bool = False) -> None:
        """Call `listener` at each access to a runtime tensor outside a cycle, with the same arguments as `recording`.

        Args:
            listener: called under the lock.
            to_all: call it at each access to any tensor.
        """
        with self._lock:
            if to_all:
                self._access.recorders = (*self._access.recorders, listener)
            else:
                self._access.listeners = (*self._access.listeners, listener)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock with all finalizer actions done, to change what `then` of `free` changes, such as a pool."""
        with self._lock:
            self._finalizers.run()
            yield

    # --- registration ----------------------------------------------------------------------------------------------

    def add(self, entry: TensorEntry, *, resident: bool) -> None:
        """Register an entry.

        Args:
            entry: its address space is already reserved.
            resident: back it with memory now. The caller writes the contents, using `writing` or, for tensors used in a
                cycle, `hold` and `mark_dirty`, because it may have left memory by then. Otherwise its pages are read
                from its source when needed.

        Raises:
            MemoryBudgetExceeded: there is no room; nothing was changed.
            TensorFreedError: the Pager is closed; nothing was changed.
        """
        with self._lock:
            self._tensors.add(entry, resident=resident)

    def free(self, tensor_id: str, then: Callable[[], None] | None = None) -> None:
        """Remove a tensor and release its memory; live views keep theirs until they are collected.

        Args:
            tensor_id: the tensor; unknown ids are ignored.
            then: called when the memory is released, to give the address range back.
        """
        with self._lock:
            self._tensors.free(tensor_id, then)

    def free_later(self, tensor_id: str, then: Callable[[], None] | None = None) -> None:
        """Call `free` from a finalizer: never in the middle of a change, but before room is needed."""
        self._finalizers.add(lambda: self.free(tensor_id, then))

    def do_later(self, action: Callable[[], None]) -> None:
        """Run an action under the lock, from a finalizer (see `free_later`)."""
        self._finalizers.add(action)

    def entry(self, tensor_id: str) -> TensorEntry:
        """Return a tensor's record.

        Raises:
            UnknownTensorError: there is no such tensor.
        """
        try:
            return self.entries[tensor_id]
        except KeyError:
            raise UnknownTensorError(tensor_id) from None

    def record(self, entry: TensorEntry) -> None:
        """Record an access that bypasses the Pager."""
        self._access.record(entry)

    def read_ahead(self, tensor_ids: Sequence[str], *, gently: bool = False) -> None:
        """Prefetch weights for a first pass before it starts; return immediately.

        Args:
            tensor_ids: weights of one model, in the order in which the pass will use them.
            gently: issue one request at a time, while other code reads from the same disk. A later call without it
                removes that limit.

        Raises:
            UnknownTensorError: there is no such tensor.
        """
        with self._lock:
            for tensor_id in tensor_ids:
                self.entry(tensor_id)
            self._resident_set.start(tensor_ids, BACKGROUND if gently else PREFETCH)

    # --- budget -----------------------------------------------------------------------------------------------------

    def reserve(self, owner: str, n_bytes: int) -> None:
        """Reserve process memory for an owner, evicting pages for it.

        Raises:
            MemoryBudgetExceeded: it does not fit beside the minimum that the weights need.
        """
        with self._lock:
            before = self.ledger.held_bytes(owner)
            if before != n_bytes:
                self.ledger.set(owner, n_bytes, PROCESS)
                self._refit_for(n_bytes - before, lambda: self.ledger.set(owner, before, PROCESS))

    def reserve_most(self, owner: str) -> None:
        """Reserve for an owner all that evicting every page leaves, but for pages in use.

        Raises:
            MemoryBudgetExceeded: more pages came into use meanwhile; nothing was changed.
        """
        with self._lock:
            self._finalizers.run()
            in_use = self._room.kept_bytes() - self.ledger.frames_floor_bytes
            self.reserve(owner, max(self.ledger.held_bytes(owner), self.ledger.most_bytes(owner) - max(0, in_use)))

    def require_room(self, n_bytes: int, owner: str) -> None:
        """Raise if `n_bytes` would not fit even with all unpinned pages evicted; nothing is evicted.

        Raises:
            MemoryBudgetExceeded: states how many bytes could be made available.
        """
        with self._lock:
            self._room.check_fits(n_bytes, owner)

    def spare_bytes(self) -> int:
        """Return the budget left when all managed tensors are in memory; negative if they do not fit."""
        with self._lock:
            self._finalizers.run()
            # A freed tensor that a view still holds cannot even be evicted.
            return self.ledger.frames_limit_bytes() - sum(entry.frames_bytes for entry in self._tensors.all())

    def lend(self, owner: str, n_bytes: int) -> bool:
        """Add to an owner's account if all managed tensors still fit beside it; a negative size takes it back.

        Returns:
            Whether it was added. Nothing is evicted for it.
        """
        with self._lock:
            if n_bytes > 0 and n_bytes > self.spare_bytes():
                return False
            try:
                self.debit(owner, n_bytes)
            except MemoryOptimizationError:  # the room belongs to a tensor that is being added
                return False
            return True

    def _refit_for(self, growth_bytes: int, undo: Callable[[], None]) -> None:
        """Refit after an account grew, and call `undo` if that fails. A shrunken account never fails."""
        try:
            self.refit()
        except BaseException as error:
            if growth_bytes > 0:
                undo()
                self._room.undo_refit()
                raise
            if not isinstance(error, MemoryOptimizationError):  # else the error is for callers that asked for too much
                raise

    def refit(self) -> None:
        """Bring the frames under the limit that the ledger now leaves."""
        with self._lock:
            self._room.refit()

    def trim(self) -> None:
        """Return free page frames to the system."""
        with self._lock:
            self._finalizers.run()
            self.frames.trim()

    def compact(self, idle_s: float) -> int:
        """Return frames that were free for `idle_s` seconds to the system; return their size in bytes."""
        with self._lock:
            self._finalizers.run()
            return self.frames.compact(idle_s)

    @property
    def read_ahead_bytes(self) -> int:
        """Maximum size of prefetched pages that leave after use, in memory or being read."""
        return self._resident_set.read_ahead_bytes

    def set_read_ahead(self, n_bytes: int | None) -> None:
        """Set the read-ahead window. Memory for prefetched pages is not available to keep weights from pass to pass.

        Args:
            n_bytes: clamped between the largest page and half of the memory for weights; `None`: chosen from the
                available memory.

        Raises:
            ConfigurationError: below one byte.
        """
        if n_bytes is not None and n_bytes < 1:
            raise ConfigurationError(f"read_ahead: {n_bytes} bytes; use at least one byte, or None")
        with self._lock:
            self._resident_set.set_read_ahead(n_bytes)

    def usage(self) -> list[TensorUse]:
        """Return the memory held by each tensor."""
        with self._lock:
            self._finalizers.run()
            return [describe_use(entry) for entry in self.entries.values()]

    def page_map(self) -> list[TensorPages]:
        """Return the page states of each tensor: weights in pass order, then runtime tensors."""
        with self._lock:
            self._finalizers.run()
            weights = [entry for entry in self.entries.values() if entry.kind == "weights"]
            runtime = [entry for entry in self.entries.values() if entry.kind != "weights"]
            return describe_pages([*weights, *runtime])

    @property
    def closed(self) -> bool:
        """Return whether the Pager is closed, so that no page moves any more."""
        return self._mover.closed

    @property
    def touched_bytes(self) -> int:
        """Physical memory behind managed tensors: `frames.committed_bytes` less what reads have yet to fill."""
        with self._lock:
            return self.frames.committed_bytes - self._mover.untouched_bytes

    @property
    def swap_used_bytes(self) -> int:
        """Bytes in the swap file."""
        return self._swap.used_bytes

    @property
    def swap_free_bytes(self) -> int:
        """Bytes the swap file can still take, given its limit and the free space on its disk; takes about 10 us."""
        return self._swap.free_bytes

    @property
    def swap_dir(self) -> Path:
        """Directory of the swap file or, before it exists, its expected directory."""
        return self._swap.directory

    # --- computing on tensors ---------------------------------------------------------------------------------------

    @property
    def scratch(self) -> Scratch:
        """Workspace of the calling thread; its growth is debited, and returned when the thread ends."""
        return self._workspaces.of_this_thread()

    def debit(self, owner: str, n_bytes: int, scope: str = TENSORS) -> None:
        """Add to (or subtract from) an owner's account outside pages, before the memory is taken; evicts pages for it.

        Args:
            owner: the account.
            n_bytes: bytes to add; negative to subtract.
            scope: `TENSORS`, or `PROCESS` for memory that is not a managed tensor.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what is pinned; nothing was changed.
        """
        with self._lock:
            self._finalizers.run()
            self.ledger.add(owner, n_bytes, scope)
            self._refit_for(n_bytes, lambda: self.ledger.add(owner, -n_bytes, scope))

    def debit_later(self, owner: str, n_bytes: int, scope: str = TENSORS) -> None:
        """Call `debit` with a negative size, from a finalizer (see `free_later`)."""
        self._finalizers.add(lambda: self.ledger.add(owner, n_bytes, scope))

    def row_ranges(self, entry: TensorEntry) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows in order, each resident and pinned until the next is requested."""
        return self._access.row_ranges(entry)

    def read_rows(self, entry: TensorEntry, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the encoded segments of some rows (int64 `[n]`), from memory or as single rows from the SSD."""
        return self._access.read_rows(entry, rows)

    def pin(self, entry: TensorEntry) -> None:
        """Make a whole tensor resident and pin it.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what is pinned.
        """
        self._access.pin(entry)

    def unpin(self, entry: TensorEntry) -> None:
        """Undo one `pin`."""
        self._access.unpin(entry)

    def unpin_later(self, entry: TensorEntry) -> None:
        """Undo one `pin`, from a finalizer (see `free_later`)."""
        self._finalizers.add(lambda: self._access.unpin(entry))

    def hold(self, entries: Sequence[TensorEntry], upcoming: Sequence[TensorEntry], ahead_bytes: int) -> None:
        """Pin runtime tensors that are used in a cycle, and prefetch those that are used next.

        Args:
            entries: tensors to load and pin.
            upcoming: tensors used next, in order of use.
            ahead_bytes: how much of `upcoming` may be in memory before it is used.

        Raises:
            MemoryBudgetExceeded: they do not fit beside what is pinned; nothing is pinned.
        """
        wanted = [*entries, *upcoming]
        ahead_bytes += sum(entry.n_bytes for entry in entries)
        self._access.pin_all(entries, lambda: self._resident_set.read_cycle_ahead(wanted, ahead_bytes))

    def let_go(self, entries: Sequence[TensorEntry], upcoming: Sequence[TensorEntry], ahead_bytes: int) -> None:
        """Undo one `hold`, and prefetch into the room that this leaves."""
        self._access.unpin_all(entries, lambda: self._resident_set.read_cycle_ahead(upcoming, ahead_bytes))

    def zero(self, entry: TensorEntry) -> None:
        """Fill a runtime tensor that is stored unencoded with zeros.

        Raises:
            MemoryBudgetExceeded: it has left memory since, and does not fit beside what is pinned.
        """
        with self.writing(entry):
            alias_memory(entry.address, entry.n_bytes).zero_()

    def mark_dirty(self, entry: TensorEntry) -> None:
        """Record that a pinned tensor was written to and no longer equals its source."""
        self._access.mark_dirty(entry)

    def check(self) -> None:
        """Assert that counters, pages, frames and the swap file agree. Can be called at any time from any thread."""
        with self._lock:
            complete = not self._tensors.adding
            check(self._tensors.all(), self.frames, self._mover, self._swap, complete=complete)

    @contextmanager
    def writing(self, entry: TensorEntry) -> Iterator[None]:
        """Hold a whole tensor in memory for writing in a block.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what is pinned.
        """
        with shield:
            self.pin(entry)
            try:
                yield
            finally:
                self.mark_dirty(entry)  # also after a partial write
                self.unpin(entry)

    # --- end --------------------------------------------------------------------------------------------------------

    def close(self) -> bool:
        """Stop the I/O threads, release all memory and remove the swap file. Managed tensors become unusable.

        Returns:
            Whether all memory was released now; `False` if views of managed tensors are still alive.
        """
        with self._lock:
            if self._mover.closed:
                return False
            self._mover.closed = True
            self._changed.notify_all()
            while self._tensors.adding:
                self._changed.wait()
        self._mover.close()
        with self._lock:
            self._finalizers.run()
            entries = list(self.entries.values())
            for entry in entries:
                self.free(entry.tensor_id)
            self.frames.set_limit(0)  # also for memory that views release later
        self._swap.close()
        return all(page.state is PageState.FREED for entry in entries for page in entry.pages)
