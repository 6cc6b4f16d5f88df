"""The budget of the Pager: what is refused, what leaves, what is announced."""

import gc
import threading

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations import MemoryBudgetExceeded, StorageError, UnknownTensorError
from qwen3_vl_memory_optimizations.compression import RawCodec
from qwen3_vl_memory_optimizations.paging import PROCESS, BlockSpace, Ledger, Pager, TensorEntry
from qwen3_vl_memory_optimizations.pools import reserve
from qwen3_vl_memory_optimizations.storage import SwapFile
from tests.paging.weights import COLUMNS, FRAMES_BYTES, random_weights, register, run_pass, settle, state

MIB = 2**20


def test_what_cannot_fit_is_refused_before_anything_changes(make_optimizer):
    optimizer = make_optimizer(4 * MIB)
    tensor = optimizer.allocate_tensor((MIB,), torch.uint8)
    view = tensor.view(-1)  # pinned
    other = optimizer.allocate_tensor((MIB,), torch.uint8)
    before = state(optimizer.pager)
    with pytest.raises(MemoryBudgetExceeded, match="general") as caught:
        optimizer.allocate_tensor((3 * MIB + 1,), torch.uint8)
    error = caught.value
    assert error.requested_bytes == 3 * MIB + 4096
    assert error.available_bytes == 3 * MIB
    assert error.budget_bytes == 4 * MIB
    assert isinstance(error, MemoryError)
    assert state(optimizer.pager) == before
    assert optimizer.pool.stats()["general"]["used_bytes"] == 2 * MIB
    del view
    optimizer.allocate_tensor((4 * MIB,), torch.uint8)
    assert other.tier == "ssd"


def test_only_as_much_is_swapped_out_as_is_needed(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    tensors = [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(8)]
    another = optimizer.allocate_tensor((MIB,), torch.uint8)
    settle(optimizer.pager)
    assert optimizer.pager.stats.swap_writes == 1
    assert [tensor.tier for tensor in (*tensors, another)] == ["ssd"] + ["cpu"] * 8


def test_the_longest_unused_is_swapped_out_first(make_optimizer):
    optimizer = make_optimizer(3 * MIB)
    tensors = [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(3)]
    optimizer.record_tensor_access(tensors[0].tensor_id)
    another = optimizer.allocate_tensor((MIB,), torch.uint8)
    assert [tensor.tier for tensor in (*tensors, another)] == ["cpu", "ssd", "cpu", "cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_swapped_tensors_come_back_bit_by_bit(make_optimizer, dtype):
    optimizer = make_optimizer(6 * MIB)
    tensors, values = [], []
    for _ in range(4):
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (2 * MIB + 8 * 13,), dtype=torch.uint8)
        values.append(raw.view(dtype))
        tensors.append(optimizer.allocate_tensor(values[-1].shape, dtype))
        tensors[-1].copy_(values[-1])
    for _ in range(2):
        for tensor, value in zip(tensors, values, strict=True):
            assert torch.equal(tensor.clone().view(torch.uint8), value.view(torch.uint8))
    stats = optimizer.pager.stats
    assert stats.swap_writes >= 2 and stats.swap_reads >= 2
    assert optimizer.pager.frames.peak_bytes <= 6 * MIB
    written = stats.swap_writes
    for tensor in tensors:
        tensor.sum()
    settle(optimizer.pager)
    assert stats.swap_writes == written, "what has not changed since it was written is not written again"


def test_freeing_returns_memory_addresses_and_swap(make_optimizer):
    optimizer = make_optimizer(4 * MIB)
    tensors = [optimizer.allocate_tensor((3 * MIB,), torch.uint8) for _ in range(2)]
    settle(optimizer.pager)
    assert optimizer.pager.swap_used_bytes == 3 * MIB
    name = tensors[0].tensor_id
    tensors.clear()
    gc.collect()
    assert optimizer.pager.frames.used_bytes == 0
    assert optimizer.pager.swap_used_bytes == 0
    assert optimizer.pool.stats()["general"]["used_bytes"] == 0
    with pytest.raises(UnknownTensorError, match=name) as caught:
        optimizer.record_tensor_access(name)
    assert caught.value.tensor_id == name and isinstance(caught.value, KeyError)


def test_a_refused_reservation_leaves_the_ledger_as_it_was(tmp_path, make_optimizer):
    pager = Pager(Ledger(10 * MIB, None), swap_dir=tmp_path)
    optimizer = make_optimizer()
    optimizer.pager.close()
    optimizer.pager = pager
    tensor = optimizer.allocate_tensor((6 * MIB,), torch.uint8)
    view = tensor.view(-1)
    before = state(pager)
    with pytest.raises(MemoryBudgetExceeded):
        pager.reserve("activations", 5 * MIB)
    assert state(pager) == before
    pager.reserve("activations", 4 * MIB)
    assert pager.frames.limit_bytes == 6 * MIB
    del view
    pager.reserve("activations", 9 * MIB)
    assert (pager.frames.limit_bytes, tensor.tier) == (MIB, "ssd")
    pager.reserve("activations", 0)
    assert pager.frames.limit_bytes == 10 * MIB


@pytest.mark.parametrize("first_fits", [True, False])
def test_a_reservation_made_while_another_waits_holds(tmp_path, make_optimizer, monkeypatch, first_fits):
    pager = Pager(Ledger(10 * MIB, None), swap_dir=tmp_path)
    optimizer = make_optimizer()
    optimizer.pager.close()
    optimizer.pager = pager
    tensors = [optimizer.allocate_tensor((2 * MIB,), torch.uint8) for _ in range(4)]
    view = None if first_fits else tensors[3].view(-1)
    writing, go, real, outcome = threading.Event(), threading.Event(), pager._swap.write, []

    def write(*args):
        writing.set()
        go.wait(5)
        real(*args)

    def reserve():
        try:
            outcome.append(pager.reserve("first", 3 * MIB if first_fits else 9 * MIB))
        except MemoryBudgetExceeded as error:
            outcome.append(error)

    monkeypatch.setattr(pager._swap, "write", write)
    thread = threading.Thread(target=reserve, daemon=True)
    thread.start()
    assert writing.wait(5)
    with pager._lock:  # the first one waits by now; the second one needs nothing to leave
        tensors.pop(2)
        pager._finalizers.run()
        pager.ledger.set("second", MIB, PROCESS)
        go.set()
        if first_fits:
            pager.refit()
    thread.join(5)
    assert outcome[0] is None if first_fits else isinstance(outcome[0], MemoryBudgetExceeded)
    settle(pager)
    assert pager.frames.limit_bytes == (6 * MIB if first_fits else 9 * MIB) >= pager.frames.used_bytes
    del view


def test_the_ledger_keeps_what_weights_need_at_least():
    ledger = Ledger(100, 60)
    ledger.set("process", 30, PROCESS)
    ledger.set("small weights", 20)
    assert ledger.frames_limit_bytes() == 40
    ledger.frames_floor_bytes = 25
    with pytest.raises(MemoryBudgetExceeded) as caught:
        ledger.set("workspace", 20)
    error = caught.value
    assert (error.requested_bytes, error.available_bytes, error.owner) == (20, 15, "workspace")
    assert ledger.accounts() == {"process": 30, "small weights": 20, "workspace": 0}
    ledger.add("workspace", 15)
    assert ledger.frames_limit_bytes() == 25
    assert ledger.held_bytes("workspace") == 15


def test_the_ledger_refuses_more_than_there_is_where_nothing_needs_frames():
    ledger = Ledger(100, None)
    with pytest.raises(MemoryBudgetExceeded) as caught:
        ledger.set("process", 130, PROCESS)
    assert (caught.value.available_bytes, ledger.held_bytes("process")) == (100, 0)


def test_growth_is_announced_before_it_and_reuse_is_not(make_optimizer, tmp_path):
    optimizer = make_optimizer(3 * FRAMES_BYTES)
    pager, grown = optimizer.pager, []
    managed = register(pager, random_weights(8), tmp_path / "w.safetensors")

    def note(n_bytes):
        grown.append((pager.frames.committed_bytes, n_bytes))

    pager.on_growth = note
    for _ in range(4):
        run_pass(managed)
    settle(pager)
    assert grown == [(number * FRAMES_BYTES, FRAMES_BYTES) for number in range(3)], "once for each new frame"
    for others_bytes in (FRAMES_BYTES, 0):
        pager.ledger.set("others", others_bytes)
        pager.refit()
    grown.clear()
    committed = pager.frames.committed_bytes
    for _ in range(3):
        run_pass(managed)
    assert grown == [(n_bytes, FRAMES_BYTES) for n_bytes in range(committed, 3 * FRAMES_BYTES, FRAMES_BYTES)] != []
    settle(pager)
    pager.trim()
    grown.clear()
    managed["w0"].fill_(1)
    assert not grown, "less than it has been"


def test_growth_of_a_tensor_that_is_allocated_is_announced(make_optimizer):
    optimizer = make_optimizer(6 * MIB)
    grown = []
    optimizer.pager.on_growth = grown.append
    tensor = optimizer.allocate_tensor((3 * MIB,), torch.uint8)
    assert sum(grown) == 3 * MIB == optimizer.pager.frames.committed_bytes
    del tensor
    again = optimizer.allocate_tensor((2 * MIB,), torch.uint8)
    assert sum(grown) == 3 * MIB, "frames that another left"
    assert again.count_nonzero() == 0


def test_what_the_hook_reserves_is_room_that_pages_leave(make_optimizer, tmp_path):
    weights = random_weights(6)
    optimizer = make_optimizer(4 * FRAMES_BYTES)
    pager, calls = optimizer.pager, []
    managed = register(pager, weights, tmp_path / "w.safetensors")

    def hook(n_bytes):
        calls.append(n_bytes)
        if len(calls) == 4:  # the last free frame is wanted
            pager.ledger.set("others", 2 * FRAMES_BYTES)
            pager.refit()

    pager.on_growth = hook
    for _ in range(3):
        for name, found in run_pass(managed).items():
            assert torch.equal(found, F.linear(torch.ones(1, COLUMNS).bfloat16(), weights[name])), name
    settle(pager)
    assert pager.frames.limit_bytes == 2 * FRAMES_BYTES >= pager.frames.used_bytes
    assert len(calls) == 4, "what was announced is not announced again"


def test_growth_that_is_refused_is_an_error_where_the_page_is_needed(make_optimizer, tmp_path):
    weights = random_weights(2)
    optimizer = make_optimizer(3 * FRAMES_BYTES)
    pager, refused_ahead = optimizer.pager, []
    managed = register(pager, weights, tmp_path / "w.safetensors")
    x = torch.ones(1, COLUMNS).bfloat16()
    refusal = MemoryBudgetExceeded("no more", requested_bytes=1, available_bytes=0, budget_bytes=0, owner="test")

    def refuse(n_bytes):
        raise refusal

    def refuse_ahead(n_bytes):
        if pager.stats.faults == faults:  # nobody waits yet
            refused_ahead.append(n_bytes)
            raise refusal

    pager.on_growth = refuse
    before = state(pager)
    for use in (lambda: F.linear(x, managed["w0"]), lambda: optimizer.allocate_tensor((FRAMES_BYTES,), torch.uint8)):
        with pytest.raises(MemoryBudgetExceeded, match="no more"):
            use()
        assert state(pager) == before
    faults, pager.on_growth = pager.stats.faults, refuse_ahead
    assert torch.equal(F.linear(x, managed["w0"]), F.linear(x, weights["w0"]))
    assert refused_ahead == [FRAMES_BYTES]
    pager.on_growth = None
    assert torch.equal(F.linear(x, managed["w1"]), F.linear(x, weights["w1"]))


def test_workspace_is_debited(make_optimizer, tmp_path):
    optimizer = make_optimizer(10 * FRAMES_BYTES)
    managed = register(optimizer.pager, random_weights(2), tmp_path / "w.safetensors")
    F.linear(torch.ones(1, COLUMNS), managed["w0"])  # fp32: the rows are cast into scratch memory
    held = optimizer.pager.ledger.held_bytes("workspace")
    assert held == optimizer.pager.scratch.n_bytes > 0
    assert optimizer.pager.frames.limit_bytes <= 10 * FRAMES_BYTES - held


def test_a_tensor_that_was_refused_may_be_added_again(make_optimizer):
    optimizer = make_optimizer(12 * MIB)
    entry = TensorEntry(
        "mine", "general", (8 * MIB,), torch.uint8, RawCodec(), reserve(8 * MIB), torch.uint8, (8 * MIB, 1), {},
        rows_per_page=None, page_bytes=4 * MIB,
    )  # fmt: skip
    refusals = [None, MemoryBudgetExceeded("no", requested_bytes=1, available_bytes=0, budget_bytes=0, owner="test")]

    def refuse(n_bytes):
        if (refusal := refusals.pop(0)) is not None:
            raise refusal

    optimizer.pager.on_growth = refuse
    with pytest.raises(MemoryBudgetExceeded):
        optimizer.pager.add(entry, resident=True)
    assert (entry.missing, optimizer.pager.frames.used_bytes) == (2, 0)
    optimizer.pager.on_growth = None
    optimizer.pager.add(entry, resident=True)
    assert entry.missing == 0


def test_what_the_ssd_has_no_room_for_is_not_counted_as_leaving(make_optimizer, monkeypatch):
    pager = make_optimizer(8 * MIB).pager
    block = BlockSpace(pager).allocate(MIB)

    def full(self, n_bytes):
        raise StorageError("full", path="swap")

    with monkeypatch.context() as patch:
        patch.setattr(SwapFile, "allocate", full)
        assert pager.runtime.swap_ahead(0.0) == 0
    assert pager.runtime.swap_ahead(0.0) == block.n_bytes


def test_weights_that_were_freed_need_no_room(make_optimizer, tmp_path):
    pager = make_optimizer(5 * FRAMES_BYTES).pager
    register(pager, random_weights(1), tmp_path / "small.safetensors")
    register(pager, {"large": torch.zeros(192, COLUMNS).bfloat16()}, tmp_path / "large.safetensors", rows_per_page=192)
    with pytest.raises(MemoryBudgetExceeded, match="that the weights need"):
        pager.debit("something else", 3 * FRAMES_BYTES)
    pager.free("large")
    pager.debit("something else", 3 * FRAMES_BYTES)
    with pytest.raises(MemoryBudgetExceeded, match="that the weights need"):
        pager.debit("something else", 2 * FRAMES_BYTES)
    pager.free("w0")
    pager.debit("something else", 2 * FRAMES_BYTES)
