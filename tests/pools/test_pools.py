import ctypes
import errno
import random
import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from qwen3_vl_memory_optimizations import AdvancedMemoryPool, MemoryBudgetExceeded, TensorFreedError
from qwen3_vl_memory_optimizations.errors import MemoryOptimizationError
from qwen3_vl_memory_optimizations.pools import (
    FRAME_BYTES,
    UNIT_BYTES,
    FramePool,
    RangeAllocator,
    reserve,
    unreserve,
    virtual,
)
from qwen3_vl_memory_optimizations.pools.frames import round_up, units_of
from qwen3_vl_memory_optimizations.pools.virtual import can_move_frames, discard, move_frames
from qwen3_vl_memory_optimizations.process import rss_bytes

MIB = 2**20
needs_moves = pytest.mark.skipif(not can_move_frames(), reason="this kernel cannot move page frames")


@pytest.fixture
def space():
    base = reserve(256 * MIB)
    yield base
    unreserve(base, 256 * MIB)


def fill(address, n_bytes, value):
    ctypes.memset(address, value, n_bytes)


def holds(address, n_bytes, value):
    return ctypes.string_at(address, n_bytes) == bytes([value]) * n_bytes


# --- page frames ------------------------------------------------------------------------------------------------------


@needs_moves
def test_moving_frames_keeps_their_contents_and_leaves_the_source_empty_and_usable(space):
    fill(space, UNIT_BYTES, 7)
    move_frames(space, space + UNIT_BYTES, UNIT_BYTES)
    assert holds(space + UNIT_BYTES, UNIT_BYTES, 7)
    assert holds(space, UNIT_BYTES, 0)
    fill(space, UNIT_BYTES, 9)
    assert holds(space + UNIT_BYTES, UNIT_BYTES, 7)


def test_moving_what_is_not_reserved_is_an_error_with_the_reason():
    with pytest.raises(MemoryOptimizationError, match=r"mremap of 4.1 kB \(4096 bytes\) of address space failed"):
        move_frames(FRAME_BYTES, 2 * FRAME_BYTES, FRAME_BYTES)


def test_discarded_memory_reads_as_zeros(space):
    fill(space, 2 * FRAME_BYTES, 7)
    discard(space, FRAME_BYTES)
    assert holds(space, FRAME_BYTES, 0)
    assert holds(space + FRAME_BYTES, FRAME_BYTES, 7)


@needs_moves
def test_freed_frames_serve_another_address_without_growing(space):
    pool = FramePool(4 * UNIT_BYTES)
    pool.back(space, 3 * UNIT_BYTES, owner="a")
    fill(space, 3 * UNIT_BYTES, 7)
    pool.release(space, 3 * UNIT_BYTES)
    assert (pool.used_bytes, pool.free_bytes, pool.committed_bytes) == (0, 3 * UNIT_BYTES, 3 * UNIT_BYTES)
    pool.back(space + 16 * MIB, 2 * UNIT_BYTES, owner="b")
    assert (pool.used_bytes, pool.free_bytes, pool.reused_bytes) == (2 * UNIT_BYTES, UNIT_BYTES, 2 * UNIT_BYTES)
    assert holds(space + 16 * MIB, 2 * UNIT_BYTES, 7)  # the frames themselves moved, none was faulted in
    assert pool.available_bytes == 2 * UNIT_BYTES


@pytest.mark.parametrize("reuse", [True, False])
def test_growth_is_foretold(space, reuse):
    pool, rng, backed = FramePool(6 * MIB, reuse=reuse), random.Random(0), []
    grew = set()
    for step in range(200):
        n_bytes = rng.choice([FRAME_BYTES, UNIT_BYTES, MIB, 700 * 1024, 3 * UNIT_BYTES])
        if backed and (n_bytes > pool.available_bytes or rng.random() < 0.4):
            pool.release(*backed.pop(rng.randrange(len(backed))))
        elif n_bytes <= pool.available_bytes:
            before, growth = pool.committed_bytes, pool.growth_bytes(n_bytes)
            pool.back(space + step * MIB, n_bytes, owner="test")
            backed.append((space + step * MIB, n_bytes))
            assert pool.committed_bytes == before + growth
            grew.add((growth > 0) - (growth < 0))
        assert pool.committed_bytes <= pool.high_bytes <= pool.peak_bytes
    assert grew == ({-1, 0, 1} if reuse and can_move_frames() else {1})
    pool.set_limit(MIB)
    assert pool.high_bytes == pool.committed_bytes < pool.peak_bytes


@needs_moves
def test_frames_that_are_still_there_are_not_moved(space):
    pool = FramePool(4 * UNIT_BYTES)
    pool.back(space, 2 * UNIT_BYTES, owner="a")
    fill(space, 2 * UNIT_BYTES, 3)
    pool.release(space, 2 * UNIT_BYTES)
    pool.back(space, 2 * UNIT_BYTES, owner="a")
    assert holds(space, 2 * UNIT_BYTES, 3)
    assert pool.reused_bytes == 2 * UNIT_BYTES


def test_over_the_limit_nothing_changes_and_the_error_has_the_numbers(space):
    pool = FramePool(4 * UNIT_BYTES + 100)
    pool.back(space, 3 * UNIT_BYTES, owner="a")
    before = (pool.used_bytes, pool.free_bytes, pool.peak_bytes)
    with pytest.raises(MemoryBudgetExceeded) as caught:
        pool.back(space + 16 * MIB, 2 * UNIT_BYTES, owner="b")
    error = caught.value
    assert (error.requested_bytes, error.available_bytes, error.budget_bytes, error.owner) == (
        2 * UNIT_BYTES,
        UNIT_BYTES,
        4 * UNIT_BYTES,
        "b",
    )
    assert (pool.used_bytes, pool.free_bytes, pool.peak_bytes) == before


@pytest.mark.parametrize("reuse", [True, False])
def test_memory_really_goes_back_to_the_system(space, reuse):
    pool = FramePool(128 * MIB, reuse=reuse)
    before = rss_bytes()
    pool.back(space, 64 * MIB, owner="a")
    fill(space, 64 * MIB, 1)
    assert rss_bytes() - before > 60 * MIB
    pool.release(space, 64 * MIB)
    if reuse and can_move_frames():
        assert rss_bytes() - before > 60 * MIB
        assert pool.trim() == 64 * MIB
    assert pool.committed_bytes == 0
    assert rss_bytes() - before < 4 * MIB


def test_a_lower_limit_gives_free_frames_back(space):
    pool = FramePool(8 * UNIT_BYTES)
    pool.back(space, 6 * UNIT_BYTES, owner="a")
    pool.release(space, 4 * UNIT_BYTES)
    pool.set_limit(3 * UNIT_BYTES)
    assert pool.used_bytes == 2 * UNIT_BYTES
    assert pool.committed_bytes <= 3 * UNIT_BYTES


def test_when_frames_cannot_be_moved_any_more_work_goes_on_without(space, monkeypatch, caplog):
    def refuse(*args):
        raise MemoryOptimizationError("out of mappings")

    pool = FramePool(4 * UNIT_BYTES)
    pool._reuse = True
    pool.back(space, 2 * UNIT_BYTES, owner="a")
    pool.release(space, 2 * UNIT_BYTES)
    monkeypatch.setattr("qwen3_vl_memory_optimizations.pools.frames.move_frames", refuse)
    pool.back(space + 16 * MIB, 2 * UNIT_BYTES, owner="b")
    fill(space + 16 * MIB, 2 * UNIT_BYTES, 5)
    assert (pool.used_bytes, pool.free_bytes) == (2 * UNIT_BYTES, 0)
    pool.release(space + 16 * MIB, 2 * UNIT_BYTES)
    assert pool.committed_bytes == 0
    assert len(caplog.records) == 1


class FramePoolMachine(RuleBasedStateMachine):
    """Whatever is backed, released and limited in any order: contents stay, and the limit holds."""

    slot_bytes = 2 * MIB
    backed = Bundle("backed")

    def __init__(self):
        super().__init__()
        self.base = reserve(32 * self.slot_bytes)
        self.pool = FramePool(6 * MIB)
        self.held = {}
        self.next_value = 0

    def teardown(self):
        unreserve(self.base, 32 * self.slot_bytes)

    @rule(target=backed, slot=st.integers(0, 31), frames=st.integers(1, 512))
    def back(self, slot, frames):
        address, n_bytes = self.base + slot * self.slot_bytes, frames * FRAME_BYTES
        if address in self.held:
            return multiple()
        if n_bytes > self.pool.available_bytes:
            with pytest.raises(MemoryBudgetExceeded):
                self.pool.back(address, n_bytes, owner="test")
            return multiple()
        self.pool.forget(address, n_bytes, keep=units_of(address, n_bytes))
        self.pool.back(address, n_bytes, owner="test")
        self.next_value = self.next_value % 250 + 1
        fill(address, n_bytes, self.next_value)
        self.held[address] = (n_bytes, self.next_value)
        return address

    @rule(address=consumes(backed))
    def release(self, address):
        self.pool.release(address, self.held.pop(address)[0])

    @rule()
    def trim(self):
        self.pool.trim()

    @rule(limit_bytes=st.integers(0, 8 * MIB))
    def limit(self, limit_bytes):
        self.pool.set_limit(max(limit_bytes, round_up(self.pool.used_bytes)))

    @invariant()
    def accounts_and_contents_are_right(self):
        assert self.pool.used_bytes == sum(n_bytes for n_bytes, _ in self.held.values())
        assert self.pool.committed_bytes <= self.pool.limit_bytes
        for address, (n_bytes, value) in self.held.items():
            assert holds(address, n_bytes, value)


TestFramePoolMachine = FramePoolMachine.TestCase
TestFramePoolMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("lead_bytes", [-UNIT_BYTES // 2, 0, UNIT_BYTES // 2])
def test_free_frames_that_overlap_a_range_are_forgotten(space, lead_bytes):
    address = space + 4 * MIB
    pool = FramePool(8 * UNIT_BYTES)
    for start in (address, space):
        pool.back(start, UNIT_BYTES, owner="a")
    pool.release(address, UNIT_BYTES)
    pool.release(space, UNIT_BYTES)
    free_bytes = pool.free_bytes
    pool.forget(address + lead_bytes, UNIT_BYTES, keep={address + lead_bytes})
    assert pool.free_bytes == (free_bytes if lead_bytes == 0 else max(0, free_bytes - UNIT_BYTES))
    pool.forget(address + UNIT_BYTES, UNIT_BYTES)
    pool.forget(address - UNIT_BYTES, UNIT_BYTES)
    assert pool.free_bytes >= free_bytes - UNIT_BYTES


# --- blocks -----------------------------------------------------------------------------------------------------------


class BlockMachine(RuleBasedStateMachine):
    blocks = Bundle("blocks")

    def __init__(self):
        super().__init__()
        self.allocator = RangeAllocator(64 * 100 + 63, page_bytes=64)
        self.held = {}

    def free_pages(self):
        taken = {
            page for start, n_bytes in self.held.items() for page in range(start // 64, -(-(start + n_bytes) // 64))
        }
        return [page for page in range(100) if page not in taken]

    def largest_hole(self):
        best = run = 0
        free = set(self.free_pages())
        for page in range(100):
            run = run + 1 if page in free else 0
            best = max(best, run)
        return best * 64

    @rule(target=blocks, n_bytes=st.integers(1, 1500))
    def allocate(self, n_bytes):
        if -(-n_bytes // 64) * 64 > self.largest_hole():
            with pytest.raises(MemoryBudgetExceeded) as caught:
                self.allocator.allocate(n_bytes, owner="test")
            assert caught.value.available_bytes == self.largest_hole()
            return multiple()
        free = set(self.free_pages())
        start = self.allocator.allocate(n_bytes, owner="test")
        assert start % 64 == 0
        assert set(range(start // 64, -(-(start + n_bytes) // 64))) <= free, "overlaps another block"
        self.held[start] = n_bytes
        return start

    @rule(start=consumes(blocks))
    def free(self, start):
        assert self.allocator.free(start) == -(-self.held.pop(start) // 64) * 64

    @invariant()
    def figures_agree_with_the_pages(self):
        assert self.allocator.granted_bytes == 64 * (100 - len(self.free_pages()))
        assert self.allocator.requested_bytes == sum(self.held.values())
        free_bytes = 64 * len(self.free_pages())
        found = self.allocator.external_fragmentation
        assert found is None if not free_bytes else found == pytest.approx(1 - self.largest_hole() / free_bytes)

    def teardown(self):
        for start in list(self.held):
            self.allocator.free(start)
        assert self.allocator.external_fragmentation == 0, "freed blocks did not coalesce"
        assert self.allocator.allocate(64 * 100, owner="test") == 0


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_fragmentation_figures():
    allocator = RangeAllocator(10 * 4096)
    assert allocator.internal_fragmentation is None and allocator.external_fragmentation == 0
    starts = [allocator.allocate(3072, owner="test") for _ in range(10)]
    assert allocator.internal_fragmentation == pytest.approx(0.25)
    assert allocator.external_fragmentation is None
    for start in starts[::2]:
        allocator.free(start)
    assert allocator.external_fragmentation == pytest.approx(0.8)


def test_best_fit_takes_the_smallest_hole_that_fits():
    allocator = RangeAllocator(12 * 4096)
    a, _, c, _ = (allocator.allocate(pages * 4096, owner="test") for pages in (3, 1, 2, 1))
    allocator.free(a)
    allocator.free(c)
    assert allocator.allocate(2 * 4096, owner="test") == c


def test_typed_pools_hand_out_usable_addresses_and_their_figures():
    pools = AdvancedMemoryPool(MIB)
    try:
        assert sorted(pools.pools) == ["general", "kv_cache", "text_embeddings", "vision_features"]
        kv = pools.pools["kv_cache"]
        address = kv.allocate(5000)
        fill(address, 5000, 3)
        assert address % 4096 == 0
        stats = pools.stats()
        assert stats["kv_cache"]["used_bytes"] == 8192 and stats["kv_cache"]["requested_bytes"] == 5000
        assert stats["kv_cache"]["utilization"] == 8192 / MIB
        assert stats["general"]["used_bytes"] == 0
        with pytest.raises(MemoryBudgetExceeded, match="kv_cache"):
            kv.allocate(MIB)
        kv.free(address)
        assert kv.stats()["used_bytes"] == 0 and kv.stats()["allocations"] == 1
        assert kv.allocate(MIB) == address
    finally:
        pools.close()
        pools.close()
    with pytest.raises(TensorFreedError, match="kv_cache"):
        kv.allocate(4096)
    fill(address, MIB, 3)  # its block was not freed yet
    kv.free(address)


@needs_moves
def test_frames_that_nobody_takes_go_back_after_their_residence_time(space):
    now = [0.0]
    pool = FramePool(64 * UNIT_BYTES, timer=lambda: now[0])
    for second in range(4):  # one unit is freed each second
        pool.back(space + second * UNIT_BYTES, UNIT_BYTES, owner="a")
    for second in range(4):
        now[0] = float(second)
        pool.release(space + second * UNIT_BYTES, UNIT_BYTES)
    assert pool.compact(3.5) == 0
    now[0] = 4.0
    assert pool.compact(2.5) == 2 * UNIT_BYTES  # those of the seconds 0 and 1
    assert (pool.free_bytes, pool.compacted_bytes) == (2 * UNIT_BYTES, 2 * UNIT_BYTES)
    assert holds(space, UNIT_BYTES, 0)


@needs_moves
def test_the_frames_that_were_freed_last_are_taken_first_so_that_the_others_age(space):
    now = [0.0]
    pool = FramePool(64 * UNIT_BYTES, timer=lambda: now[0])
    pool.back(space, 4 * UNIT_BYTES, owner="a")
    pool.release(space, 4 * UNIT_BYTES)
    for second in range(1, 6):  # a user of one unit, at changing places
        now[0] = float(second)
        pool.back(space + (8 + second) * UNIT_BYTES, UNIT_BYTES, owner="b")
        pool.release(space + (8 + second) * UNIT_BYTES, UNIT_BYTES)
    assert pool.compact(4.5) == 3 * UNIT_BYTES
    assert pool.free_bytes == UNIT_BYTES


@pytest.mark.parametrize(
    ("overcommit", "most", "n_mappings", "expected"),
    [
        ("2", "65530", 10, "vm.overcommit_memory is 2, and 900 kB of 1000 kB are committed.*vm.overcommit_memory=0"),
        ("0", "100", 99, "99 of at most 100 mappings are in use.*vm.max_map_count=400"),
        ("0", "65530", 10, "vm.max_map_count is 65530, and 10 mappings.*memory_pool_size"),
    ],
)
def test_address_space_that_is_refused_names_what_is_in_the_way(
    monkeypatch, tmp_path, overcommit, most, n_mappings, expected
):
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/sys/vm/overcommit_memory").write_text(overcommit)
    (tmp_path / "proc/sys/vm/max_map_count").write_text(most)
    (tmp_path / "proc/self/maps").write_text("x\n" * n_mappings)
    (tmp_path / "proc/meminfo").write_text("Committed_AS: 900 kB\nCommitLimit: 1000 kB\n")
    limits = virtual._limits
    monkeypatch.setattr(virtual, "_limits", lambda: limits(tmp_path))

    class Libc:
        def mmap(self, *arguments):
            ctypes.set_errno(errno.ENOMEM)
            return virtual._MAP_FAILED

    monkeypatch.setattr(virtual, "_libc", Libc)
    with pytest.raises(MemoryOptimizationError, match=r"mmap of 1.05 MB \(1048576 bytes\).*" + expected):
        virtual.reserve(1 << 20)


LIMITED = """
import resource
from qwen3_vl_memory_optimizations.pools import reserve
resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))
try:
    reserve(1 << 40)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_limit_of_the_address_space_is_named():
    run = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120)
    assert run.stdout.startswith("MemoryOptimizationError mmap of") and "RLIMIT_AS" in run.stdout, run.stderr
