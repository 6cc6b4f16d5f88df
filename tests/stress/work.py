"""What a thread of the stress test does: random operations, each checked at once where that is possible."""

from __future__ import annotations

import contextlib
import gc
import random
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations import MemoryBudgetExceeded, MemoryOptimizer, StorageError, UnknownTensorError
from qwen3_vl_memory_optimizations.cache import CacheItem
from qwen3_vl_memory_optimizations.optimizer import TENSOR_KINDS
from qwen3_vl_memory_optimizations.paging import Block, BlockSpace, ManagedTensor
from qwen3_vl_memory_optimizations.paging.budget.ledger import PROCESS, TENSORS
from tests.paging.weights import COLUMNS
from tests.stress.contents import content, digest

KIB = 2**10
SIZES = (0, 100, 5 * KIB, 20 * KIB, 20 * KIB, 40 * KIB, 120 * KIB, 600 * KIB)
MOST_OWN = 6
CACHED_KEYS = 40
REFUSALS = (MemoryBudgetExceeded, StorageError)


class Own:
    """A tensor of one thread, the seed of what it holds, and views of it with their addresses."""

    def __init__(self, tensor: ManagedTensor, n_bytes: int) -> None:
        self.tensor: ManagedTensor | None = tensor
        self.entry, self.pool_kind, self.n_bytes = tensor.entry, tensor.kind, n_bytes
        self.seed: int | None = None  # zeros
        self.views: list[tuple[torch.Tensor, int]] = []

    def expected(self) -> str:
        """Return the digest of what it should hold."""
        zeros = torch.zeros(self.n_bytes, dtype=torch.uint8)
        return digest(zeros if self.seed is None else content(self.seed, self.n_bytes))


class Worker:
    """One thread.

    Attributes:
        own: its tensors.
        ledger: what it has debited, by account.
        others: all of them, this one too.
        failures: what was not as it should be.
    """

    def __init__(
        self,
        number: int,
        seed: int,
        optimizer: MemoryOptimizer,
        managed: dict[str, ManagedTensor],
        weights: dict[str, torch.Tensor],
    ) -> None:
        self.number, self.optimizer, self.managed, self.weights = number, optimizer, managed, weights
        self.pager = optimizer.pager
        self.random = random.Random(1000 * seed + number)
        self.own: list[Own] = []
        self.space = BlockSpace(optimizer.pager)
        self.blocks: list[tuple[Block, int]] = []
        self.pinned: list[Own] = []
        self.ledger: dict[str, int] = {}
        self.others: list[Worker] = []
        self.failures: list[object] = []
        self.refused = self.done = 0
        self.operations: list[Callable[[], None]] = [
            self.linear, self.linear, self.a_pass, self.embed, self.view_weight,
            self.allocate, self.allocate, self.allocate, self.write, self.write, self.read, self.read,
            self.view, self.write_view, self.drop_view, self.let_go, self.let_go, self.let_go,
            self.pin, self.unpin, self.unpin, self.record, self.migrate_for_compute,
            self.add_block, self.scan_blocks, self.write_block, self.drop_block,
            self.swap_ahead, self.bring, self.migrate, self.send_out, self.collect, self.session,
            self.cache_put, self.cache_get, self.cache_compute, self.cache_room,
            self.reserve, self.debit, self.trim, self.figures, self.cycle, self.check,
        ]  # fmt: skip

    def step(self) -> None:
        """Do one thing at random. Refusals must be errors of the library, and leave everything as it was."""
        operation = self.random.choice(self.operations)
        try:
            operation()
            self.done += 1
        except REFUSALS:
            self.refused += 1
        except BaseException:
            self.failures.append(f"thread {self.number}, {operation.__name__}: {traceback.format_exc()}")

    def expect(self, what: str, found: object, expected: object) -> None:
        if found != expected:
            self.failures.append(f"thread {self.number}, {what}: {found} instead of {expected}")

    # --- weights ------------------------------------------------------------------------------------------------------

    def linear(self, name: str | None = None) -> None:
        name = name or self.random.choice(list(self.managed))
        x = torch.full((1, COLUMNS), 1.0 + self.number).bfloat16()
        torch.testing.assert_close(F.linear(x, self.managed[name]), F.linear(x, self.weights[name]))

    def a_pass(self) -> None:
        for name in [f"w{number}" for number in range(0, 8, 2)]:
            self.linear(name)

    def embed(self) -> None:
        rows = torch.tensor([self.random.randrange(256) for _ in range(3)])
        self.expect("embedding", digest(F.embedding(rows, self.managed["table"])), digest(self.weights["table"][rows]))

    def view_weight(self) -> None:
        name = self.random.choice(list(self.managed))
        view = self.managed[name].view(-1)
        self.expect(f"view of {name}", digest(view), digest(self.weights[name]))

    # --- runtime tensors ----------------------------------------------------------------------------------------------

    def one(self) -> Own | None:
        alive = [own for own in self.own if own.tensor is not None]
        return self.random.choice(alive) if alive else None

    def new_seed(self) -> int:
        return self.random.getrandbits(40)

    def allocate(self) -> None:
        if len(self.own) >= MOST_OWN:
            return self.let_go()
        n_bytes, kind = self.random.choice(SIZES), self.random.choice(TENSOR_KINDS)
        self.own.append(Own(self.optimizer.allocate_tensor((n_bytes,), torch.uint8, kind), n_bytes))

    def write(self) -> None:
        own = self.one()
        if own is not None:
            seed = self.new_seed()
            own.tensor.copy_(content(seed, own.n_bytes))  # it raises, or it is written
            own.seed = seed

    def read(self) -> None:
        own = self.one()
        if own is not None:
            self.expect(own.entry.tensor_id, digest(own.tensor.clone()), own.expected())

    def view(self) -> None:
        own = self.one()
        if own is not None:
            view = own.tensor.view(-1)
            own.views.append((view, view.data_ptr()))

    def write_view(self) -> None:
        viewed = [own for own in self.own if own.views]
        if viewed:
            own, seed = self.random.choice(viewed), self.new_seed()
            own.views[-1][0].copy_(content(seed, own.n_bytes))
            own.seed = seed

    def drop_view(self) -> None:
        viewed = [own for own in self.own if own.views]
        if viewed:
            own = self.random.choice(viewed)
            self.check_views(own)
            own.views.pop()
            if not own.views and own.tensor is None:
                self.own.remove(own)

    def check_views(self, own: Own) -> None:
        """A view pins: its address stays, and so does what it shows."""
        for view, address in own.views:
            self.expect(f"address of a view of {own.entry.tensor_id}", view.data_ptr(), address)
            self.expect(f"view of {own.entry.tensor_id}", digest(view), own.expected())

    def let_go(self) -> None:
        own = self.one()
        if own is not None and all(own is not each for each in self.pinned):
            own.tensor = None
            if not own.views:
                self.own.remove(own)

    def pin(self) -> None:
        own = self.one()
        if own is not None and len(self.pinned) < 2:
            self.pager.pin(own.entry)
            self.pinned.append(own)

    def unpin(self) -> None:
        if self.pinned:
            own = self.pinned.pop(self.random.randrange(len(self.pinned)))
            self.check_pinned(own)
            self.pager.unpin(own.entry)

    def check_pinned(self, own: Own) -> None:
        raw = own.entry.lease()[0]
        self.expect(f"pinned {own.entry.tensor_id}", digest(raw), own.expected())
        self.expect(f"pages of pinned {own.entry.tensor_id}", own.entry.missing, 0)

    def record(self) -> None:
        own = self.one()
        if own is not None:
            self.optimizer.record_tensor_access(own.entry.tensor_id)
        with contextlib.suppress(UnknownTensorError):
            self.optimizer.record_tensor_access(f"nobody-{self.random.randrange(100)}")
            self.failures.append("an unknown id was recorded")

    def migrate_for_compute(self) -> None:
        own = self.one()
        if own is not None:
            plain = self.optimizer.migrate_for_compute(own.tensor)
            self.expect(own.entry.tensor_id, digest(plain), own.expected())

    # --- blocks of a cycle --------------------------------------------------------------------------------------------

    def add_block(self) -> None:
        if len(self.blocks) >= 4:
            return self.drop_block()
        block, seed = self.space.allocate(self.random.choice((3000, 40 * KIB))), self.new_seed()
        with self.space.held([block]):
            block.data.copy_(content(seed, block.n_bytes))
            self.space.written(block)
        self.blocks.append((block, seed))

    def scan_blocks(self) -> None:
        for number, (block, seed) in enumerate(self.blocks):
            upcoming = [each for each, _ in self.blocks[number + 1 :] + self.blocks[:number]]
            with self.space.held([block], upcoming):
                self.expect("block", digest(block.data), digest(content(seed, block.n_bytes)))

    def write_block(self) -> None:
        if self.blocks:
            index, seed = self.random.randrange(len(self.blocks)), self.new_seed()
            block = self.blocks[index][0]
            with self.space.held([block]):
                block.data.copy_(content(seed, block.n_bytes))
                self.space.written(block)
                self.blocks[index] = (block, seed)

    def drop_block(self) -> None:
        if self.blocks:
            self.blocks.pop(self.random.randrange(len(self.blocks)))

    # --- policies -----------------------------------------------------------------------------------------------------

    def swap_ahead(self) -> None:
        self.pager.runtime.swap_ahead(self.random.choice((0.0, 0.3, 0.8)))

    def bring(self) -> None:
        self.pager.runtime.bring([*self.pager.runtime.swapped_out()[:3], "nobody"])

    def migrate(self) -> None:
        self.optimizer.tiering.migrate(self.pager)

    def send_out(self) -> None:
        own = self.one()
        if own is not None:
            self.pager.runtime.send_out(own.entry.tensor_id)

    def collect(self) -> None:
        self.optimizer.collector.look()

    def session(self) -> None:
        with self.optimizer.inference_session():
            self.read()

    # --- cache --------------------------------------------------------------------------------------------------------

    def item(self, number: int) -> CacheItem:
        return CacheItem({"x": content(number, (number % 5 + 1) * 8 * KIB)}, {"number": number})

    def check_item(self, number: int, item: CacheItem) -> None:
        self.expect(f"cached {number}", digest(item.tensors["x"]), digest(self.item(number).tensors["x"]))

    def cache_put(self) -> None:
        number = self.random.randrange(CACHED_KEYS)
        self.optimizer.cache.put(f"{number:064x}", self.item(number), saved_s=self.random.random())

    def cache_get(self) -> None:
        number = self.random.randrange(CACHED_KEYS)
        item = self.optimizer.cache.get(f"{number:064x}", compute_s=10.0, copy=self.random.random() < 0.5)
        if item is not None:
            self.check_item(number, item)

    def cache_compute(self) -> None:
        numbers = [self.random.randrange(CACHED_KEYS) for _ in range(3)]
        keys = [f"{number:064x}" for number in numbers]
        items = self.optimizer.cache.resolve(
            keys, lambda missing: [self.item(numbers[each]) for each in missing], kind="general", units=[1.0] * 3
        )
        for number, item in zip(numbers, items, strict=True):
            self.check_item(number, item)

    def cache_room(self) -> None:
        self.optimizer.cache.make_room(self.random.choice((0, 50 * KIB)))

    # --- budget -------------------------------------------------------------------------------------------------------

    def reserve(self) -> None:
        owner, n_bytes = f"reserved by {self.number}", self.random.choice((0, 8, 16, 64)) * KIB
        self.pager.reserve(owner, n_bytes)
        self.ledger[owner] = n_bytes

    def debit(self) -> None:
        owner, n_bytes = f"debited by {self.number}", self.random.choice((4, 32)) * KIB
        held = self.ledger.get(owner, 0)
        n_bytes = -held if held > 64 * KIB else n_bytes
        self.pager.debit(owner, n_bytes)
        self.ledger[owner] = held + n_bytes

    def trim(self) -> None:
        if self.random.random() < 0.5:
            self.pager.trim()
        else:
            self.pager.compact(0.01)

    def figures(self) -> None:
        self.optimizer.get_memory_efficiency_stats()
        self.optimizer.metrics(measure=False)
        self.pager.page_map()

    def cycle(self) -> None:
        """Leave a tensor and a view of it to the collector of Python."""
        held: list[Any] = [self.optimizer.allocate_tensor((4 * KIB,), torch.uint8)]
        held += [held[0].view(-1), held]
        del held
        if self.random.random() < 0.2:
            gc.collect()

    def check(self) -> None:
        self.pager.check()

    # --- end ----------------------------------------------------------------------------------------------------------

    def check_all(self) -> None:
        """Check all that this thread has."""
        for own in self.own:
            self.check_views(own)
            if own.tensor is not None:
                self.check_digest(own.entry.tensor_id, lambda own=own: digest(own.tensor.clone()), own.expected())
        for own in self.pinned:
            self.check_pinned(own)
        for block, seed in self.blocks:
            expected = digest(content(seed, block.n_bytes))
            self.check_digest("block", lambda block=block: self.read_block(block), expected)

    def check_digest(self, what: str, read: Callable[[], str], expected: str) -> None:
        """Compare what a read gives, which is repeated when it fails; what others pin may leave no room for it."""
        for _ in range(60):
            try:
                return self.expect(what, read(), expected)
            except StorageError as error:
                failed: Exception = error
            except MemoryBudgetExceeded as error:
                failed = error
                if any(worker.views_or_pins() for worker in self.others):
                    return None
        raise failed

    def views_or_pins(self) -> bool:
        """Whether it has something that cannot leave memory."""
        return bool(self.pinned) or any(own.views for own in self.own)

    def read_block(self, block: Block) -> str:
        with self.space.held([block]):
            return digest(block.data)

    def unpin_all(self) -> None:
        """Let go of what cannot leave memory."""
        while self.pinned:
            self.unpin()
        for own in self.own:
            self.check_views(own)
            own.views.clear()
        self.own = [own for own in self.own if own.tensor is not None]

    def drop_all(self) -> None:
        """Let everything go."""
        self.own.clear()
        self.blocks.clear()
        for owner, n_bytes in self.ledger.items():
            scope = PROCESS if owner.startswith("reserved") else TENSORS
            self.pager.debit(owner, -n_bytes, scope)
        self.ledger.clear()
