"""What the SSD does to managed tensors: a failed read or write is an error of ours, and nothing is lost."""

import os

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations import CorruptDataError, InsufficientDiskSpaceError, ShortIOError, StorageError
from qwen3_vl_memory_optimizations.storage import SwapFile
from tests.paging.weights import COLUMNS, FRAMES_BYTES, ROWS, random_weights, register, settle, state

MIB = 2**20


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


@pytest.mark.parametrize("step", ["_set_state", "_on_end"])
def test_a_failure_in_the_end_of_a_read_reaches_whoever_waits(make_optimizer, tmp_path, monkeypatch, caplog, step):
    weights = random_weights(2)
    optimizer = make_optimizer(4 * FRAMES_BYTES)
    managed = register(optimizer.pager, weights, tmp_path / "w.safetensors")
    mover, x = optimizer.pager._mover, torch.ones(1, COLUMNS).bfloat16()
    original = getattr(mover, step)

    def fail(*arguments):
        if step == "_on_end" or arguments[1].value == "resident":
            raise ZeroDivisionError("lost count")
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mover, step, fail)
        if step == "_set_state":
            with pytest.raises(ZeroDivisionError, match="lost count"):
                F.linear(x, managed["w0"])
        else:
            assert torch.equal(F.linear(x, managed["w0"]), F.linear(x, weights["w0"])), "the page is there"
        settle(optimizer.pager)
    assert mover.failures >= 1 and "could not record the end of a read" in caplog.text
    assert torch.equal(F.linear(x, managed["w0"]), F.linear(x, weights["w0"]))
    settle(optimizer.pager)
    optimizer.pager.check()


def test_a_failure_in_the_end_of_a_write_reaches_whoever_needs_the_room(make_optimizer, monkeypatch):
    optimizer = make_optimizer(2 * MIB)
    tensors = [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(2)]
    tensors[0].fill_(1)
    mover = optimizer.pager._mover
    original = mover._set_state

    def fail(page, state):
        if state.value == "swapped":
            raise ZeroDivisionError("lost count")
        original(page, state)

    with monkeypatch.context() as patch:
        patch.setattr(mover, "_set_state", fail)
        with pytest.raises(ZeroDivisionError, match="lost count"):
            optimizer.allocate_tensor((MIB,), torch.uint8)
        settle(optimizer.pager)
    assert mover.failures >= 1
    assert [int(tensor.max()) for tensor in tensors] == [1, 0]
    optimizer.pager.check()
