"""Single rows of a tensor, as an embedding looks them up."""

import threading

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations import TensorFreedError
from tests.paging.weights import COLUMNS, register, settle

MIB = 2**20


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
