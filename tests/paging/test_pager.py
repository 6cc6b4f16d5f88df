import gc
import os
import threading
import time

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations import (
    CorruptDataError,
    InsufficientDiskSpaceError,
    MemoryBudgetExceeded,
    ShortIOError,
    StorageError,
    TensorFreedError,
    UnknownTensorError,
)
from qwen3_vl_memory_optimizations.compression import LinearInput, RawCodec
from qwen3_vl_memory_optimizations.paging import PROCESS, Ledger, ManagedTensor, Pager, PageState, TensorEntry
from qwen3_vl_memory_optimizations.pools import reserve
from qwen3_vl_memory_optimizations.process import rss_bytes
from qwen3_vl_memory_optimizations.storage import SwapFile
from tests.paging.weights import COLUMNS, FRAMES_BYTES, ROWS, random_weights, register, settle

MIB = 2**20


def run_pass(managed, x=None):
    """Use every weight once, in order; return the products."""
    x = torch.ones(1, COLUMNS).bfloat16() if x is None else x
    return {name: F.linear(x, weight) for name, weight in managed.items()}


def state(pager):
    """What must not change when something is refused."""
    return (
        pager.frames.used_bytes,
        pager.frames.limit_bytes,
        {owner: n_bytes for owner, n_bytes in pager.ledger.accounts().items() if n_bytes},
        pager.swap_used_bytes,
        {name: [(page.state, page.pins) for page in entry.pages] for name, entry in pager.entries.items()},
    )


# --- weights that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [2, 3, 5, 7])
def test_a_cycle_hits_each_kept_page_and_the_budget_holds(make_optimizer, tmp_path, capacity):
    n_tensors, n_passes, hits_when_warm = 8, 6, 0
    weights = random_weights(n_tensors)
    optimizer = make_optimizer(capacity * FRAMES_BYTES)
    managed = register(optimizer.pager, weights, tmp_path / "w.safetensors")
    x = torch.randn(1, COLUMNS).bfloat16()
    for number in range(n_passes):
        if number == 2:
            hits_when_warm = optimizer.pager.stats.hits
        for name, found in run_pass(managed, x).items():
            assert torch.equal(found, F.linear(x, weights[name])), name
    settle(optimizer.pager)
    stats, frames = optimizer.pager.stats, optimizer.pager.frames
    assert stats.hits - hits_when_warm == (n_passes - 2) * (capacity - 1), "all frames but one hold a kept page"
    assert stats.hits + stats.misses == n_passes * n_tensors
    assert stats.hit_bytes + stats.miss_bytes == n_passes * n_tensors * FRAMES_BYTES
    assert frames.peak_bytes <= frames.limit_bytes <= capacity * FRAMES_BYTES
    assert stats.bytes_written == 0, "clean pages are dropped, not written"


def test_what_fits_is_read_once(make_optimizer, tmp_path):
    optimizer = make_optimizer(8 * FRAMES_BYTES)
    managed = register(optimizer.pager, random_weights(8), tmp_path / "w.safetensors")
    for _ in range(4):
        run_pass(managed)
    stats = optimizer.pager.stats
    assert (stats.hits, stats.misses, stats.evictions) == (24, 8, 0)
    assert 8 * (FRAMES_BYTES - 4096) <= stats.bytes_read <= 8 * (FRAMES_BYTES + 4096)
    assert all(weight.tier == "cpu" for weight in managed.values())
    assert optimizer.get_memory_efficiency_stats()["paging"]["hit_rate"] == 0.75


def test_the_next_weights_are_read_before_they_are_asked_for(make_optimizer, tmp_path):
    optimizer = make_optimizer(4 * FRAMES_BYTES)
    managed = register(optimizer.pager, random_weights(8), tmp_path / "w.safetensors")
    for _ in range(3):
        for weight in managed.values():
            F.linear(torch.ones(1, COLUMNS).bfloat16(), weight)
            settle(optimizer.pager)  # as if the product took longer than the read
    stats = optimizer.pager.stats
    assert stats.prefetches_used >= 0.8 * (stats.misses - 1)
    assert stats.faults < stats.misses / 4, f"{stats.faults} of {stats.misses} misses had to wait"


@pytest.mark.parametrize("n_rows", [1, 7])
def test_a_weight_larger_than_the_memory_is_computed_on_piece_by_piece(make_optimizer, tmp_path, n_rows):
    weights = random_weights(1, rows=16 * 40 + 5)
    optimizer = make_optimizer(200_000)
    managed = register(optimizer.pager, weights, tmp_path / "w.safetensors", rows_per_page=16)
    x, bias = torch.randn(2, n_rows, COLUMNS).bfloat16(), torch.randn(645).bfloat16()
    assert weights["w0"].nbytes > 3 * optimizer.pager.frames.limit_bytes
    for _ in range(2):
        torch.testing.assert_close(F.linear(x, managed["w0"], bias), F.linear(x, weights["w0"], bias))
    assert optimizer.pager.frames.peak_bytes <= 200_000
    assert managed["w0"].tier == "ssd"


def test_a_weight_without_rows(make_optimizer):
    optimizer = make_optimizer(2 * FRAMES_BYTES)
    entry = TensorEntry(
        "empty", "weights", (0, COLUMNS), torch.bfloat16, RawCodec(), reserve(4096), torch.bfloat16, (0, COLUMNS), {},
        rows_per_page=16, page_bytes=16 * COLUMNS * 2,
    )  # fmt: skip
    optimizer.pager.add(entry, resident=True)
    managed = ManagedTensor(optimizer.pager, entry)
    assert F.linear(torch.ones(3, COLUMNS).bfloat16(), managed).shape == (3, 0)
    assert (managed + 1).shape == (0, COLUMNS)


@pytest.mark.parametrize("held_by", ["a view", "a read"])
def test_a_weight_may_be_freed_while_something_holds_it(make_optimizer, tmp_path, monkeypatch, held_by):
    weights = random_weights(3)
    optimizer = make_optimizer(2 * FRAMES_BYTES)
    pager, x = optimizer.pager, torch.ones(1, COLUMNS).bfloat16()
    managed = register(pager, weights, tmp_path / "w.safetensors")
    go, real, view = threading.Event(), pager._mover._transfer_in, None
    if held_by == "a view":
        view = managed["w0"].view(-1)
    else:
        go_on = {"w0": go}  # only the read of this one waits
        monkeypatch.setattr(
            pager._mover,
            "_transfer_in",
            lambda page: (page.entry.tensor_id not in go_on or go_on[page.entry.tensor_id].wait(5), real(page))[1],
        )
        with pager._lock:
            pager._mover.load(managed["w0"].entry.pages[0], 0)
    pager.free("w0")
    for name in ("w1", "w2"):
        assert torch.equal(F.linear(x, managed[name]), F.linear(x, weights[name]))
    assert view is None or torch.equal(view, weights["w0"].view(-1))
    del view
    go.set()
    settle(pager)
    assert managed["w0"].entry.pages[0].state is PageState.FREED
    assert pager.frames.used_bytes == pager._mover.weights_resident_bytes


def test_threads_on_more_weights_than_fit_all_get_right_results(make_optimizer, tmp_path):
    """Two frames for four threads: whoever finds no room waits for the pages others compute on."""
    weights = random_weights(6)
    optimizer = make_optimizer(2 * FRAMES_BYTES)
    managed = register(optimizer.pager, weights, tmp_path / "w.safetensors")
    x = torch.randn(1, COLUMNS).bfloat16()
    exact = {name: F.linear(x, values) for name, values in weights.items()}
    failures, until = [], time.monotonic() + 2

    def work(offset):
        try:
            names = list(managed)[offset:] + list(managed)[:offset]
            while time.monotonic() < until:
                for name in names:
                    if not torch.equal(F.linear(x, managed[name]), exact[name]):
                        failures.append(name)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(offset,), daemon=True) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failures and not any(thread.is_alive() for thread in threads), failures[:3]
    assert optimizer.pager.frames.peak_bytes <= 2 * FRAMES_BYTES
    settle(optimizer.pager)
    assert all(page.pins == 0 for entry in optimizer.pager.entries.values() for page in entry.pages)


def test_a_page_that_came_stays_until_those_who_waited_used_it(make_optimizer, tmp_path, monkeypatch):
    """Others that need room are always faster, and take all that may leave."""
    weights = random_weights(2)
    optimizer = make_optimizer(2 * FRAMES_BYTES)
    pager, reads = optimizer.pager, []
    managed = register(pager, weights, tmp_path / "w.safetensors")
    real = pager._mover._on_end

    def on_end(entry):  # under the lock
        real(entry)
        reads.append(entry.tensor_id)
        if len(reads) < 50:
            for page in pager._residency.victims():
                pager._mover.evict(page)

    monkeypatch.setattr(pager._mover, "_on_end", on_end)
    x = torch.ones(1, COLUMNS).bfloat16()
    assert torch.equal(F.linear(x, managed["w0"]), F.linear(x, weights["w0"]))
    assert reads.count("w0") == 1


def test_threads_that_write_and_swap_get_their_own_values(make_optimizer):
    optimizer = make_optimizer(3 * MIB)
    failures, until = [], time.monotonic() + 2

    def work(number):
        try:
            tensors = [optimizer.allocate_tensor((512, 512), torch.int32) for _ in range(2)]
            for step in range(1000):
                if time.monotonic() > until:
                    return
                for place, tensor in enumerate(tensors):
                    tensor.fill_(100_000 * number + 10 * step + place)
                for place, tensor in enumerate(tensors):
                    low, high = tensor.min().item(), tensor.max().item()
                    if low != high or low != 100_000 * number + 10 * step + place:
                        failures.append((number, step, low, high))
        except MemoryBudgetExceeded:
            pass  # the others had everything pinned at that moment: refused, not wrong
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failures and not any(thread.is_alive() for thread in threads), failures[:3]
    assert optimizer.pager.frames.peak_bytes <= 3 * MIB


# --- failures of the SSD ----------------------------------------------------------------------------------------------


def test_a_damaged_page_is_refused_and_the_others_go_on(make_optimizer, tmp_path):
    path = tmp_path / "w.safetensors"
    weights = random_weights(4)
    optimizer = make_optimizer(2 * FRAMES_BYTES)
    managed = register(optimizer.pager, weights, path, checksums=True)
    raw = bytearray(path.read_bytes())
    position = raw.index(weights["w2"].view(torch.uint8).numpy().tobytes())
    raw[position + 70] ^= 1
    path.write_bytes(raw)
    x = torch.randn(1, COLUMNS).bfloat16()
    for _ in range(3):
        for name in managed:
            if name == "w2":
                with pytest.raises(CorruptDataError, match="w2.*checksum") as caught:
                    F.linear(x, managed[name])
                assert caught.value.path == path
            else:
                assert torch.equal(F.linear(x, managed[name]), F.linear(x, weights[name]))
    raw[position + 70] ^= 1
    path.write_bytes(raw)
    assert torch.equal(F.linear(x, managed["w2"]), F.linear(x, weights["w2"])), "a repaired file is read again"
    settle(optimizer.pager)
    assert optimizer.pager.frames.used_bytes <= 2 * FRAMES_BYTES


def test_a_truncated_file_is_an_error_of_ours_and_takes_no_memory(make_optimizer, tmp_path):
    path = tmp_path / "w.safetensors"
    optimizer = make_optimizer(2 * FRAMES_BYTES)
    managed = register(optimizer.pager, random_weights(3), path)
    os.truncate(path, path.stat().st_size - ROWS * COLUMNS * 2 - 5000)
    for _ in range(2):
        with pytest.raises(ShortIOError, match=str(path)):
            F.linear(torch.ones(1, COLUMNS).bfloat16(), managed["w2"])
    settle(optimizer.pager)
    assert optimizer.pager.frames.used_bytes == 0
    assert F.linear(torch.ones(1, COLUMNS).bfloat16(), managed["w0"]).shape == (1, ROWS)


def test_a_swap_that_cannot_be_written_is_reported_and_loses_nothing(make_optimizer, monkeypatch):
    optimizer = make_optimizer(2 * MIB)
    tensors = [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(2)]
    for value, tensor in enumerate(tensors, start=1):
        tensor.fill_(value)

    def fail(self, offset, address, n_bytes):
        raise StorageError("input/output error", path="swap")

    with monkeypatch.context() as patch:
        patch.setattr(SwapFile, "write", fail)
        before = state(optimizer.pager)
        for _ in range(2):
            with pytest.raises(StorageError, match="input/output"):
                optimizer.allocate_tensor((MIB,), torch.uint8)
            settle(optimizer.pager)
            assert state(optimizer.pager) == before
    third = optimizer.allocate_tensor((MIB,), torch.uint8)
    assert [int(tensor.max()) for tensor in (*tensors, third)] == [1, 2, 0]


def test_a_full_disk_is_reported_and_loses_nothing(make_optimizer, monkeypatch):
    optimizer = make_optimizer(2 * MIB)
    tensors = [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(2)]

    def full(self, n_bytes):
        raise InsufficientDiskSpaceError("full", path="swap", required_bytes=n_bytes, available_bytes=0)

    with monkeypatch.context() as patch:
        patch.setattr(SwapFile, "allocate", full)
        before = state(optimizer.pager)
        with pytest.raises(InsufficientDiskSpaceError):
            optimizer.allocate_tensor((MIB,), torch.uint8)
        assert state(optimizer.pager) == before
    assert [int(tensor.max()) for tensor in tensors] == [0, 0]
    optimizer.allocate_tensor((MIB,), torch.uint8)


@pytest.mark.parametrize("use", ["product", "view"])
def test_a_page_that_cannot_be_compared_is_swapped_out_and_leaves_no_pins(make_optimizer, tmp_path, monkeypatch, use):
    weights = random_weights(1, rows=64 * 6)
    optimizer = make_optimizer(200_000 if use == "product" else 2 * MIB)
    managed = register(optimizer.pager, weights, tmp_path / "w.safetensors", rows_per_page=16)["w0"]
    x = torch.ones(1, COLUMNS).bfloat16()
    expected = F.linear(x, weights["w0"])

    def fail(offset, n_bytes):
        raise ShortIOError("the disk is gone", path=managed.entry.source.file.path)

    F.linear(x, managed)
    if use == "view":
        view = managed.view(-1)
        for page in managed.entry.pages:
            page.kept = False
        monkeypatch.setattr(managed.entry.source.file, "read_bytes", fail)
        del view
    else:
        managed.entry.mark_aliased()
        monkeypatch.setattr(managed.entry.source.file, "read_bytes", fail)
        assert torch.equal(F.linear(x, managed), expected)
    settle(optimizer.pager)
    assert [page.pins for page in managed.entry.pages] == [0] * 24
    assert optimizer.pager.stats.swap_writes > 0
    assert torch.equal(F.linear(x, managed), expected)


def test_a_pin_that_fails_leaves_nothing_of_a_tensor_that_was_freed_meanwhile(make_optimizer, monkeypatch):
    optimizer = make_optimizer(16 * MIB)
    pager, tensor = optimizer.pager, optimizer.allocate_tensor((8 * MIB,), torch.uint8)
    with pager._lock:
        pager._mover.evict(tensor.entry.pages[1])
    settle(pager)

    def fail(self, offset, address, n_bytes):
        pager.free(tensor.tensor_id)
        raise StorageError("input/output error", path="swap")

    monkeypatch.setattr(SwapFile, "read", fail)
    with pytest.raises(StorageError):
        tensor.view(-1)
    assert pager.frames.used_bytes == 0 == pager.swap_used_bytes


# --- the budget -------------------------------------------------------------------------------------------------------


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


# --- rows -------------------------------------------------------------------------------------------------------------


def test_embedding_reads_rows_and_not_the_tensor(make_optimizer, tmp_path):
    table = {"table": torch.randn(4096, COLUMNS).bfloat16()}
    optimizer = make_optimizer(8 * MIB)
    managed = register(optimizer.pager, table, tmp_path / "w.safetensors", rows_per_page=256)["table"]
    indices = torch.tensor([[7, 4095, 7], [0, 300, 2]])
    assert torch.equal(F.embedding(indices, managed), F.embedding(indices, table["table"]))
    assert optimizer.pager.stats.row_bytes_read == 5 * COLUMNS * 2
    assert optimizer.pager.stats.bytes_read == 0 and optimizer.pager.frames.used_bytes < 4096 * 16
    for wrong in (-1, 4096):
        with pytest.raises(IndexError, match=str(wrong)):
            F.embedding(torch.tensor([wrong]), managed)
    managed.decoded()  # resident now
    assert torch.equal(F.embedding(indices, managed), F.embedding(indices, table["table"]))
    assert optimizer.pager.stats.row_bytes_read == 5 * COLUMNS * 2


def test_embedding_of_very_many_rows_loads_pages_within_the_budget(make_optimizer, tmp_path):
    table = {"table": torch.randn(1024, COLUMNS).bfloat16()}
    optimizer = make_optimizer(300_000)
    managed = register(optimizer.pager, table, tmp_path / "w.safetensors", rows_per_page=64)["table"]
    indices = torch.randint(0, 1024, (600,))
    for _ in range(2):
        assert torch.equal(F.embedding(indices, managed), F.embedding(indices, table["table"]))
    settle(optimizer.pager)
    assert optimizer.pager.frames.peak_bytes <= 300_000
    assert optimizer.pager._mover.ahead_bytes == 0, "pages that were used do not count as read ahead"


def test_embedding_sees_what_was_written_and_swapped_out(make_optimizer, tmp_path):
    weights = {name: torch.randn(512, COLUMNS).bfloat16() for name in ("first", "second")}
    optimizer = make_optimizer(800_000)
    managed = register(optimizer.pager, weights, tmp_path / "w.safetensors", rows_per_page=512)
    managed["first"].fill_(3.0)
    F.linear(torch.ones(1, COLUMNS).bfloat16(), managed["second"])
    settle(optimizer.pager)
    with optimizer.pager._lock:
        optimizer.pager._mover.evict(managed["first"].entry.pages[0])
    assert managed["first"].tier == "ssd" and optimizer.pager.stats.swap_writes == 1
    assert F.embedding(torch.tensor([5]), managed["first"]).unique().tolist() == [3.0]


def test_rows_are_read_while_others_have_the_lock(make_optimizer, tmp_path, monkeypatch):
    table = {"table": torch.randn(4096, COLUMNS).bfloat16()}
    optimizer = make_optimizer(8 * MIB)
    managed = register(optimizer.pager, table, tmp_path / "w.safetensors", rows_per_page=256)["table"]
    file, free, real = managed.entry.source.file, [], managed.entry.source.file.read_bytes

    def take_the_lock():
        free.append(optimizer.pager._lock.acquire(blocking=False))
        optimizer.pager._lock.release()

    def read_bytes(*args):
        other = threading.Thread(target=take_the_lock, daemon=True)
        other.start()
        other.join(5)
        return real(*args)

    monkeypatch.setattr(file, "read_bytes", read_bytes)
    indices = torch.tensor([9, 4000])
    assert torch.equal(F.embedding(indices, managed), F.embedding(indices, table["table"]))
    assert free == [True, True]


@pytest.mark.parametrize("then", ["stays", "leaves", "is freed"])
def test_a_row_that_is_written_while_it_is_read_is_not_stale(make_optimizer, tmp_path, monkeypatch, then):
    table = {"table": torch.randn(4096, COLUMNS).bfloat16()}
    optimizer = make_optimizer(8 * MIB)
    pager = optimizer.pager
    managed = register(pager, table, tmp_path / "w.safetensors", rows_per_page=256)["table"]
    file, reads, real = managed.entry.source.file, [], managed.entry.source.file.read_bytes

    def read_bytes(*args):
        raw = real(*args)
        if not reads:
            reads.append(args)
            if then == "is freed":
                pager.free("table")
                return raw
            managed.fill_(3)
            if then == "leaves":
                with pager._lock:
                    for page in managed.entry.pages:
                        pager._mover.evict(page)
                settle(pager)
        return raw

    monkeypatch.setattr(file, "read_bytes", read_bytes)
    if then == "is freed":
        with pytest.raises(TensorFreedError):
            F.embedding(torch.tensor([9, 4000]), managed)
    else:
        assert F.embedding(torch.tensor([9, 4000]), managed).unique().tolist() == [3.0]
    assert len(reads) == 1


# --- the end ----------------------------------------------------------------------------------------------------------


def test_after_close_everything_says_so_and_the_memory_is_back(make_optimizer, tmp_path):
    before = rss_bytes()
    optimizer = make_optimizer(100 * MIB)
    managed = register(optimizer.pager, random_weights(1), tmp_path / "w.safetensors")["w0"]
    tensor = optimizer.allocate_tensor((48 * MIB,), torch.uint8)
    assert rss_bytes() - before > 40 * MIB
    optimizer.close()
    assert rss_bytes() - before < 8 * MIB
    x = torch.ones(1, COLUMNS).bfloat16()
    for use in (
        lambda: F.linear(x, managed),
        lambda: F.embedding(torch.tensor([0]), managed),
        lambda: tensor + 1,
        lambda: optimizer.allocate_tensor((4,)),
        lambda: optimizer.migrate_for_compute(tensor),
    ):
        with pytest.raises(TensorFreedError):
            use()


def test_a_view_outlives_the_optimizer(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    tensor = optimizer.allocate_tensor((2 * MIB,), torch.uint8).fill_(9)
    view = tensor.view(2, -1)
    optimizer.close()
    assert view.unique().tolist() == [9]
    del view, tensor
    assert optimizer.pager.frames.committed_bytes == 0


def test_close_wakes_a_thread_that_waits(make_optimizer, tmp_path, monkeypatch):
    optimizer = make_optimizer(2 * FRAMES_BYTES)
    managed = register(optimizer.pager, random_weights(1), tmp_path / "w.safetensors")["w0"]
    reading, go, ended = threading.Event(), threading.Event(), []
    real = optimizer.pager._mover._transfer_in
    monkeypatch.setattr(optimizer.pager._mover, "_transfer_in", lambda page: (reading.set(), go.wait(5), real(page))[2])

    def use():
        try:
            ended.append(F.linear(torch.ones(1, COLUMNS).bfloat16(), managed))
        except TensorFreedError as error:
            ended.append(error)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    assert reading.wait(5)
    closing = threading.Thread(target=optimizer.close, daemon=True)
    closing.start()
    go.set()
    thread.join(10)
    closing.join(10)
    assert len(ended) == 1 and not thread.is_alive() and not closing.is_alive()


def closes_in_a_thread(optimizer, monkeypatch):
    """Start to close; return the thread once nothing may leave any more."""
    closed, real = threading.Event(), optimizer.pager._mover.close
    monkeypatch.setattr(optimizer.pager._mover, "close", lambda: (closed.set(), real())[1])
    thread = threading.Thread(target=optimizer.close, daemon=True)
    thread.start()
    assert closed.wait(5)
    return thread


def test_close_ends_a_wait_for_room(make_optimizer, monkeypatch):
    optimizer = make_optimizer(4 * MIB)
    tensors = [optimizer.allocate_tensor((2 * MIB,), torch.uint8) for _ in range(2)]
    view, error = tensors[0].view(-1), []
    writing, go, real = threading.Event(), threading.Event(), optimizer.pager._swap.write
    monkeypatch.setattr(optimizer.pager._swap, "write", lambda *args: (writing.set(), go.wait(5), real(*args))[2])
    monkeypatch.setattr(optimizer.pager._room, "check_fits", lambda *args: None)  # as if the view were to go

    def allocate():
        with pytest.raises(TensorFreedError) as caught:
            optimizer.allocate_tensor((4 * MIB,), torch.uint8)
        error.append(caught.value)

    thread = threading.Thread(target=allocate, daemon=True)
    thread.start()
    assert writing.wait(5)
    closing = closes_in_a_thread(optimizer, monkeypatch)
    del view
    go.set()
    thread.join(5)
    closing.join(5)
    assert error and not closing.is_alive()


def test_a_tensor_that_waits_for_its_memory_is_refused_when_closed(make_optimizer, monkeypatch):
    optimizer = make_optimizer(4 * MIB)
    pager, outcome = optimizer.pager, []
    waits, go = threading.Event(), threading.Event()

    def hook(n_bytes):  # it may wait, as making room may
        waits.set()
        while not go.is_set():
            pager._changed.wait(5)

    pager.on_growth = hook

    def allocate():
        try:
            outcome.append(optimizer.allocate_tensor((2 * MIB,), torch.uint8))
        except TensorFreedError as error:
            outcome.append(error)

    thread = threading.Thread(target=allocate, daemon=True)
    thread.start()
    assert waits.wait(5)
    closing = threading.Thread(target=optimizer.close, daemon=True)
    closing.start()
    with pager._changed:
        assert pager._changed.wait_for(lambda: pager._mover.closed, timeout=5)
        go.set()
        pager._changed.notify_all()
    thread.join(5)
    closing.join(5)
    assert isinstance(outcome[0], TensorFreedError) and not closing.is_alive()
    assert not pager.entries and pager.frames.committed_bytes == 0


def test_nothing_is_read_ahead_once_closed(make_optimizer, tmp_path, monkeypatch):
    optimizer = make_optimizer(7 * FRAMES_BYTES)
    managed = register(optimizer.pager, random_weights(20), tmp_path / "w.safetensors")
    F.linear(torch.ones(1, COLUMNS).bfloat16(), managed["w0"])
    settle(optimizer.pager)
    pages = (page for entry in optimizer.pager.entries.values() for page in entry.pages)
    ahead = next(page for page in pages if page.unused and not page.kept)  # its use lets the next one be read
    ranges = optimizer.pager.row_ranges(ahead.entry)
    next(ranges)
    settle(optimizer.pager)
    real = optimizer.pager._mover.close
    monkeypatch.setattr(optimizer.pager._mover, "close", lambda: (real(), list(ranges)))
    assert optimizer.pager.close()
    assert optimizer.pager.frames.used_bytes == 0


def test_states_of_pages(make_optimizer, tmp_path):
    optimizer = make_optimizer(2 * FRAMES_BYTES)
    managed = register(optimizer.pager, random_weights(1), tmp_path / "w.safetensors", rows_per_page=16)["w0"]
    assert len(managed.entry.pages) == 4
    assert {page.state for page in managed.entry.pages} == {PageState.SWAPPED}
    ranges = []
    for start, stop in optimizer.pager.row_ranges(managed.entry):
        ranges.append((start, stop))
        for page in managed.entry.pages[start // 16 : stop // 16]:
            assert page.state is PageState.RESIDENT and page.pins == 1
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])] and ranges[-1][1] == ROWS
    assert all(page.pins == 0 for page in managed.entry.pages)


def test_an_abandoned_product_leaves_no_pins(make_optimizer, tmp_path):
    optimizer = make_optimizer(4 * FRAMES_BYTES)
    managed = register(optimizer.pager, random_weights(1), tmp_path / "w.safetensors")["w0"]
    with pytest.raises(RuntimeError):
        F.linear(torch.ones(1, COLUMNS + 1).bfloat16(), managed)
    assert all(page.pins == 0 for page in managed.entry.pages)


def test_what_is_derived_from_an_input_is_shared_until_the_input_changes(make_optimizer, tmp_path, monkeypatch):
    optimizer = make_optimizer()
    weights = random_weights(2)
    managed = register(optimizer.pager, weights, tmp_path / "w.safetensors")
    made = []
    original = LinearInput.__init__
    monkeypatch.setattr(LinearInput, "__init__", lambda self, x: (made.append(1), original(self, x))[1])
    x = torch.randn(1, COLUMNS).bfloat16()
    for weight in managed.values():
        F.linear(x, weight)
    assert len(made) == 1
    x.add_(1)
    assert torch.equal(F.linear(x, managed["w0"]), F.linear(x, weights["w0"]))
    assert len(made) == 2
    with torch.inference_mode():
        y = x * 2
        F.linear(y, managed["w0"])
        y.add_(1)
        assert torch.equal(F.linear(y, managed["w0"]), F.linear(y, weights["w0"]))
    assert len(made) == 4


def test_reading_time_is_counted_while_reads_are_under_way(make_optimizer, tmp_path):
    optimizer = make_optimizer(3 * FRAMES_BYTES)
    managed = register(optimizer.pager, random_weights(6), tmp_path / "w.safetensors")
    start = time.perf_counter()
    run_pass(managed)
    settle(optimizer.pager)
    assert 0 < optimizer.pager.stats.reading_s <= time.perf_counter() - start
    assert optimizer.get_memory_efficiency_stats()["paging"]["reading_s"] == optimizer.pager.stats.reading_s


def test_the_rest_of_a_weight_is_read_ahead_while_its_first_pages_are_used(make_optimizer, tmp_path):
    """The head of the model is one weight of many pages: they must not be read one by one."""
    weights = random_weights(2, rows=32 * ROWS)
    optimizer = make_optimizer(40 * FRAMES_BYTES)
    managed = register(optimizer.pager, weights, tmp_path / "w.safetensors")
    x, pages = torch.ones(1, COLUMNS).bfloat16(), managed["w1"].entry.pages
    for _ in range(2):
        for _start, stop in optimizer.pager.row_ranges(managed["w1"].entry):
            settle(optimizer.pager)
            assert all(page.state is not PageState.SWAPPED for page in pages[stop // ROWS : stop // ROWS + 1])
    assert torch.equal(F.linear(x, managed["w1"]), F.linear(x, weights["w1"]))


# --- before anybody asks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gently", [False, True])
def test_a_first_pass_finds_what_was_read_ahead(make_optimizer, tmp_path, gently):
    weights = random_weights(8)
    pager = make_optimizer().pager
    managed = register(pager, weights, tmp_path / "w.safetensors", checksums=True)
    order = [f"w{number}" for number in range(2, 8)]
    pager.read_ahead(order, gently=gently)
    pager.read_ahead(order)  # again, and no longer gently
    settle(pager)
    assert {name for name, entry in pager.entries.items() if not entry.missing} == set(order)
    assert pager.stats.bytes_read >= 6 * ROWS * COLUMNS * 2
    before = pager.stats.bytes_read
    x = torch.randn(1, COLUMNS).bfloat16()
    for name in order:
        assert torch.equal(F.linear(x, managed[name]), F.linear(x, weights[name]))
    assert pager.stats.faults == 0 and pager.stats.bytes_read == before
    assert torch.equal(F.linear(x, managed["w0"]), F.linear(x, weights["w0"]))  # and the others come when asked for


def test_what_is_read_ahead_stays_within_the_budget_and_serves_the_first_pass(make_optimizer, tmp_path):
    n_tensors, capacity = 40, 24
    weights = random_weights(n_tensors)
    pager = make_optimizer(capacity * FRAMES_BYTES).pager
    managed = register(pager, weights, tmp_path / "w.safetensors")
    pager.read_ahead(list(weights))
    settle(pager)
    assert capacity - 2 <= sum(not entry.missing for entry in pager.entries.values()) <= capacity
    run_pass(managed)
    settle(pager)
    assert pager.frames.peak_bytes <= capacity * FRAMES_BYTES
    read = pager.stats.bytes_read / (ROWS * COLUMNS * 2)
    assert read <= n_tensors + capacity // 4, "what was read was used, and hardly anything twice"


def test_more_room_is_filled_with_what_was_missing(make_optimizer, tmp_path):
    weights = random_weights(40)
    optimizer = make_optimizer(40 * FRAMES_BYTES)
    pager = optimizer.pager
    register(pager, weights, tmp_path / "w.safetensors")
    pager.reserve("something else", 0)
    pager.ledger.set("something else", 16 * FRAMES_BYTES)
    pager.refit()
    pager.read_ahead(list(weights))
    settle(pager)
    there = {name for name, entry in pager.entries.items() if not entry.missing}
    pager.ledger.set("something else", 8 * FRAMES_BYTES)
    pager.refit()
    pager.read_ahead(list(weights))
    settle(pager)
    more = {name for name, entry in pager.entries.items() if not entry.missing}
    assert there < more and len(more) >= len(there) + 6
    assert pager.stats.bytes_read / (ROWS * COLUMNS * 2) < len(more) + 2


def test_an_unknown_weight_is_not_read_ahead(make_optimizer):
    with pytest.raises(UnknownTensorError):
        make_optimizer().pager.read_ahead(["nobody"])


def test_memory_that_reads_have_yet_to_fill_is_not_touched(make_optimizer, tmp_path):
    pager = make_optimizer().pager
    register(pager, random_weights(4), tmp_path / "w.safetensors")
    with pager._lock:  # the reads cannot end
        pager.read_ahead(["w0", "w1", "w2", "w3"])
        assert pager.frames.committed_bytes >= 4 * ROWS * COLUMNS * 2
        assert pager.touched_bytes == pager.frames.committed_bytes - 4 * pager.entries["w0"].pages[0].n_bytes
    settle(pager)
    assert pager.touched_bytes == pager.frames.committed_bytes
