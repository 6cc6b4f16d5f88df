"""Each algorithm by its contract, by hand, and on fixed traces where the right answer is known."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.eviction.replay import Trace, TraceRecorder, replay, replay_belady
from qwen3_vl_memory_optimizations import ConfigurationError, MemoryBudgetExceeded, MemorySwappingSystem
from qwen3_vl_memory_optimizations.prediction import NextUse
from qwen3_vl_memory_optimizations.runtime_policy import (
    LRUSwappingAlgorithm,
    PredictiveSwappingAlgorithm,
    create_swapping_algorithm,
)

from .contract import SwappingContract


class TestLRU(SwappingContract):
    name = "lru"

    def test_the_longest_unused_leaves_first(self):
        algorithm = self.make(dict.fromkeys("abc", 1))
        algorithm.touch("a")
        assert list(algorithm.order()) == ["b", "c", "a"]


class TestClock(SwappingContract):
    name = "clock"

    def test_what_was_used_gets_a_second_chance_and_no_third(self):
        algorithm = self.make(dict.fromkeys("abcd", 1))
        algorithm.touch("a")
        assert algorithm.evict(1) == ["b"]
        assert algorithm.evict(1) == ["c"]  # the hand passed a and took its chance
        assert algorithm.evict(2) == ["d", "a"]

    def test_where_all_were_used_the_hand_goes_round_once(self):
        algorithm = self.make(dict.fromkeys("abc", 1))
        for key in "abc":
            algorithm.touch(key)
        assert algorithm.evict(1) == ["a"]
        assert algorithm.evict(1) == ["b"], "its chance is gone"


class TestPredictive(SwappingContract):
    name = "predictive"

    def test_in_a_cycle_what_was_used_last_leaves_first(self):
        algorithm = self.make(dict.fromkeys(range(10), 1))
        for key in [*range(10)] * 3:
            algorithm.touch(key)
        assert list(algorithm.order()) == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]

    def test_history_is_bounded(self):
        algorithm = self.make()
        for key in range(5000):
            algorithm.evict(algorithm.resident_bytes + 1 - 20)
            algorithm.insert(key, 1)
        assert len(algorithm.next_use._known) <= 1024

    def test_where_prediction_loses_a_simple_rule_decides(self):
        algorithm = PredictiveSwappingAlgorithm()
        algorithm._found.update(lru=100.0, predictive=80.0)
        for key in "abc":
            algorithm.insert(key, 1)
        assert algorithm.decides == "lru"
        assert list(algorithm.order()) == ["a", "b", "c"]


def test_next_use_tells_a_rhythm_from_chance():
    next_use = NextUse()
    for number in range(400):
        next_use.use("steady" if number % 10 == 0 else f"other {number % 7} {number % 11}", 20)
    last = 390
    assert next_use.wait("steady") == pytest.approx(10 - (next_use.now - 1 - last), abs=1)
    often, seldom, never = NextUse(), NextUse(), NextUse()
    gaps = (1, 5, 2, 9, 1, 3, 12, 2)
    for next_use, factor in ((often, 1), (seldom, 6)):
        for gap in gaps:
            next_use.use("key", 20)
            for filler in range(gap * factor):
                next_use.use(("filler", filler), 20)
    assert often.wait("key") < seldom.wait("key")
    assert never.wait("key") == float("inf")


@pytest.mark.parametrize("name", ["lru", "clock", "predictive"])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("use evict remove".split()), st.integers(0, 11)), max_size=120))
def test_any_sequence_keeps_the_books(name, steps):
    algorithm = create_swapping_algorithm(name)
    expected = {}
    for action, number in steps:
        if action == "use" and number in expected:
            algorithm.touch(number)
        elif action == "use":
            algorithm.insert(number, number + 1)
            expected[number] = number + 1
        elif action == "remove":
            algorithm.remove(number)
            expected.pop(number, None)
        else:
            gone = algorithm.evict(number)
            if gone is None:
                assert sum(expected.values()) < number
            for key in gone or ():
                del expected[key]
        assert algorithm.n_bytes == expected
        assert algorithm.resident_bytes == sum(expected.values())
        assert sorted(algorithm.order()) == sorted(expected)


def trace_of(keys, sizes=None):
    names, indices = np.unique(np.asarray(keys), return_inverse=True)
    n_bytes = np.array([1 if sizes is None else sizes[name] for name in names.tolist()], np.int64)
    return Trace(indices.astype(np.int32), n_bytes, np.full(len(names), "general"))


def zipf(n_keys, uses, seed):
    weights = 1 / np.arange(1, n_keys + 1)
    return trace_of(np.random.default_rng(seed).choice(n_keys, uses, p=weights / weights.sum()))


def cycle(n_keys, rounds):
    return trace_of(np.tile(np.arange(n_keys), rounds))


def scan_with_hot_set(seed):
    draw, scanned = np.random.default_rng(seed), itertools.count(1000)
    return trace_of([draw.integers(40) if draw.random() < 0.5 else next(scanned) % 3000 for _ in range(6000)])


def best_by_search(keys, capacity):
    """The most hits there can be, by trying every choice."""
    states = {frozenset(): 0}
    for key in keys:
        following = {}
        for state, hits in states.items():
            if key in state:
                options = [(state, hits + 1)]
            else:
                grown = state | {key}
                options = [(grown, hits)] if len(grown) <= capacity else [(grown - {each}, hits) for each in state]
            for option, found in options:
                following[option] = max(found, following.get(option, -1))
        states = following
    return max(states.values())


@pytest.mark.parametrize("seed", range(12))
def test_belady_is_the_optimum(seed):
    keys = np.random.default_rng(seed).integers(0, 6, 22).tolist()
    for capacity in (1, 2, 3, 5):
        assert replay_belady(trace_of(keys), capacity).hit_rate * 22 == pytest.approx(best_by_search(keys, capacity))


def test_recency_finds_nothing_in_a_cycle_and_prediction_nearly_all_that_can_be_found():
    trace = cycle(80, 120)
    for capacity in (8, 20, 40):
        best = replay_belady(trace, capacity).hit_rate
        assert replay(trace, create_swapping_algorithm("lru"), capacity).hit_rate == 0
        assert replay(trace, create_swapping_algorithm("clock"), capacity).hit_rate == 0
        assert replay(trace, create_swapping_algorithm("predictive"), capacity).hit_rate >= 0.97 * best


@pytest.mark.parametrize(
    "trace", [zipf(300, 6000, 1), scan_with_hot_set(2), cycle(60, 40)], ids=["zipf", "scan", "cycle"]
)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_prediction_is_never_a_point_below_the_simple_rules(trace, share):
    capacity = int(share * trace.total_bytes)
    found = {name: replay(trace, create_swapping_algorithm(name), capacity).hit_rate for name in ("lru", "clock")}
    predicted = replay(trace, create_swapping_algorithm("predictive"), capacity).hit_rate
    assert predicted >= max(found.values()) - 0.01
    assert predicted <= replay_belady(trace, capacity).hit_rate + 1e-9


def test_bytes_count_and_what_is_larger_than_memory_stays_out():
    trace = trace_of(["big", "a", "b", "a", "big", "b"], {"big": 100, "a": 10, "b": 30})
    found = replay(trace, create_swapping_algorithm("lru"), 50)
    assert (found.hit_rate, found.byte_hit_rate) == (2 / 6, 40 / 280)
    assert list(create_swapping_algorithm("lru").order()) == []


def test_traces_are_kept_without_pickle(tmp_path):
    recorder = TraceRecorder()
    for key, n_bytes, kind in (("a", 10, "weights"), ("b", 20, "kv_cache"), ("a", 10, "weights")):
        recorder(key, n_bytes, kind)
    trace = recorder.trace()
    trace.save(tmp_path / "trace.npz")
    again = Trace.load(tmp_path / "trace.npz")
    assert again.keys.tolist() == [0, 1, 0]
    assert (again.n_bytes.tolist(), again.kinds.tolist()) == ([10, 20], ["weights", "kv_cache"])
    np.savez(tmp_path / "bad.npz", keys=np.array([object()]))
    for bad in ("bad.npz", "missing.npz"):
        with pytest.raises(ConfigurationError, match=bad):
            Trace.load(tmp_path / bad)


def test_the_system_of_the_specification():
    system = MemorySwappingSystem(memory_pressure_threshold=0.8)
    assert set(system.swapping_algorithms) == {"lru", "clock", "predictive"}
    assert system.algorithm is system.swapping_algorithms["predictive"]
    for threshold in (0, 1.5):
        with pytest.raises(ConfigurationError, match="memory_pressure_threshold"):
            MemorySwappingSystem(threshold)
    with pytest.raises(ConfigurationError, match="'clok'.*did you mean 'clock'"):
        MemorySwappingSystem(algorithm="clok")


OPTIMIZED = """
import numpy as np
from qwen3_vl_memory_optimizations.runtime_policy import create_swapping_algorithm
from benchmarks.eviction.replay import replay
from benchmarks.eviction.replay import Trace

assert False, "assertions are off"
keys = np.array([0, 1, 0, 2, 0, 3], np.int32)
algorithm = create_swapping_algorithm("lru")
found = replay(Trace(keys, np.ones(4, np.int64), np.array(["general"] * 4)), algorithm, 2)
print(found.hit_rate, algorithm.resident_bytes)
"""


def test_a_replay_evicts_without_assertions_too():
    run = subprocess.run([sys.executable, "-O", "-c", OPTIMIZED], capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == [str(2 / 6), "2"], run.stderr


def test_an_algorithm_that_gives_nothing_up_is_an_error_with_numbers():
    class Miser(LRUSwappingAlgorithm):
        def order(self):
            return iter(())

    trace = trace_of([0, 1, 2])
    with pytest.raises(MemoryBudgetExceeded, match="Miser cannot evict") as caught:
        replay(trace, Miser(), 2 * int(trace.n_bytes[0]))
    assert (caught.value.requested_bytes, caught.value.available_bytes) == (int(trace.n_bytes[0]), 0)
