"""The levels together: look-ups, moves, predictions, single flight."""

import threading

import pytest
import torch

from qwen3_vl_memory_optimizations import MemoryConfig
from qwen3_vl_memory_optimizations.cache import HierarchicalCacheSystem

from .test_levels import Budget, item_of, key_of, same

ITEM_BYTES = 10_000


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def make(tmp_path):
    def make(**settings):
        timer, budget = settings.pop("timer", None), settings.pop("budget", None)
        config = MemoryConfig(cache_dir=tmp_path / "cache", **settings)
        return HierarchicalCacheSystem(config, budget=budget, **({"timer": timer} if timer else {}))

    return make


def test_the_constructor_of_the_specification(monkeypatch, tmp_path):
    monkeypatch.setenv("QWEN3VL_MEM_CACHE", str(tmp_path))
    system = HierarchicalCacheSystem()
    assert system.l1_cache.size_bytes == 512 * 1024 * 1024
    assert system.l2_cache.size_bytes == 1024 * 1024 * 1024
    assert system.l3_cache.size_bytes == 5 * 1024 * 1024 * 1024
    assert list(tmp_path.iterdir()) == []


def test_an_item_is_found_in_memory_and_after_a_restart_on_the_ssd(make):
    system = make()
    system.put(key_of(1), item_of(1), saved_s=1.0)
    assert same(system.get(key_of(1)), item_of(1))
    system.close()
    again = make()
    assert same(again.get(key_of(1)), item_of(1))
    assert again.stats()["levels"]["ssd"]["hits"] == 1
    assert again.stats()["levels"]["cpu"]["migrations"] == 1  # it moved up
    assert same(again.get(key_of(1)), item_of(1))
    assert again.stats()["levels"]["ssd"]["hits"] == 1
    assert again.stats()["hits"] == 2


def test_each_level_can_be_switched_off(make):
    no_memory = make(enable_l2_cpu_cache=False, enable_l1_gpu_cache=False)
    no_memory.put(key_of(1), item_of(1), saved_s=1.0)
    assert same(no_memory.get(key_of(1)), item_of(1))
    assert no_memory.stats()["levels"]["cpu"] is no_memory.stats()["levels"]["gpu"] is None
    none = make(enable_l1_gpu_cache=False, enable_l2_cpu_cache=False, enable_l3_ssd_cache=False)
    none.put(key_of(1), item_of(1), saved_s=1.0)
    assert none.get(key_of(1)) is None
    assert none.stats()["hit_rate"] is None


def test_private_writes_nothing(make, tmp_path):
    system = make(private=True)
    system.put(key_of(1), item_of(1), saved_s=1.0)
    assert same(system.get(key_of(1)), item_of(1))
    system.close()
    assert system.stats()["levels"]["ssd"] is None
    assert not (tmp_path / "cache").exists()


def test_what_leaves_memory_moves_down_where_it_is_not_yet(make):
    system = make(l2_cache_size=8 * ITEM_BYTES, l3_cache_size=10**6)
    for i in range(8):
        system.l2_cache.store(key_of(i), item_of(i), saved_s=1.0, kind="general")
    assert system.l3_cache.load(key_of(0)) is None
    system.put(key_of(8), item_of(8), saved_s=1.0)
    assert same(system.l3_cache.load(key_of(0)), item_of(0))
    assert system.stats()["levels"]["ssd"]["migrations"] == 1


def test_what_is_not_to_persist_stays_in_memory(make, tmp_path):
    system = make(l2_cache_size=8 * ITEM_BYTES)
    for i in range(12):
        system.put(key_of(i), item_of(i), saved_s=1.0, persist=False)
    assert system.stats()["levels"]["cpu"]["evictions"] == 4
    assert not (tmp_path / "cache").exists()


def test_a_slow_disk_is_not_asked_for_what_is_computed_sooner(make):
    system = make(enable_l2_cpu_cache=False)
    system.put(key_of(1), item_of(1), saved_s=1.0)
    system.l3_cache._measured_bytes_per_s = 1e6  # 20 kB take 20 ms
    assert system.get(key_of(1), compute_s=0.005) is None
    assert system.stats()["levels"]["ssd"]["declined"] == 1
    assert system.get(key_of(1), compute_s=1.0) is not None


def test_the_speed_of_the_disk_and_of_computing_are_kept_for_the_next_process(make):
    clock = Clock()
    system = make(timer=clock)

    def compute(indices):
        clock.now_s += 3.0
        return [item_of(index) for index in indices]

    system.resolve([key_of(0), key_of(1)], compute, kind="vision", units=[100, 200])
    assert system.predict_compute_s("vision", 50) == pytest.approx(0.5)
    assert system.predict_compute_s("other", 50) is None
    system.l3_cache._note_read(10**6, 0.5)
    system.close()
    again = make(timer=clock)
    assert again.predict_compute_s("vision", 50) == pytest.approx(0.5)
    assert again.l3_cache.read_bytes_per_s() == 2e6


def test_resolve_computes_in_one_call_what_is_missing_and_each_key_once(make):
    system, calls = make(), []

    def compute(indices):
        calls.append(indices)
        return [item_of(index) for index in indices]

    keys = [key_of(i) for i in (0, 1, 0, 2)]
    found = system.resolve(keys, compute, kind="x", units=[1.0] * 4)
    assert calls == [[0, 1, 3]]
    assert [item.meta["seed"] for item in found] == [0, 1, 0, 3]
    system.resolve([key_of(1), key_of(7)], compute, kind="x", units=[1.0] * 2)
    assert calls[1:] == [[1]]


def test_an_entry_that_the_caller_cannot_use_is_computed(make):
    system = make()
    system.put(key_of(0), item_of(5), saved_s=1.0)
    found = system.resolve(
        [key_of(0)],
        lambda indices: [item_of(0)],
        kind="x",
        units=[1.0],
        accepts=lambda index, item: item.meta["seed"] == 0,
    )
    assert same(found[0], item_of(0))


@pytest.mark.parametrize("enabled", [True, False], ids=["with levels", "without"])
def test_threads_that_ask_at_once_compute_once(make, enabled):
    system = make(enable_l2_cpu_cache=enabled, enable_l3_ssd_cache=enabled)
    computing, go, results, calls = threading.Event(), threading.Event(), [], []

    def compute():
        calls.append(1)
        computing.set()
        go.wait(20)
        return item_of(1)

    def ask():
        results.append(system.get_or_compute(key_of(1), compute))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    threads[0].start()
    assert computing.wait(20)
    for thread in threads[1:]:
        thread.start()
    while sum(thread.is_alive() for thread in threads) < 6:
        pass
    go.set()
    for thread in threads:
        thread.join()
    assert all(same(result, item_of(1)) for result in results)
    assert len(results) == 6
    if enabled:
        assert len(calls) == 1
    for result in results:
        result.tensors["values"].zero_()  # nobody shares what another was given
    assert not enabled or same(system.get(key_of(1)), item_of(1))


def test_where_computing_fails_the_next_one_who_waits_computes(make):
    system = make()
    started, fail = threading.Event(), threading.Event()

    def failing():
        started.set()
        fail.wait(20)
        raise RuntimeError("no")

    errors, found = [], []

    def first():
        try:
            system.get_or_compute(key_of(1), failing)
        except RuntimeError as error:
            errors.append(error)

    one = threading.Thread(target=first)
    one.start()
    assert started.wait(20)
    other = threading.Thread(target=lambda: found.append(system.get_or_compute(key_of(1), lambda: item_of(1))))
    other.start()
    fail.set()
    one.join()
    other.join()
    assert [str(error) for error in errors] == ["no"]
    assert same(found[0], item_of(1))


def test_two_who_need_each_others_keys_do_not_wait_for_ever(make):
    system = make()
    both = threading.Barrier(2, timeout=20)

    def ask(order):
        def compute(indices):
            if not both.broken:
                try:
                    both.wait(0.2)
                except threading.BrokenBarrierError:
                    pass
            return [item_of(order[index]) for index in indices]

        system.resolve([key_of(i) for i in order], compute, kind="x", units=[1.0] * len(order))

    threads = [threading.Thread(target=ask, args=(order,)) for order in ([1, 2, 3], [3, 2, 1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)


def test_the_memory_is_the_budgets(make):
    budget = Budget(50_000)
    system = make(budget=budget)
    for i in range(10):
        system.put(key_of(i), item_of(i), saved_s=1.0)
    assert system.l2_cache.used_bytes == 50_000 - budget.left <= 50_000
    budget.left -= 40_000
    system.make_room()
    assert budget.left >= 0
    assert same(system.get(key_of(9)), item_of(9))  # from the SSD
    system.close()
    assert budget.left == 10_000


def test_clear_forgets_all(make):
    system = make()
    system.put(key_of(1), item_of(1), saved_s=1.0)
    system.clear()
    assert system.get(key_of(1)) is None


def test_int8_is_a_setting(make):
    system = make(reuse_codec="int8")
    values = torch.randn(64, 1024)
    system.put(key_of(1), type(item_of(1))({"a": values}), saved_s=1.0)
    assert system.l2_cache.used_bytes < 0.27 * values.nbytes
    error = (system.get(key_of(1)).tensors["a"] - values).norm() / values.norm()
    assert 0 < error < 0.02
