"""Alerts: hysteresis on made-up snapshots, and each driven to fire and to clear on a real optimizer."""

from __future__ import annotations

import gc
import logging
import threading
import time

import pytest
import torch

from qwen3_vl_memory_optimizations import ConfigurationError, create_optimized_model
from qwen3_vl_memory_optimizations.cache import CacheItem
from qwen3_vl_memory_optimizations.monitoring import (
    ALERTS,
    AlertLimits,
    AlertMonitor,
    AlertWatch,
    alert_rows,
    take_snapshot,
)
from tests.model.tiny import DIRECTORY

MIB = 2**20


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def made_up(memory=0.1, fragmentation=0.0, response_s=None, hits=0, misses=0, peak_bytes=0, budget_bytes=None):
    cache = {"hits": hits, "misses": misses}
    return {
        "cache": cache,
        "budget": {"undroppable_share": memory, "peak_bytes": peak_bytes, "ram_budget_bytes": budget_bytes},
        "fragmentation": fragmentation,
        "responses": {"current_s": response_s},
    }


@pytest.fixture
def heard():
    return []


@pytest.fixture
def clock():
    return Clock()


def watch(monitor, clock, snapshots, step_s=1.0):
    """Evaluate each snapshot, a second apart; return the names of the active alerts after each."""
    found = []
    for snapshot in snapshots:
        clock.now_s += step_s
        found.append([alert.name for alert in monitor.evaluate(snapshot) if alert.active])
    return found


def test_an_alert_fires_after_its_condition_held_and_clears_behind_the_laxer_bound(clock, heard, caplog):
    monitor = AlertMonitor(AlertLimits(hold_s=2.0), on_change=heard.append, clock=clock)
    caplog.set_level(logging.INFO)
    figures = [0.81, 0.9, 0.85, 0.79, 0.76, 0.76, 0.76, 0.74, 0.74, 0.74]
    active = watch(monitor, clock, [made_up(memory=figure) for figure in figures])
    assert active == [[], [], *[["memory"]] * 7, []]
    assert [(alert.name, alert.active, alert.value) for alert in heard] == [
        ("memory", True, 0.85),
        ("memory", False, 0.74),
    ]
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "alert memory fires: 0.85 (fires above 0.8, clears at 0.75)"),
        ("INFO", "alert memory is clear: 0.74 (fires above 0.8, clears at 0.75)"),
    ]


def test_a_figure_that_swings_about_its_limit_changes_nothing(clock, heard):
    monitor = AlertMonitor(AlertLimits(hold_s=2.0), on_change=heard.append, clock=clock)
    assert watch(monitor, clock, [made_up(memory=0.81 if turn % 2 else 0.79) for turn in range(20)]) == [[]] * 20
    watch(monitor, clock, [made_up(memory=0.85)] * 3)
    assert (
        watch(monitor, clock, [made_up(memory=0.74 if turn % 2 else 0.76) for turn in range(20)]) == [["memory"]] * 20
    )
    assert len(heard) == 1


def test_a_breach_of_the_budget_fires_at_once_and_stays(clock, heard):
    monitor = AlertMonitor(on_change=heard.append, clock=clock)
    peaks = (1_990_000_000, 2_000_000_000, 2_140_000_000, 1_000_000_000)
    snapshots = [made_up(peak_bytes=peak, budget_bytes=2_000_000_000) for peak in peaks]
    assert watch(monitor, clock, snapshots) == [[], [], ["budget"], ["budget"]]
    assert [alert.message for alert in heard] == ["budget fires: peak 2.14 GB, over the budget of 2.00 GB by 0.14 GB"]
    assert (heard[0].value, heard[0].limit) == (1.07, 1.0)


def test_without_a_budget_there_is_no_breach(clock):
    monitor = AlertMonitor(clock=clock)
    assert watch(monitor, clock, [made_up(peak_bytes=10**12)]) == [[]]
    assert monitor.evaluate(made_up(peak_bytes=10**12))[-1].value is None


def test_without_a_limit_or_a_figure_there_is_no_alert(clock):
    monitor = AlertMonitor(AlertLimits(hold_s=0.0), clock=clock)
    assert watch(monitor, clock, [made_up(response_s=1e9), made_up(fragmentation=None) | {"cache": None}]) == [[], []]
    monitor = AlertMonitor(AlertLimits(hold_s=0.0, response_s=2.0), clock=clock)
    figures = (2.1, 1.9, 1.85, 1.7, 2.1, None)
    assert watch(monitor, clock, [made_up(response_s=figure) for figure in figures]) == [
        *[["response_time"]] * 3,  # clears at 90 % of the limit
        [],
        ["response_time"],
        [],  # nobody has asked for a while
    ]


def test_the_hit_rate_is_that_of_the_window_and_few_look_ups_say_nothing(clock):
    monitor = AlertMonitor(AlertLimits(hold_s=0.0, window_s=10.0, least_lookups=20), clock=clock)
    active = watch(
        monitor,
        clock,
        [
            made_up(hits=0, misses=19),
            made_up(hits=13, misses=20),  # 39 % of 33
            made_up(hits=33, misses=25),  # 57 % of 58
        ],
    )
    assert active == [[], ["cache_hit_rate"], ["cache_hit_rate"]]
    # Of the window remain 20 hits and 5 misses, of the whole time only 65 % were hits.
    assert watch(monitor, clock, [made_up(hits=53, misses=30)], step_s=9.5) == [[]]
    assert watch(monitor, clock, [made_up(hits=53, misses=60)]) == [["cache_hit_rate"]]
    assert watch(monitor, clock, [made_up(hits=53, misses=60)] * 2, step_s=11.0)[-1] == [], "nobody looked anything up"


def test_bounds_on_the_wrong_side_are_refused():
    for wrong in (
        {"hit_rate_clear": 0.6},
        {"memory_clear": 0.9},
        {"fragmentation_clear": 0.5},
        {"response_s": 1.0, "response_clear_s": 2.0},
        {"window_s": 0.0},
        {"hold_s": -1.0},
    ):
        with pytest.raises(ConfigurationError, match=next(iter(wrong)).split("_")[0]):
            AlertLimits(**wrong)


def test_a_callback_that_fails_is_logged_and_the_watch_goes_on(clock, caplog):
    def fail(alert):
        raise RuntimeError("mine")

    monitor = AlertMonitor(AlertLimits(hold_s=0.0), on_change=fail, clock=clock)
    assert watch(monitor, clock, [made_up(memory=0.9)] * 2) == [["memory"]] * 2
    assert "the callback of alert memory failed" in caplog.text


# --- on real systems ----------------------------------------------------------------------------------------------


def active(monitor, optimizer):
    return [alert.name for alert in monitor.evaluate(take_snapshot(optimizer)) if alert.active]


def test_fragmentation_fires_and_clears_on_a_real_pool(make_optimizer):
    optimizer = make_optimizer(32 * MIB, memory_pool_size=8 * MIB)
    monitor = AlertMonitor(AlertLimits(hold_s=0.0))
    tensors = [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(8)]
    assert active(monitor, optimizer) == []
    del tensors[::2]
    assert active(monitor, optimizer) == ["fragmentation"]
    tensors.clear()
    assert active(monitor, optimizer) == []


def test_memory_fires_and_clears_on_a_real_budget(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    monitor = AlertMonitor(AlertLimits(hold_s=0.0))
    tensors = [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(7)]
    assert active(monitor, optimizer) == ["memory"]
    tensors.pop()
    assert active(monitor, optimizer) == [], "6 of 8 MiB are not above the bound"
    tensors.clear()
    assert active(monitor, optimizer) == []


def test_the_hit_rate_fires_and_clears_on_a_real_cache(make_optimizer):
    optimizer = make_optimizer()
    monitor = AlertMonitor(AlertLimits(hold_s=0.0))
    for number in range(20):
        assert optimizer.cache.get(f"{number:064x}") is None
    assert active(monitor, optimizer) == ["cache_hit_rate"]
    optimizer.cache.put("ab" * 32, CacheItem({"x": torch.ones(1000)}), saved_s=1.0)
    for _ in range(60):
        assert optimizer.cache.get("ab" * 32) is not None
    assert active(monitor, optimizer) == []


def test_response_time_fires_and_clears_on_a_real_model(tmp_path):
    model = create_optimized_model(DIRECTORY, {"cache_dir": tmp_path, "codec": "none"})
    ids = torch.tensor([[7, 8, 9]])
    with model.memory_optimizer as optimizer, torch.no_grad():
        model(input_ids=ids)
        monitor = AlertMonitor(AlertLimits(hold_s=0.0, response_s=1.0))
        assert active(monitor, optimizer) == []
        slow = model.model.register_forward_pre_hook(lambda module, args: time.sleep(1.1))
        model(input_ids=ids)
        assert active(monitor, optimizer) == ["response_time"]
        slow.remove()
        model(input_ids=ids)
        assert active(monitor, optimizer) == []


def test_a_response_that_hangs_fires_before_it_ends(tmp_path):
    model = create_optimized_model(DIRECTORY, {"cache_dir": tmp_path, "codec": "none"})
    goes_on, inside = threading.Event(), threading.Event()

    def hang(module, args):
        inside.set()
        goes_on.wait(20)

    model.model.register_forward_pre_hook(hang)
    with model.memory_optimizer as optimizer:
        monitor = AlertMonitor(AlertLimits(hold_s=0.0, response_s=0.05))
        thread = threading.Thread(target=lambda: model(input_ids=torch.tensor([[7]])))
        thread.start()
        inside.wait(20)
        time.sleep(0.1)
        assert active(monitor, optimizer) == ["response_time"]
        goes_on.set()
        thread.join()


def test_a_watch_looks_by_itself_and_ends_with_what_it_watches(make_optimizer, heard):
    optimizer = make_optimizer(8 * MIB)
    tensors = [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(7)]
    told = threading.Event()

    def hear(alert):
        heard.append(alert)
        told.set()

    with AlertWatch(optimizer, AlertMonitor(AlertLimits(hold_s=0.0), on_change=hear), period_s=0.01):
        assert told.wait(10)
    assert heard[0].name == "memory" and len(tensors) == 7
    assert "memory-alerts" not in [thread.name for thread in threading.enumerate()]


def test_a_watch_keeps_no_optimizer_alive(tmp_path):
    from qwen3_vl_memory_optimizations import MemoryOptimizer

    optimizer = MemoryOptimizer(memory_config={"cache_dir": tmp_path})
    watching = AlertWatch(optimizer, AlertMonitor(), period_s=0.01)
    optimizer.close()
    del optimizer
    gc.collect()
    deadline = time.monotonic() + 10
    while watching._periodic.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not watching._periodic.is_alive()


def test_rows_for_a_page_have_one_of_each_alert(clock):
    rows = alert_rows(AlertMonitor(clock=clock).evaluate(made_up()))
    assert [row["name"] for row in rows] == list(ALERTS)
    assert set(rows[0]) == {"name", "active", "value", "limit", "since_s", "message"}
