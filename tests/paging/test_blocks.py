"""Blocks that are used in a cycle: their bytes survive the swap file, count against the budget, and come in time."""

import gc
from pathlib import Path

import pytest
import torch

from qwen3_vl_memory_optimizations import MemoryBudgetExceeded, MemoryConfig, MemoryOptimizer, TensorFreedError
from qwen3_vl_memory_optimizations.errors import CorruptDataError
from qwen3_vl_memory_optimizations.paging import BlockSpace, page_checksums
from qwen3_vl_memory_optimizations.storage import DirectFile
from tests.paging.weights import settle

MIB = 2**20


def make_blocks(space, n_blocks, n_bytes=MIB):
    blocks = []
    for number in range(n_blocks):
        block = space.allocate(n_bytes)
        with space.held([block]):
            block.data.fill_(number + 1)
        blocks.append(block)
    return blocks


def scan(space, blocks):
    """Use the blocks in order, and return what they hold."""
    found = []
    for number, block in enumerate(blocks):
        upcoming = blocks[number + 1 :] + blocks[:number]
        with space.held([block], upcoming):
            assert bool((block.data == block.data[0]).all())
            found.append(int(block.data[0]))
    return found


def test_without_a_pager_blocks_are_plain_memory():
    space = BlockSpace(None)
    blocks = make_blocks(space, 3)
    assert scan(space, blocks) == [1, 2, 3]
    assert not space.moves


def test_more_blocks_than_fit_keep_their_bytes(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    space = BlockSpace(optimizer.pager)
    blocks = make_blocks(space, 24)
    for _ in range(3):
        assert scan(space, blocks) == list(range(1, 25))
    assert optimizer.pager.frames.peak_bytes <= 8 * MIB
    assert optimizer.pager.swap_used_bytes >= 16 * MIB


def test_in_a_cycle_what_fits_stays(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    space = BlockSpace(optimizer.pager)
    blocks = make_blocks(space, 10)
    for _ in range(3):
        scan(space, blocks)
    settle(optimizer.pager)
    before = optimizer.pager.stats.bytes_read
    for _ in range(4):
        scan(space, blocks)
    settle(optimizer.pager)
    # By recency all ten would be read again at each scan.
    assert (optimizer.pager.stats.bytes_read - before) / 4 <= 6 * MIB


def test_blocks_are_read_before_they_are_asked_for(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    space = BlockSpace(optimizer.pager)
    blocks = make_blocks(space, 24)
    scan(space, blocks)
    before = optimizer.pager.stats.prefetches_used
    scan(space, blocks)
    assert optimizer.pager.stats.prefetches_used - before >= 8


def test_a_block_that_is_written_again_is_not_read_from_its_old_copy(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    space = BlockSpace(optimizer.pager)
    blocks = make_blocks(space, 16)
    scan(space, blocks)
    for block in blocks:
        with space.held([block]):
            block.data.fill_(99)
            space.written(block)
    assert scan(space, blocks) == [99] * 16


def test_collected_blocks_give_their_bytes_back_pinned_ones_too(make_optimizer):
    optimizer = make_optimizer(32 * MIB)
    space = BlockSpace(optimizer.pager)
    blocks, pinned = make_blocks(space, 4), space.pinned(space.allocate(3 * MIB))
    assert optimizer.pager.frames.used_bytes == 7 * MIB
    assert pinned.block.n_bytes == 3 * MIB
    del blocks, pinned
    gc.collect()
    optimizer.pager.trim()
    assert optimizer.pager.frames.used_bytes == 0


def test_a_pinned_block_stays_until_it_is_let_go_and_keeps_its_bytes(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    space = BlockSpace(optimizer.pager)
    pinned = space.pinned(space.allocate(MIB))
    pinned.block.data.fill_(77)
    blocks = make_blocks(space, 24)
    assert scan(space, blocks) == list(range(1, 25))
    assert not pinned.block.entry.missing
    assert bool((pinned.block.data == 77).all())
    block = pinned.release()
    space.rest([block], used=False)
    assert scan(space, blocks) == list(range(1, 25))
    again = space.pinned(block)
    assert bool((again.block.data == 77).all())


def test_blocks_in_use_are_refused_where_pinned_ones_leave_no_room(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    space = BlockSpace(optimizer.pager)
    pinned = [space.pinned(space.allocate(2 * MIB)) for _ in range(3)]
    space.require_room(2 * MIB)
    with pytest.raises(MemoryBudgetExceeded, match="kv_cache"):
        space.require_room(3 * MIB)
    del pinned
    gc.collect()
    space.require_room(8 * MIB)


@pytest.mark.parametrize("budget", [None, 8 * MIB])
def test_a_stored_block_is_read_from_its_file_and_checked(make_optimizer, tmp_path, budget):
    space = BlockSpace(make_optimizer(budget).pager)
    source = space.allocate(3 * MIB)
    with space.held([source]):
        source.data.copy_(torch.arange(3 * MIB, dtype=torch.int32).to(torch.uint8))
        sums, expected = page_checksums(source), source.data.clone()
    path = tmp_path / "blocks"
    path.write_bytes(expected.numpy().tobytes() * 2)
    file = DirectFile(path)
    block = space.stored(3 * MIB, file, 3 * MIB, sums)
    with space.held([block]):
        assert torch.equal(block.data, expected)
    wrong = space.stored(3 * MIB, file, 0, (sums[0] ^ 1, *sums[1:]))
    with pytest.raises(CorruptDataError), space.held([wrong]):
        pass


def test_what_does_not_fit_is_refused_with_the_numbers(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    space = BlockSpace(optimizer.pager)
    with pytest.raises(MemoryBudgetExceeded, match="kv_cache") as caught:
        space.allocate(9 * MIB)
    assert caught.value.requested_bytes == 9 * MIB
    assert caught.value.available_bytes == 8 * MIB
    assert optimizer.pager.frames.used_bytes == 0


def test_held_blocks_do_not_leave(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    space = BlockSpace(optimizer.pager)
    blocks = make_blocks(space, 6)
    with space.held(blocks), pytest.raises(MemoryBudgetExceeded):
        space.allocate(3 * MIB)
    assert scan(space, blocks) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("budget", [None, 8 * MIB])
def test_blocks_of_a_closed_optimizer_are_refused(make_optimizer, budget):
    optimizer = make_optimizer(budget)
    space = BlockSpace(optimizer.pager)
    blocks = make_blocks(space, 2)
    optimizer.close()
    with pytest.raises(TensorFreedError, match="closed"), space.held(blocks):
        torch.zeros(1)


def test_blocks_of_keys_and_values_come_from_their_pool_and_reuse_its_frames(make_optimizer):
    optimizer = make_optimizer()
    space, pool = BlockSpace(optimizer.pager), optimizer.pool.pools["kv_cache"]
    blocks = make_blocks(space, 4)
    assert pool.stats()["used_bytes"] == 4 * MIB
    del blocks
    gc.collect()
    optimizer.pager.usage()  # runs what finalizers left
    assert pool.stats()["used_bytes"] == 0 and optimizer.pager.frames.free_bytes == 4 * MIB
    before = optimizer.pager.frames.reused_bytes
    make_blocks(space, 4)
    assert optimizer.pager.frames.reused_bytes - before == 4 * MIB


def test_a_full_pool_does_not_keep_blocks_from_being_made(tmp_path):
    config = MemoryConfig(cache_dir=tmp_path, memory_pool_size=2 * MIB)
    with MemoryOptimizer(memory_config=config) as optimizer:
        space = BlockSpace(optimizer.pager)
        blocks = make_blocks(space, 5)
        assert scan(space, blocks) == [1, 2, 3, 4, 5]
        assert optimizer.pool.pools["kv_cache"].stats()["used_bytes"] == 2 * MIB
        assert optimizer.pager.frames.used_bytes == 5 * MIB


def test_a_pool_lets_its_address_space_go_with_the_last_block(make_optimizer):
    optimizer = make_optimizer()
    space, pool = BlockSpace(optimizer.pager), optimizer.pool.pools["kv_cache"]
    (block,) = make_blocks(space, 1)
    optimizer.close()
    assert int(block.data.sum()) == 0  # the memory is gone, the addresses are still there
    assert pool.stats()["used_bytes"] == MIB
    address = block.data.data_ptr()
    assert is_mapped(address)
    del block
    gc.collect()
    optimizer.pager.usage()  # runs what finalizers left
    assert not is_mapped(address)


def is_mapped(address):
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(stop, 16) for start, stop in ranges)


def test_a_block_that_did_not_fit_leaves_no_frames_without_an_address(make_optimizer):
    pager = make_optimizer(12 * MIB, memory_pool_size=4 * MIB).pager  # the pool has no place for it
    asked = []

    def refuse_the_second(n_bytes):
        asked.append(n_bytes)
        if len(asked) == 2:
            raise MemoryBudgetExceeded("no", requested_bytes=1, available_bytes=0, budget_bytes=0, owner="test")

    pager.on_growth = refuse_the_second
    with pytest.raises(MemoryBudgetExceeded):
        BlockSpace(pager).allocate(8 * MIB)
    assert len(asked) == 2
    assert pager.frames.committed_bytes == 0
