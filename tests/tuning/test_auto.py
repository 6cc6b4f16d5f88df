"""The tuner on a real Pager: windows, figures, and what is set."""

import random
import time

import pytest
import torch

from qwen3_vl_memory_optimizations import ConfigurationError
from qwen3_vl_memory_optimizations.cache import CacheItem
from qwen3_vl_memory_optimizations.tuning import AutoTuner, Knob
from qwen3_vl_memory_optimizations.tuning.auto import Counters, figures_of
from tests.paging.weights import FRAMES_BYTES, random_weights, register, run_pass, settle

MIB = 2**20


def counters(**changed):
    nothing = dict.fromkeys(("hits", "lookups", "misses", "faults", "swap_reads", "reused_bytes", "backed_bytes"), 0)
    return Counters(**{**nothing, "fragmentation": None, **changed})


def test_the_figures_of_a_window_are_those_of_its_formulas():
    before = counters(hits=10, lookups=20, misses=5, faults=5, swap_reads=1, reused_bytes=100, backed_bytes=100)
    after = counters(
        hits=13, lookups=24, misses=15, faults=7, swap_reads=2, reused_bytes=175, backed_bytes=200, fragmentation=0.2
    )
    found = figures_of(before, after, [0.0, 0.25, 1.0, 60.0, 60.5])  # somebody thought for a minute
    assert found == {
        "passes_per_s": 2.0,
        "read_ahead_bytes": 2.0,
        "l2_cache_size": 0.75,
        "pool_compaction_interval": pytest.approx(0.75 * 0.8),
        "tier_migration_interval": 0.8,
    }
    assert set(figures_of(before, before, []).values()) == {None}


def test_windows_end_after_their_passes_and_their_time(make_optimizer, tmp_path):
    optimizer, now, called = make_optimizer(8 * FRAMES_BYTES), [0.0], []
    optimizer.pager.on_pass = lambda: called.append(1)
    tuner = AutoTuner(
        optimizer.pager, optimizer.parameters, knobs=(), window_s=10.0, window_passes=4, timer=lambda: now[0]
    )
    managed = register(optimizer.pager, random_weights(4), tmp_path / "w.safetensors")
    ended = []
    for step in range(20):
        now[0] += 2.0
        run_pass(managed)
        if tuner.look():
            ended.append(step)
    assert ended == [5, 10, 15]  # 4 passes take 8 s, which is too short
    assert len(called) == 20, "the hook that was there is called too"


def test_a_larger_cache_is_found_where_entries_come_again(make_optimizer, tmp_path):
    optimizer = make_optimizer(256 * MIB, l2_cache_size=4 * MIB, l2_cache_max=64 * MIB, private=True)
    level, cache = optimizer.cache.l2_cache, optimizer.cache
    now = [0.0]
    tuner = AutoTuner(
        optimizer.pager, optimizer.parameters, cache=cache, window_s=1.0, window_passes=1, timer=lambda: now[0],
        knobs=[Knob("l2_cache_size", 1.5, (1,), reversible=False)],
    )  # fmt: skip
    managed = register(optimizer.pager, random_weights(1), tmp_path / "w.safetensors")
    item, rates = CacheItem({"x": torch.ones(MIB // 4)}, {}), []
    draw = random.Random(0)
    weights = [1 / rank for rank in range(1, 31)]
    for _ in range(150):
        hits = level.counters.hits
        for number in draw.choices(range(30), weights, k=200):
            key = f"{number:064x}"
            if cache.get(key) is None:
                cache.put(key, item, saved_s=1.0)
        rates.append((level.counters.hits - hits) / 200)
        now[0] += 1.0
        run_pass(managed)
        tuner.look()
    assert rates[0] < 0.5 and min(rates[-10:]) > 0.9
    assert level.size_bytes > 20 * MIB and tuner.resting
    assert tuner.decisions[0].kept and not tuner.decisions[-1].kept
    assert "l2_cache_size 4.1943e+06 -> 6.29146e+06 bytes kept" in tuner.log()[0]
    assert tuner.stats()["decisions"][0]["kept"] and tuner.stats()["values"]["l2_cache_size"] == level.size_bytes


def test_it_runs_by_itself_where_it_is_switched_on_and_ends(make_optimizer, tmp_path):
    assert make_optimizer(8 * MIB).tuner is None
    optimizer = make_optimizer(8 * FRAMES_BYTES, auto_tune=True)
    managed = register(optimizer.pager, random_weights(12), tmp_path / "w.safetensors")
    for _ in range(2000):
        run_pass(managed)
        if optimizer.get_memory_efficiency_stats()["tuning"]["windows"] >= 2:
            break
        torch.empty(1)
    stats = optimizer.get_memory_efficiency_stats()["tuning"]
    assert stats["windows"] >= 2
    assert set(stats["values"]) >= {"read_ahead_bytes", "l2_cache_size", "pool_compaction_interval"}
    optimizer.close()
    assert not optimizer.tuner._periodic.is_alive()


# --- parameters ---


def test_parameters_are_those_of_the_parts_that_are_there(make_optimizer):
    names = {"read_ahead_bytes", "l2_cache_size", "tier_migration_interval", "pool_compaction_interval"}
    assert set(make_optimizer(8 * MIB).parameters) == names | {"swap_pressure_threshold"}
    off = {"enable_cache_hierarchy": False, "enable_swapping": False, "enable_memory_pooling": False}
    assert make_optimizer(**off).parameters == {}


def test_each_parameter_reaches_its_part_and_refuses_what_is_out_of_bounds(make_optimizer):
    optimizer = make_optimizer(64 * MIB, l2_cache_size=2 * MIB, l2_cache_max=8 * MIB)
    parameters = optimizer.parameters
    parameters["l2_cache_size"].set(4 * MIB)
    parameters["tier_migration_interval"].set(0.25)
    parameters["pool_compaction_interval"].set(1.5)
    parameters["swap_pressure_threshold"].set(0.5)
    parameters["read_ahead_bytes"].set(8 * MIB)
    assert optimizer.cache.l2_cache.size_bytes == 4 * MIB
    assert optimizer.tiering.interval_s == 0.25 and optimizer._compactor.interval_s == 1.5
    assert optimizer.swapping.memory_pressure_threshold == 0.5
    assert optimizer.pager.read_ahead_bytes == 8 * MIB
    for name, parameter in parameters.items():
        before = parameter.read()
        for value in (parameter.least / 2, parameter.most * 2):
            with pytest.raises(ConfigurationError, match=name):
                parameter.set(value)
        assert parameter.read() == before


def test_a_smaller_cache_lets_the_least_worth_go(make_optimizer):
    optimizer = make_optimizer(64 * MIB, l2_cache_size=16 * MIB, private=True)
    level, item = optimizer.cache.l2_cache, CacheItem({"x": torch.ones(MIB // 4)}, {})
    for number in range(6):
        assert level.store(f"{number:064x}", item, saved_s=float(number))
    level.resize(2 * MIB)
    assert level.used_bytes == 2 * MIB and optimizer.pager.ledger.held_bytes("cache") == 2 * MIB
    assert f"{5:064x}" in level and f"{0:064x}" not in level
    with pytest.raises(ConfigurationError, match="at least one"):
        level.resize(0)


def test_more_read_ahead_keeps_fewer_pages(make_optimizer, tmp_path):
    optimizer = make_optimizer(24 * FRAMES_BYTES)
    pager = optimizer.pager
    managed = register(pager, random_weights(40), tmp_path / "w.safetensors")
    run_pass(managed)

    def kept():
        return sum(page.kept for entry in pager.entries.values() for page in entry.pages)

    by_itself = kept()
    pager.set_read_ahead(10 * FRAMES_BYTES)
    assert (by_itself, kept()) == (21, 14)
    expected = run_pass(managed)
    settle(pager)
    pager.set_read_ahead(1 << 40)  # half of the memory at the most
    assert kept() == 12
    assert all(torch.equal(found, expected[name]) for name, found in run_pass(managed).items())
    pager.set_read_ahead(None)
    assert kept() == by_itself
    assert pager.frames.peak_bytes <= 24 * FRAMES_BYTES
    with pytest.raises(ConfigurationError, match="read_ahead"):
        pager.set_read_ahead(0)


def test_free_frames_go_back_by_themselves(make_optimizer):
    optimizer = make_optimizer(64 * MIB, pool_compaction_interval=0.05)
    tensor = optimizer.allocate_tensor((8 * MIB,), torch.uint8)
    other = optimizer.allocate_tensor((8 * MIB,), torch.uint8)
    del tensor
    frames = optimizer.pager.frames
    for _ in range(1000):
        if frames.compacted_bytes == 8 * MIB:
            break
        time.sleep(0.01)
    assert frames.compacted_bytes == 8 * MIB and frames.fragmentation == 0
    assert int(other.sum()) == 0
