"""Tensors on the SSD come back into memory that nobody uses, those first that are expected soonest."""

from __future__ import annotations

import gc
import shutil
import time

import pytest
import torch

from qwen3_vl_memory_optimizations import MemoryTieringSystem
from qwen3_vl_memory_optimizations.hardware import GpuInfo
from qwen3_vl_memory_optimizations.process import usable_memory
from tests.paging.weights import FRAMES_BYTES, random_weights, register, settle

MIB = 2**20


@pytest.fixture
def make(make_optimizer):
    """Make optimizers in which the longest unused leave: what comes back is this system's business alone."""
    return lambda budget, **settings: make_optimizer(budget, **{"swap_algorithm": "lru", **settings})


def fill(optimizer, n_tensors):
    tensors = []
    for number in range(n_tensors):
        tensors.append(optimizer.allocate_tensor((MIB,), torch.uint8))
        tensors[-1].fill_(number)
    return tensors


def tiers(tensors):
    return [tensor.tier for tensor in tensors]


def test_what_is_used_often_comes_back_when_there_is_room_and_is_not_waited_for(make):
    optimizer = make(6 * MIB)
    tensors = fill(optimizer, 4)
    for _ in range(12):
        tensors[1].sum()
    others = fill(optimizer, 6)
    settle(optimizer.pager)
    assert tiers(tensors) == ["ssd"] * 4
    assert optimizer.tiering.migrate(optimizer.pager) == 0, "nothing leaves for it"
    del others[:]
    gc.collect()
    optimizer.pager.usage()  # what was collected is freed
    keep = fill(optimizer, 5)
    assert optimizer.tiering.migrate(optimizer.pager) == 1
    settle(optimizer.pager)
    assert tiers(tensors) == ["ssd", "cpu", "ssd", "ssd"]
    faults = optimizer.pager.stats.faults
    assert int(tensors[1][0]) == 1
    assert optimizer.pager.stats.faults == faults
    assert (optimizer.tiering.migrations, optimizer.tiering.effectiveness()) == (1, 1.0)
    assert len(keep) == 5


def make_room(optimizer):
    """Free everything that nobody refers to."""
    gc.collect()
    optimizer.pager.usage()


def test_effectiveness_is_the_share_of_migrations_used_before_they_left(make):
    optimizer = make(6 * MIB)
    pager, tiering = optimizer.pager, optimizer.tiering
    tensors = fill(optimizer, 2)
    others = fill(optimizer, 6)
    del others
    make_room(optimizer)
    settle(pager)
    assert tiers(tensors) == ["ssd"] * 2
    assert optimizer.get_tier_effectiveness() is None, "nothing was brought back"
    assert tiering.migrate(pager) == 2
    settle(pager)
    assert optimizer.get_tier_effectiveness() == 0.0
    assert optimizer.metrics(measure=False)["tier_optimization_effectiveness"] == 0.0
    tensors[0].sum()
    assert optimizer.get_tier_effectiveness() == 0.5
    pager.runtime.send_out(tensors[1].tensor_id)  # it leaves, unused
    settle(pager)
    tensors[1].sum()  # a fault
    assert optimizer.get_tier_effectiveness() == 0.5
    tensors[1].sum()
    assert (tiering.migrations, tiering.useful_migrations) == (2, 1)
    for tensor in tensors:
        pager.runtime.send_out(tensor.tensor_id)
    settle(pager)
    assert tiering.migrate(pager) == 2
    settle(pager)
    for tensor in tensors:
        pager.runtime.send_out(tensor.tensor_id)  # both leave unused, and are brought once more
    settle(pager)
    assert tiering.migrate(pager) == 2
    settle(pager)
    tensors[0].sum()
    assert optimizer.get_tier_effectiveness() == 2 / 6


def test_a_use_while_tensors_are_brought_back_counts(make, monkeypatch):
    optimizer = make(6 * MIB)
    pager = optimizer.pager
    tensors = fill(optimizer, 1)
    others = fill(optimizer, 6)
    del others
    make_room(optimizer)
    settle(pager)
    bring = pager.runtime.bring

    def bring_and_use(tensor_ids):
        brought = bring(tensor_ids)
        tensors[0].sum()
        return brought

    monkeypatch.setattr(pager.runtime, "bring", bring_and_use)
    assert optimizer.tiering.migrate(pager) == 1
    assert optimizer.get_tier_effectiveness() == 1.0


def test_all_come_back_and_their_bytes_are_what_they_were(make):
    optimizer = make(8 * MIB)
    tensors = fill(optimizer, 6)
    others = fill(optimizer, 8)
    del others[:]
    gc.collect()
    optimizer.pager.usage()
    assert optimizer.tiering.migrate(optimizer.pager) == 6
    settle(optimizer.pager)
    assert tiers(tensors) == ["cpu"] * 6
    assert [int(tensor.max()) for tensor in tensors] == list(range(6))
    assert optimizer.get_memory_efficiency_stats()["tiers"]["migrations_used"] == 6


def test_runtime_tensors_fill_no_more_than_their_share_of_the_memory(make):
    optimizer = make(8 * MIB)
    tensors = fill(optimizer, 6)
    others = fill(optimizer, 8)
    del others[:]
    gc.collect()
    optimizer.pager.usage()
    optimizer.tiering.tiers["cpu"]["capacity"] = 2 * MIB + 1000
    for _ in range(3):
        optimizer.tiering.migrate(optimizer.pager)
        settle(optimizer.pager)
    assert sorted(tiers(tensors)) == ["cpu"] * 2 + ["ssd"] * 4


def test_weights_that_are_missing_come_first(make, tmp_path):
    optimizer = make(8 * MIB)
    tensors = fill(optimizer, 3)
    fill(optimizer, 8)
    settle(optimizer.pager)
    gc.collect()
    optimizer.pager.usage()
    register(optimizer.pager, random_weights(150), tmp_path / "w.safetensors")
    assert 150 * FRAMES_BYTES > 8 * MIB
    optimizer.pager.read_ahead([f"w{number}" for number in range(150)])
    settle(optimizer.pager)
    optimizer.pager.frames.set_limit(10 * MIB)  # room that the weights have not taken yet
    assert optimizer.tiering.migrate(optimizer.pager) == 0
    assert tiers(tensors) == ["ssd"] * 3


def test_it_runs_by_itself_and_ends(make):
    optimizer = make(8 * MIB, tier_migration_interval=0.01)
    tensors = fill(optimizer, 4)
    others = fill(optimizer, 8)
    del others[:]
    gc.collect()
    for _ in range(500):
        if tiers(tensors) == ["cpu"] * 4:
            break
        time.sleep(0.01)
    assert tiers(tensors) == ["cpu"] * 4
    optimizer.close()
    assert not optimizer.tiering._periodic.is_alive()


def test_what_was_freed_is_forgotten(make):
    optimizer = make(8 * MIB)
    tensors = fill(optimizer, 4)
    name = tensors[0].tensor_id
    assert name in optimizer.tiering.waits([name])
    del tensors[:]
    gc.collect()
    optimizer.tiering.migrate(optimizer.pager)
    assert optimizer.tiering.waits([name]) == {}


def test_once_it_has_learnt_the_network_ranks(make):
    optimizer = make(64 * MIB)
    tensors = fill(optimizer, 6)
    for number in range(400):
        tensors[number % 3].sum()
        if number % 40 == 0:
            tensors[3 + number // 40 % 3].sum()
        if number % 20 == 0:
            optimizer.tiering.migrate(optimizer.pager)
    assert optimizer.tiering.predictor.ready
    waits = optimizer.tiering.waits([tensor.tensor_id for tensor in tensors])
    assert max(waits[tensor.tensor_id] for tensor in tensors[:3]) < min(waits[t.tensor_id] for t in tensors[3:])


@pytest.mark.parametrize("switch", ["enable_tiering", "enable_memory_tiering"])
def test_it_may_be_off(make, switch):
    assert make(8 * MIB, **{switch: False}).tiering is None
    assert make(None).tiering is None, "without a budget nothing leaves"


def test_the_tiers_of_the_specification():
    tiers = MemoryTieringSystem({"gpu": None, "cpu": 8_000_000_000, "ssd": 100_000_000_000}).tiers
    assert tiers == {
        "gpu": {"capacity": None, "priority": 1},
        "cpu": {"capacity": 4_000_000_000, "priority": 2},
        "ssd": {"capacity": 80_000_000_000, "priority": 3},
    }
    assert MemoryTieringSystem({}).tiers["cpu"]["capacity"] is None, "no memory was named"


@pytest.mark.parametrize("gpu_bytes", [None, 4 * 2**30])
def test_alone_it_has_the_capacities_of_this_machine(monkeypatch, tmp_path, gpu_bytes):
    gpu = gpu_bytes and GpuInfo(name="a card", compute_capability=(6, 1), total_bytes=gpu_bytes)
    monkeypatch.setattr("qwen3_vl_memory_optimizations.runtime_policy.tiering.detect_gpu", lambda: gpu)
    monkeypatch.setenv("QWEN3VL_MEM_CACHE", str(tmp_path / "still" / "to come"))
    capacities = {name: tier["capacity"] for name, tier in MemoryTieringSystem().tiers.items()}
    assert capacities["gpu"] == (None if gpu is None else int(0.7 * gpu_bytes))
    assert capacities["cpu"] == int(0.5 * usable_memory()[0]) > 0
    assert capacities["ssd"] == pytest.approx(0.8 * shutil.disk_usage(tmp_path).free, rel=0.05)


def test_in_an_optimizer_the_ssd_has_what_is_free_on_its_disk(make, tmp_path):
    capacities = {name: tier["capacity"] for name, tier in make(8 * MIB).tiering.tiers.items()}
    assert capacities["ssd"] == pytest.approx(0.8 * shutil.disk_usage(tmp_path).free, rel=0.05)
    assert capacities["cpu"] == int(0.5 * usable_memory()[0])


def teach(system):
    for number in range(600):
        system.note(f"tensor {number % 7 if number % 3 else number % 50}", 1000, "general")
        if number % 20 == 0:
            system.predictor.train()


def test_what_was_learnt_is_there_in_the_next_run(make, tmp_path):
    first = make(6 * MIB)
    teach(first.tiering)
    assert first.tiering.explain()["examples"] > 256
    first.close()
    (path,) = tmp_path.rglob("learnt-waits.npz")
    second = make(6 * MIB)
    assert second.tiering.predictor.ready
    explained = second.get_memory_efficiency_stats()["tiers"]["predictor"]
    assert set(explained) == {"decides", "errors", "examples", "explanation"} and explained["decides"] == "network"
    before = path.read_bytes()
    second.close()
    assert path.read_bytes() == before, "it learnt nothing new"
    assert [each.name for each in path.parent.glob("learnt*")] == [path.name]


def test_a_damaged_file_is_logged_and_replaced(make, tmp_path, caplog):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "learnt-waits.npz").write_bytes(b"PK\x03\x04 no more of it")
    optimizer = make(6 * MIB)
    assert "the saved predictor is not used" in caplog.text and not optimizer.tiering.predictor.ready
    teach(optimizer.tiering)
    optimizer.close()
    assert make(6 * MIB).tiering.predictor.ready


def test_in_private_mode_nothing_is_left(make, tmp_path):
    optimizer = make(6 * MIB, private=True)
    teach(optimizer.tiering)
    optimizer.close()
    assert not list(tmp_path.rglob("learnt*"))
