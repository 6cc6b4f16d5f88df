import gc
import time
import weakref

import pytest

from qwen3_vl_memory_optimizations import PredictiveGarbageCollector
from qwen3_vl_memory_optimizations.collection import Held

HORIZON = 10


class MemoryStore:
    """A store that keeps its things in a dict: the reference for what a collector may ask."""

    def __init__(self, full=0.0, below=True):
        self.full, self.below = full, below
        self.things, self.stored = {}, set()
        self.log = []

    def put(self, key, n_bytes=100, *, compressed=False, stored=False):
        self.things[key] = Held(n_bytes, compressed)
        if stored:
            self.stored.add(key)

    def is_stored(self, key):
        return key in self.stored

    def held(self):
        return dict(self.things)

    def used(self):
        return []

    def pressure(self):
        return self.full

    def compress(self, key):
        held = self.things[key]
        self.things[key] = Held(held.n_bytes // 2, True)
        self.log.append(("compress", key))
        return held.n_bytes - held.n_bytes // 2

    def swap(self, key):
        if not self.below:
            return 0
        self.log.append(("swap", key))
        return self.things.pop(key).n_bytes

    def free(self, key):
        self.log.append(("free", key))
        return self.things.pop(key).n_bytes


def make(store, horizon=HORIZON):
    collector = PredictiveGarbageCollector(horizon)
    collector.stores.append(store)
    return collector


def use(collector, store, key, **held):
    if key not in store.things:
        store.put(key, **held)
    collector.note(key, 100, "cached")


def rounds(collector, n):
    for _ in range(n):
        collector.end_round()


def test_something_unused_goes_down_one_stage_a_collection_in_order():
    store = MemoryStore()
    collector = make(store)
    use(collector, store, "a")
    rounds(collector, 13)
    assert store.log == []
    rounds(collector, 2)
    assert store.log == [("compress", "a")]
    rounds(collector, 4)
    assert store.log == [("compress", "a"), ("swap", "a")] and collector.has_collected("a")
    stats = collector.stats()
    assert (stats["compressed"], stats["compressed_bytes"]) == (1, 50)
    assert (stats["swapped"], stats["swapped_bytes"], stats["freed"]) == (1, 50, 0)


def test_what_would_first_have_to_be_written_is_forgotten_when_nobody_can_want_it():
    store = MemoryStore(below=False)
    collector = make(store)
    use(collector, store, "a", compressed=True)
    rounds(collector, 20)
    assert store.log == []
    rounds(collector, 4)
    assert store.log == [("free", "a")] and collector.stats()["freed_bytes"] == 100


def test_what_the_ssd_has_already_is_let_go_of_and_not_forgotten():
    store = MemoryStore()
    collector = make(store)
    use(collector, store, "a", compressed=True, stored=True)
    rounds(collector, 30)
    assert store.log == [("swap", "a")]


def test_what_belongs_to_somebody_is_never_forgotten():
    store = MemoryStore(full=1.0, below=False)
    collector = make(store)
    store.put("a", compressed=True)
    collector.tensor_lifecycle_tracker.born("a", "general", 100, "here", owned=True)
    rounds(collector, 100)
    assert "a" in store.things and store.log == []


def test_full_memory_is_collected_from_sooner():
    empty, full = MemoryStore(), MemoryStore(full=1.0)
    collectors = [make(empty), make(full)]
    when = []
    for collector, store in zip(collectors, (empty, full), strict=True):
        use(collector, store, "a", compressed=True)
        while not store.log:
            rounds(collector, 1)
        when.append(collector.tensor_lifecycle_tracker.now)
    assert when[1] < when[0] < HORIZON * 2


def test_what_is_used_stays():
    store = MemoryStore(full=1.0)
    collector = make(store)
    for _ in range(60):
        use(collector, store, "a")
        rounds(collector, 1)
    assert "a" in store.things and ("swap", "a") not in store.log


def test_packing_waits_for_a_quiet_moment():
    store = MemoryStore(full=1.0)
    collector = make(store)
    use(collector, store, "a")
    rounds(collector, 3)
    collector.tensor_lifecycle_tracker.begin_session()
    collector.tensor_lifecycle_tracker.enter_phase("decode")
    collector.end_round()
    assert store.log == []
    collector.tensor_lifecycle_tracker.end_session()
    collector.end_round()
    assert store.log == [("compress", "a")]


def test_success_is_what_was_not_needed_again():
    store = MemoryStore()
    collector = make(store)
    assert collector.success_rate() is None
    for name in "abcd":
        use(collector, store, name, compressed=True)
    rounds(collector, 19)
    assert len(store.log) == 4
    assert collector.success_rate() is None  # nobody knows yet
    use(collector, store, "a")  # needed within the horizon
    rounds(collector, HORIZON + 1)
    assert collector.success_rate() == pytest.approx(3 / 4)
    use(collector, store, "b")  # later is needed all the same
    rounds(collector, 1)
    assert collector.success_rate() == pytest.approx(2 / 4)
    assert not collector.has_collected("b")


def test_predictions_are_judged_by_what_happened():
    store = MemoryStore()
    collector = make(store)
    assert collector.lifetime_accuracy() is None
    use(collector, store, "a")
    rounds(collector, 1)  # asked when idle for one round: the rule says that it is used
    assert collector.lifetime_accuracy() is None
    rounds(collector, HORIZON)
    # Asked at idle 1 to 4, it said yes, later no: those due by now are the first one, and it was wrong.
    assert collector.lifetime_accuracy() == 0.0
    rounds(collector, HORIZON)
    # It is asked about while it was used within the horizon: ten times, of which those at idle 5 to 10 came true.
    assert collector.lifetime_accuracy() == pytest.approx(6 / 10)
    assert collector.stats()["base_rate"] == 1.0


def test_the_regression_decides_once_it_is_better_and_tells_things_that_return_from_those_that_do_not():
    store = MemoryStore()
    collector = make(store)
    assert collector.decides == "rule"
    for number in range(120):
        for key, kind in ((f"answer {number}", "answer"), (f"prompt {number % 6}", "prompt")):
            if key not in store.things:
                store.put(key, compressed=True)
            collector.note(key, 100, kind)
        rounds(collector, 1)
    assert collector.decides == "regression"
    assert collector.reuse_probability("prompt 2") > 0.8 > 0.2 > collector.reuse_probability("answer 119")
    kept = {key.split()[0] for key in store.things}
    assert kept == {"prompt"} or len(store.things) < 12
    assert collector.success_rate() > 0.95 and collector.lifetime_accuracy() > 0.9
    assert collector.reuse_probability("no such thing") is None


def test_things_of_long_ago_are_forgotten():
    store = MemoryStore()
    collector = make(store, horizon=2)
    for number in range(200):
        use(collector, store, number, compressed=True, stored=True)
        rounds(collector, 1)
    assert len(collector.tensor_lifecycle_tracker.lives) < 30


def test_the_thread_collects_after_a_session_and_while_something_is_used_outside_of_one():
    store = MemoryStore()
    collector = make(store)
    collector.start(0.02)
    thread = collector._periodic
    try:
        use(collector, store, "a", compressed=True)
        deadline = time.monotonic() + 10
        while collector.tensor_lifecycle_tracker.now < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert collector.tensor_lifecycle_tracker.now == 1  # nothing was used since: the clock stands still
        time.sleep(0.1)
        assert collector.tensor_lifecycle_tracker.now == 1
        for _ in range(20):
            collector.end_round()
        while not collector.has_collected("a") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert collector.has_collected("a")
    finally:
        collector.close()
    assert not thread.is_alive()


def test_the_thread_keeps_no_collector_alive():
    collector = make(MemoryStore())
    collector.start(0.02)
    thread, gone = collector._periodic, weakref.ref(collector)
    del collector
    deadline = time.monotonic() + 10
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    assert gone() is None
    while thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not thread.is_alive()
