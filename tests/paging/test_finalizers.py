"""The collector may free tensors and views at any moment, also in the midst of what the Pager does."""

import gc
import threading

import pytest
import torch

from tests.paging.weights import settle

MIB = 2**20


class Cycle:
    """Holds something until the collector finds it."""

    def __init__(self, held):
        self.held, self.itself = held, self


@pytest.fixture(autouse=True)
def collect_by_hand():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def collect_before(monkeypatch, owner, name):
    """Let the collector run at the start of each call of a method."""
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: (gc.collect(), real(*args, **kwargs))[1])


def run_with_a_deadline(action):
    """Return what `action` returns; fail where it waits for good."""
    results = []
    thread = threading.Thread(target=lambda: results.append(action()), daemon=True)
    thread.start()
    thread.join(5)
    assert results, "it waits for itself, or failed"
    return results[0]


def check(pager):
    """Compare the counts with what they count."""
    settle(pager)
    pages = [page for entry in pager.entries.values() for page in entry.pages]
    assert pager.frames.used_bytes == sum(page.n_bytes for page in pages if page.resident)
    assert all(entry.missing == sum(not page.resident for page in entry.pages) for entry in pager.entries.values())
    assert all(page.pins == 0 for page in pages)


class PagesThatCollect(list):
    def __iter__(self):
        gc.collect()
        return super().__iter__()


@pytest.mark.parametrize("use", ["allocate", "usage"])
def test_a_tensor_is_collected_while_the_tensors_are_walked(make_optimizer, use):
    optimizer = make_optimizer(4 * MIB)
    tensors = [optimizer.allocate_tensor((4096,), torch.uint8) for _ in range(3)]
    entry = tensors[0].entry
    entry.pages = PagesThatCollect(entry.pages)
    Cycle(optimizer.allocate_tensor((4096,), torch.uint8))
    if use == "usage":
        assert len(optimizer.pager.usage()) in (3, 4)
    else:
        assert optimizer.allocate_tensor((4 * MIB,), torch.uint8).count_nonzero() == 0
    assert len(optimizer.pager.usage()) == 3
    check(optimizer.pager)


@pytest.mark.parametrize("moment", ["announce", "load", "evict", "_set_state", "touch"])
def test_a_view_and_a_tensor_are_collected_while_a_page_moves(make_optimizer, monkeypatch, moment):
    optimizer = make_optimizer(4 * MIB)
    tensors = [optimizer.allocate_tensor((MIB,), torch.uint8).fill_(value) for value in range(1, 7)]
    Cycle(tensors[0].view(-1))
    Cycle(optimizer.allocate_tensor((MIB,), torch.uint8))
    collect_before(monkeypatch, optimizer.pager._mover, moment)
    for _ in range(2):
        assert [int(tensor.max()) for tensor in tensors] == list(range(1, 7))
    check(optimizer.pager)


def swapped_out_and_unreachable(optimizer):
    tensor = optimizer.allocate_tensor((MIB,), torch.uint8)
    with optimizer.pager._lock:
        optimizer.pager._mover.evict(tensor.entry.pages[0])
    settle(optimizer.pager)
    assert tensor.tier == "ssd"
    Cycle(tensor)


def test_a_tensor_is_collected_while_an_extent_is_taken(make_optimizer, monkeypatch):
    optimizer = make_optimizer(MIB)
    swapped_out_and_unreachable(optimizer)
    other = optimizer.allocate_tensor((MIB,), torch.uint8)
    collect_before(monkeypatch, optimizer.pager._swap._extents, "allocate")
    another = run_with_a_deadline(lambda: optimizer.allocate_tensor((MIB,), torch.uint8))
    assert (other.tier, another.tier) == ("ssd", "cpu")
    check(optimizer.pager)
    optimizer.pager.trim()
    assert optimizer.pager.swap_used_bytes == MIB, "the extent of the one that was collected is free"


def test_a_tensor_is_collected_in_a_thread_that_reads_the_swap_file(make_optimizer, monkeypatch):
    optimizer = make_optimizer(2 * MIB)
    tensor = optimizer.allocate_tensor((MIB,), torch.uint8).fill_(5)
    with optimizer.pager._lock:
        optimizer.pager._mover.evict(tensor.entry.pages[0])
    swapped_out_and_unreachable(optimizer)
    collect_before(monkeypatch, optimizer.pager._swap._extents, "size_of")
    assert run_with_a_deadline(lambda: int(tensor.max())) == 5
    check(optimizer.pager)
    assert len(optimizer.pager.entries) == 1


class HolesThatCollect(dict):
    def items(self):
        for hole in super().items():
            gc.collect()
            yield hole


def test_a_tensor_is_collected_while_an_address_is_looked_for(make_optimizer):
    optimizer = make_optimizer(4 * MIB)
    Cycle(optimizer.allocate_tensor((4096,), torch.uint8))
    other = optimizer.allocate_tensor((4096,), torch.uint8)
    blocks = optimizer.pool.pools["general"]._blocks
    blocks._holes = HolesThatCollect(blocks._holes)
    optimizer.allocate_tensor((4096,), torch.uint8)
    assert other.count_nonzero() == 0
    assert optimizer.pool.stats()["general"]["used_bytes"] == 4096


def test_what_a_finalizer_left_is_there_for_whoever_needs_it(make_optimizer):
    optimizer = make_optimizer(2 * MIB)
    tensor = optimizer.allocate_tensor((2 * MIB,), torch.uint8)
    view = tensor.view(-1)
    with optimizer.pager._lock:
        del view, tensor
        assert optimizer.pager.frames.used_bytes == 2 * MIB, "nothing changes under the lock"
    optimizer.allocate_tensor((2 * MIB,), torch.uint8)
    assert optimizer.pager.stats.swap_writes == 0


def test_a_finalizer_does_not_wait_for_a_thread_that_holds_the_lock(make_optimizer):
    optimizer = make_optimizer(2 * MIB)
    held = [optimizer.allocate_tensor((2 * MIB,), torch.uint8)]
    with optimizer.pager._lock:
        run_with_a_deadline(lambda: held.clear() or True)
    optimizer.allocate_tensor((2 * MIB,), torch.uint8)
    assert optimizer.pager.stats.swap_writes == 0
