"""The end of a Pager: everything says so, and the memory is back."""

import threading

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations import TensorFreedError
from qwen3_vl_memory_optimizations.process import rss_bytes
from tests.paging.weights import COLUMNS, FRAMES_BYTES, random_weights, register, settle

MIB = 2**20


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
