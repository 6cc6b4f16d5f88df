"""The Pager: the face of the only module that moves bytes between the SSD and memory.

    records/            what is known of each tensor and page; how a tensor comes and goes
    transfers/          how a page comes and leaves, which pages stay, which are read ahead, which leave first
    budget/             accounts, what others take, memory that goes back
    products.py         products on the encoded form
    managed_tensor.py   the tensor that stands in a module
    runtime_tensors.py  all tensors but the weights
    pager.py            the budget, the end

One lock guards pages, frames and the schedule. The Pager makes it and hands it to the other parts: `Access` takes it,
the rest is used under it. I/O threads take it only to note that a transfer ended. The order of all locks:
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
from .transfers.resident_set import ResidentSet, VictimOrder
from .transfers.room import Room


class Pager:
    """Keeps managed tensors within the budget.

    Args:
        ledger: the budget; page frames take what its accounts leave.
        swap_dir: where the swap file goes, should dirty pages have to leave; of several directories, the first that
            accepts a file.
        swap_bytes: its largest size; `None`: 80 % of what is free on its disk.
        reuse_frames: keep freed page frames for the next page (memory pooling).
        order: which runtime tensors leave first; `None`: those that were not used longest.
        timer: a monotonic clock in seconds, for the stall counter and the age of free frames.

    Attributes:
        products: computes with weights.
        encodings: what was encoded for its tensors; those who encode note it.
        runtime: the tensors that are no weights.
        owner: returns what has to stay alive as long as tensors do: with it the Pager is closed.
        pools: kind -> address ranges for blocks of this kind; changed under `exclusive`. A kind without one, or whose
            pool is full, gets ranges of its own from the system.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        swap_dir: Path | Sequence[Path],
        swap_bytes: int | None = None,
        reuse_frames: bool = True,
        order: VictimOrder | None = None,
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
        self._resident_set = ResidentSet(self.entries, self.frames, self._mover, order)
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
        """The order of accesses, as far as it is known."""
        return self._resident_set.schedule

    @property
    def lives(self) -> Lives | None:
        """Told, under the lock, of runtime tensors that come and go; `None`: nobody."""
        return self._tensors.lives

    @lives.setter
    def lives(self, lives: Lives | None) -> None:
        self._tensors.lives = lives

    @property
    def on_pass(self) -> Callable[[], None] | None:
        """Called, under the lock, when an access began a pass."""
        return self._resident_set.on_pass

    @on_pass.setter
    def on_pass(self, hook: Callable[[], None] | None) -> None:
        self._resident_set.on_pass = hook

    @property
    def on_growth(self) -> Callable[[int], None] | None:
        """Called, under the lock, before pages take memory from the system rather than frames that others left.

        That is when `frames.committed_bytes` is about to be higher than ever since a refit changed the limit. The hook
        gets the number of bytes. It may `reserve`: pages then leave before the new one comes. What it raises reaches
        whoever needs the page; `MemoryBudgetExceeded` stops reads ahead and nothing else.
        """
        return self._mover.on_growth

    @on_growth.setter
    def on_growth(self, hook: Callable[[int], None] | None) -> None:
        self._mover.on_growth = hook

    @contextmanager
    def recording(self, recorder: Callable[[str, int, str], None]) -> Iterator[None]:
        """Call `recorder` at each access in a block, with the id, the encoded bytes and the kind of the tensor."""
        with self._lock:
            self._access.recorders = (*self._access.recorders, recorder)
        try:
            yield
        finally:
            with self._lock:
                self._access.recorders = tuple(each for each in self._access.recorders if each is not recorder)

    def listen(self, listener: Callable[[str, int, str], None], *, to_all: bool = False) -> None:
        """Call `listener` at each access to a runtime tensor that is not used in a cycle, as `recording` does.

        Args:
            listener: called under the lock.
            to_all: at each access to any tensor.
        """
        with self._lock:
            if to_all:
                self._access.recorders = (*self._access.recorders, listener)
            else:
                self._access.listeners = (*self._access.listeners, listener)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock, with nothing left to do for finalizers: for what `then` of `free` changes, such as a pool."""
        with self._lock:
            self._finalizers.run()
            yield

    # --- registration ----------------------------------------------------------------------------------------------

    def add(self, entry: TensorEntry, *, resident: bool) -> None:
        """Register an entry.

        Args:
            entry: its address space is reserved already.
            resident: back it with memory now; its contents are the caller's to write, as `writing` or, for those of a
                cycle, `hold` and `mark_dirty`: it may have left by then. Otherwise its pages are read from its source
                when they are needed.

        Raises:
            MemoryBudgetExceeded: no room; nothing was changed.
            TensorFreedError: the Pager is closed; nothing was changed.
        """
        with self._lock:
            self._tensors.add(entry, resident=resident)

    def free(self, tensor_id: str, then: Callable[[], None] | None = None) -> None:
        """Forget a tensor and release its memory; views of it that are alive keep theirs until they die.

        Args:
            tensor_id: the tensor; an unknown one is none of this method's business.
            then: called when the memory is released, to give the address range back.
        """
        with self._lock:
            self._tensors.free(tensor_id, then)

    def free_later(self, tensor_id: str, then: Callable[[], None] | None = None) -> None:
        """Do what `free` does as a finalizer has to: not in the midst of a change, but before room is needed."""
        self._finalizers.add(lambda: self.free(tensor_id, then))

    def do_later(self, action: Callable[[], None]) -> None:
        """Do something under the lock, as a finalizer has to (see `free_later`)."""
        self._finalizers.add(action)

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
        self._access.record(entry)

    def read_ahead(self, tensor_ids: Sequence[str], *, gently: bool = False) -> None:
        """Start to read weights for a first pass, before anybody asks for one; returns at once.

        Args:
            tensor_ids: weights of one model, in the order in which the pass will use them.
            gently: one request at a time, while others read from the same disk. Calling again without hurries them.

        Raises:
            UnknownTensorError: no such tensor.
        """
        with self._lock:
            for tensor_id in tensor_ids:
                self.entry(tensor_id)
            self._resident_set.start(tensor_ids, BACKGROUND if gently else PREFETCH)

    # --- budget -----------------------------------------------------------------------------------------------------

    def reserve(self, owner: str, n_bytes: int) -> None:
        """Set memory of the process aside for an owner; pages leave for it.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what the weights need at least.
        """
        with self._lock:
            before = self.ledger.held_bytes(owner)
            if before != n_bytes:
                self.ledger.set(owner, n_bytes, PROCESS)
                self._refit_for(n_bytes - before, lambda: self.ledger.set(owner, before, PROCESS))

    def require_room(self, n_bytes: int, owner: str) -> None:
        """Refuse what would not fit even if all that is not pinned left; nothing leaves.

        Raises:
            MemoryBudgetExceeded: with what could be had.
        """
        with self._lock:
            self._room.check_fits(n_bytes, owner)

    def spare_bytes(self) -> int:
        """Return what of the budget is left when all managed tensors are in memory; negative where they do not fit."""
        with self._lock:
            self._finalizers.run()
            # A freed tensor that a view still holds cannot even leave.
            return self.ledger.frames_limit_bytes() - sum(entry.frames_bytes for entry in self._tensors.all())

    def lend(self, owner: str, n_bytes: int) -> bool:
        """Add to what an owner holds, if all managed tensors still fit beside it; or, below zero, take it back.

        Returns:
            Whether it was added. Nothing leaves memory for it.
        """
        with self._lock:
            if n_bytes > 0 and n_bytes > self.spare_bytes():
                return False
            try:
                self.debit(owner, n_bytes)
            except MemoryOptimizationError:  # a tensor that is about to come has the room
                return False
            return True

    def _refit_for(self, growth_bytes: int, undo: Callable[[], None]) -> None:
        """Refit after an account grew; call `undo` if that is refused. One that shrank is never refused."""
        try:
            self.refit()
        except BaseException as error:
            if growth_bytes > 0:
                undo()
                self._room.undo_refit()
                raise
            if not isinstance(error, MemoryOptimizationError):  # else it is for those who asked for too much
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
        """Return page frames that nobody took for so many seconds to the system; return their bytes."""
        with self._lock:
            self._finalizers.run()
            return self.frames.compact(idle_s)

    @property
    def read_ahead_bytes(self) -> int:
        """How much that leaves after its use may be in memory before it, or on its way there."""
        return self._resident_set.read_ahead_bytes

    def set_read_ahead(self, n_bytes: int | None) -> None:
        """Choose how much of the weights is read ahead: what that takes is not kept from pass to pass.

        Args:
            n_bytes: at least the largest page, and at most half of the memory for weights, is used; `None`: chosen by
                the memory there is.

        Raises:
            ConfigurationError: below one byte.
        """
        if n_bytes is not None and n_bytes < 1:
            raise ConfigurationError(f"read_ahead: {n_bytes} bytes; give at least one, or None")
        with self._lock:
            self._resident_set.set_read_ahead(n_bytes)

    def usage(self) -> list[TensorUse]:
        """Return what each tensor holds."""
        with self._lock:
            self._finalizers.run()
            return [describe_use(entry) for entry in self.entries.values()]

    def page_map(self) -> list[TensorPages]:
        """Return where the pages of each tensor are: those of weights in the order of a pass, then runtime tensors."""
        with self._lock:
            self._finalizers.run()
            weights = [entry for entry in self.entries.values() if entry.kind == "weights"]
            runtime = [entry for entry in self.entries.values() if entry.kind != "weights"]
            return describe_pages([*weights, *runtime])

    @property
    def closed(self) -> bool:
        """Whether nothing comes or leaves any more."""
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
        """How many more bytes the swap file may take now, by its limit and by what is free on its disk; about 10 us."""
        return self._swap.free_bytes

    @property
    def swap_dir(self) -> Path:
        """Where the swap file lies or, before there is one, where it is expected to."""
        return self._swap.directory

    # --- computing on tensors ---------------------------------------------------------------------------------------

    @property
    def scratch(self) -> Scratch:
        """Workspace of the calling thread; what it grows by is debited, and given back when the thread ends."""
        return self._workspaces.of_this_thread()

    def debit(self, owner: str, n_bytes: int, scope: str = TENSORS) -> None:
        """Add to what an owner holds beside pages (or subtract), before the memory is taken; pages leave for it.

        Args:
            owner: the account.
            n_bytes: what comes or, negative, goes.
            scope: `TENSORS`, or `PROCESS` for what is no managed tensor.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what is pinned; nothing was changed.
        """
        with self._lock:
            self._finalizers.run()
            self.ledger.add(owner, n_bytes, scope)
            self._refit_for(n_bytes, lambda: self.ledger.add(owner, -n_bytes, scope))

    def debit_later(self, owner: str, n_bytes: int, scope: str = TENSORS) -> None:
        """Do what `debit` does with fewer bytes, as a finalizer has to (see `free_later`)."""
        self._finalizers.add(lambda: self.ledger.add(owner, n_bytes, scope))

    def row_ranges(self, entry: TensorEntry) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows, in order, each resident and pinned until the next is asked for."""
        return self._access.row_ranges(entry)

    def read_rows(self, entry: TensorEntry, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the encoded segments of some rows (int64 `[n]`): from memory, or single rows from the SSD."""
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
        """Undo one `pin`, as a finalizer has to (see `free_later`)."""
        self._finalizers.add(lambda: self._access.unpin(entry))

    def hold(self, entries: Sequence[TensorEntry], upcoming: Sequence[TensorEntry], ahead_bytes: int) -> None:
        """Pin runtime tensors that are used in a cycle, and read ahead those that are used next.

        Args:
            entries: they are pinned, in memory.
            upcoming: in the order of their use.
            ahead_bytes: how much of `upcoming` may wait in memory before it is used.

        Raises:
            MemoryBudgetExceeded: they do not fit beside what is pinned; nothing is pinned.
        """
        wanted = [*entries, *upcoming]
        ahead_bytes += sum(entry.n_bytes for entry in entries)
        self._access.pin_all(entries, lambda: self._resident_set.read_cycle_ahead(wanted, ahead_bytes))

    def let_go(self, entries: Sequence[TensorEntry], upcoming: Sequence[TensorEntry], ahead_bytes: int) -> None:
        """Undo one `hold`, and go on to read ahead into the room that this leaves."""
        self._access.unpin_all(entries, lambda: self._resident_set.read_cycle_ahead(upcoming, ahead_bytes))

    def zero(self, entry: TensorEntry) -> None:
        """Fill a runtime tensor that is stored as it is with zeros.

        Raises:
            MemoryBudgetExceeded: it left meanwhile, and does not fit beside what is pinned.
        """
        with self.writing(entry):
            alias_memory(entry.address, entry.n_bytes).zero_()

    def mark_dirty(self, entry: TensorEntry) -> None:
        """Note that a pinned tensor was written to: its source no longer holds it."""
        self._access.mark_dirty(entry)

    def check(self) -> None:
        """Assert that counters, pages, frames and the swap file agree; at any time, from any thread."""
        with self._lock:
            complete = not self._tensors.adding
            check(self._tensors.all(), self.frames, self._mover, self._swap, complete=complete)

    @contextmanager
    def writing(self, entry: TensorEntry) -> Iterator[None]:
        """Have a whole tensor in memory, to be written to in a block.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what is pinned.
        """
        with shield:
            self.pin(entry)
            try:
                yield
            finally:
                self.mark_dirty(entry)  # also what was written halfway
                self.unpin(entry)

    # --- end --------------------------------------------------------------------------------------------------------

    def close(self) -> bool:
        """Stop the I/O threads, release all memory, remove the swap file. Managed tensors are unusable afterwards.

        Returns:
            Whether all memory was released now: not where views of managed tensors are still alive.
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
            self.frames.set_limit(0)  # also for what views release later
        self._swap.close()
        return all(page.state is PageState.FREED for entry in entries for page in entry.pages)
