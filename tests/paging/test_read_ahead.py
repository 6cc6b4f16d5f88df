"""Reads ahead of the first use."""

import time

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations import UnknownTensorError
from qwen3_vl_memory_optimizations.paging import PageState
from tests.paging.weights import COLUMNS, FRAMES_BYTES, ROWS, random_weights, register, run_pass, settle


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
