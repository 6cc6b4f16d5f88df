"""What was wrong when threads did everything at once, one by one."""

import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3VLForConditionalGeneration

from qwen3_vl_memory_optimizations import TensorFreedError, create_optimized_model
from qwen3_vl_memory_optimizations.errors import StorageError
from qwen3_vl_memory_optimizations.paging import BlockSpace, ManagedTensor, Pager
from qwen3_vl_memory_optimizations.storage import ContentStore, Index, content_store
from qwen3_vl_memory_optimizations.storage.content_store import StoredEntry
from tests.model import tiny
from tests.model.test_kv_cache import ids, our_cache, run
from tests.paging.weights import FRAMES_BYTES, random_weights, register, settle

MIB = 2**20


@pytest.fixture
def hasty(monkeypatch):
    """What comes into memory leaves at once, as when another thread needs the room."""
    real = Pager.add

    def add(self, entry, *, resident):
        real(self, entry, resident=resident)
        with self._lock:
            for page in entry.pages:
                self._mover.evict(page)
        settle(self)

    monkeypatch.setattr(Pager, "add", add)


def test_a_block_that_left_before_it_was_written_keeps_what_is_written(tmp_path, hasty):
    settings = {"codec": "none", "tensor_budget": 10**8, "cache_dir": tmp_path, "enable_predictive_gc": False}
    model = create_optimized_model(tiny.DIRECTORY, settings)
    pager, tokens, found = model.memory_optimizer.pager, ids(300), []
    for leaves in (False, True):
        cache = our_cache(model, block_tokens=32)
        run(model, tokens, (260,), cache)
        stored = [stored.block.entry for layer in cache.layers for stored in layer.rows[0]]
        assert len(stored) > 20
        with pager._lock:
            for page in (page for entry in stored if leaves for page in entry.pages):
                pager._mover.evict(page)
        settle(pager)
        assert all(bool(entry.missing) == leaves for entry in stored)
        found.append(run(model, tokens[:, 260:], (40,), cache))
    assert torch.equal(*found)
    model.memory_optimizer.close()


def test_a_weight_that_left_before_it_was_written_keeps_what_is_written(tmp_path, hasty):
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(tiny.DIRECTORY, dtype=torch.float32).eval()
    model = create_optimized_model(loaded, {"codec": "none", "tensor_budget": 10**8, "cache_dir": tmp_path})
    expected = dict(tiny.reference().named_parameters())
    managed = {name: each for name, each in model.named_parameters() if type(each) is ManagedTensor}
    assert len(managed) > 10
    for name, weight in managed.items():
        assert torch.equal(weight.clone(), expected[name]), name
    model.memory_optimizer.close()


def test_what_a_view_of_a_freed_tensor_holds_is_not_lent(make_optimizer):
    optimizer = make_optimizer(4 * MIB)
    pager = optimizer.pager
    tensor = optimizer.allocate_tensor((3 * MIB,), torch.uint8)
    view = tensor.view(-1)
    del tensor
    gc.collect()
    assert not pager.entries and pager.frames.used_bytes == 3 * MIB
    assert pager.spare_bytes() == MIB
    assert not pager.lend("cache", 2 * MIB)
    assert pager.ledger.held_bytes("cache") == 0
    assert pager.lend("cache", MIB)
    assert pager.frames.limit_bytes == 3 * MIB
    del view


def test_a_loan_that_has_no_room_after_all_is_refused_and_not_debited(make_optimizer):
    optimizer = make_optimizer(4 * MIB)
    pager = optimizer.pager
    pager.ledger.frames_floor_bytes = 3 * MIB  # what weights needed that are gone by now
    assert pager.spare_bytes() == 4 * MIB
    assert not pager.lend("cache", 2 * MIB)
    assert pager.ledger.held_bytes("cache") == 0 and pager.frames.limit_bytes == 4 * MIB


def test_what_is_given_back_is_credited_though_others_ask_for_too_much(make_optimizer):
    optimizer = make_optimizer(4 * MIB)
    pager = optimizer.pager
    assert pager.lend("cache", MIB)
    view = optimizer.allocate_tensor((2 * MIB,), torch.uint8).view(-1)
    pager.reserve("another", MIB // 2)
    with pager._lock:
        pager.ledger.set("somebody", 2 * MIB)  # and waits for the room
        assert pager.lend("cache", -MIB // 2)
        pager.reserve("another", MIB // 4)
        pager.debit("cache", -MIB // 4)
        assert pager.ledger.accounts()["cache"] == pager.ledger.accounts()["another"] == MIB // 4
        pager.ledger.set("somebody", 0)
        pager.refit()
    del view


def test_the_workspace_of_a_thread_that_ended_is_given_back(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    pager = optimizer.pager
    for _ in range(20):
        thread = threading.Thread(target=lambda: pager.scratch.get("x", (MIB,), torch.uint8))
        thread.start()
        thread.join()
        del thread
    gc.collect()
    pager.usage()  # what finalizers left is done
    assert pager.ledger.held_bytes("workspace") == 0
    pager.scratch.get("x", (MIB,), torch.uint8)
    assert pager.ledger.held_bytes("workspace") == MIB, "this thread goes on"


def test_the_address_of_an_empty_tensor_is_given_back(make_optimizer):
    optimizer = make_optimizer(4 * MIB)
    tensor = optimizer.allocate_tensor((0,), torch.uint8)
    assert optimizer.pool.stats()["general"]["used_bytes"] > 0
    del tensor
    gc.collect()
    optimizer.pager.usage()
    assert optimizer.pool.stats()["general"]["used_bytes"] == 0


def test_a_weight_that_is_freed_leaves_the_window_of_what_is_read_ahead(make_optimizer, tmp_path):
    optimizer = make_optimizer(5 * FRAMES_BYTES)
    pager = optimizer.pager
    managed = register(pager, random_weights(12), tmp_path / "w.safetensors")
    x = torch.ones(1, 512).bfloat16()
    for _ in range(3):
        for weight in managed.values():
            F.linear(x, weight)
    settle(pager)
    ahead = [entry for entry in pager.entries.values() if any(page.unused and not page.kept for page in entry.pages)]
    assert ahead and pager._mover.ahead_bytes
    pager.check()
    for entry in ahead:
        pager.free(entry.tensor_id)
    pager.check()
    assert pager._mover.ahead_bytes == 0


@pytest.mark.parametrize("how", ["bring", "prefetch", "cycle"])
def test_nothing_is_read_once_the_pager_closed_while_room_was_asked_for(make_optimizer, tmp_path, how):
    optimizer = make_optimizer(4 * MIB)
    pager, space = optimizer.pager, BlockSpace(optimizer.pager)
    tensor, block = optimizer.allocate_tensor((MIB,), torch.uint8), space.allocate(MIB)
    register(pager, random_weights(2), tmp_path / "w.safetensors")
    pager.runtime.swap_ahead(0.0)
    settle(pager)
    pager.trim()
    pager.refit()
    pager.frames.set_limit(pager.frames.limit_bytes)

    def close(n_bytes):  # by another thread, while this one waits
        pager._mover.closed = True

    pager.on_growth = close
    if how == "bring":
        assert pager.runtime.bring([tensor.tensor_id]) == []
    elif how == "prefetch":
        pager.read_ahead(["w0", "w1"])
    else:
        with pytest.raises(TensorFreedError):
            pager.hold([block.entry], [], MIB)
    assert pager._mover.moving == 0
    pager.on_growth, pager._mover.closed = None, False


def test_a_hold_that_fails_lets_go_of_what_was_freed_meanwhile(make_optimizer):
    optimizer = make_optimizer(4 * MIB)
    pager, space = optimizer.pager, BlockSpace(optimizer.pager)
    here, away = space.allocate(MIB), space.allocate(MIB)
    pager.runtime.send_out(away.entry.tensor_id)
    settle(pager)

    def fail(offset, address, n_bytes):
        pager.free(here.entry.tensor_id)  # as `close` does
        raise StorageError("injected", path="nowhere")

    pager._swap.read = fail
    with pytest.raises(StorageError):
        pager.hold([here.entry, away.entry], [], 0)
    assert pager.frames.used_bytes == 0
    pager.check()


def test_the_index_of_a_store_is_that_of_its_files_after_a_failure(tmp_path, monkeypatch):
    store = ContentStore(tmp_path)
    keys = [f"{number:064x}" for number in range(3)]

    def put(key, victims=()):
        return store.put(key, {}, [memoryview(bytes(5000))], {}, lambda index, n_bytes: victims)

    put(keys[0])
    put(keys[1])
    with monkeypatch.context() as patch:
        patch.setattr(content_store.os, "replace", _fail)
        with pytest.raises(StorageError):
            put(keys[2], victims=[keys[0]])
    with store._locked():
        assert set(store._index.entries) == {keys[1]} == {path.name for path in store._files()}
    assert put(keys[2])


def test_the_bytes_of_an_index_are_added_up_while_another_thread_changes_it():
    index = Index()

    class Entry:
        @property
        def n_bytes(self):  # as if another thread came in between
            index.entries["new"] = StoredEntry(1, {})
            return 1

    index.entries = {"a": Entry(), "b": Entry()}
    assert index.used_bytes == 2


def _fail(*arguments):
    raise OSError(5, "injected")
