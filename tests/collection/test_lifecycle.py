import gc
import threading

import pytest
import torch

from qwen3_vl_memory_optimizations import ConfigurationError, TensorLifecycleTracker
from qwen3_vl_memory_optimizations.collection import Leak


class Thing:
    pass


def test_a_life_knows_its_context_and_its_past():
    tracker = TensorLifecycleTracker()
    session = tracker.begin_session()
    tracker.enter_phase("prefill")
    life = tracker.born("a", "general", 100, "here", owned=True)
    assert (life.session, life.phase, life.creator, life.uses) == (session, "prefill", "here", 1)
    tracker.next_round()
    tracker.next_round()
    tracker.used("a")
    situation = tracker.situation(life)
    assert (situation.idle, situation.uses, situation.age, situation.gap) == (0, 2, 2, 2)
    assert situation.session_open
    tracker.next_round()
    tracker.end_session()
    situation = tracker.situation(life)
    assert (situation.idle, situation.age, situation.session_open) == (1, 3, False)


def test_uses_and_deaths_of_what_is_not_known_change_nothing():
    tracker = TensorLifecycleTracker()
    tracker.used("x")
    tracker.died("x")
    tracker.refer("x", Thing(), "nobody")
    assert tracker.stats()["kinds"] == {}


def test_what_is_still_referenced_when_its_session_ends_is_a_leak_until_it_goes():
    tracker = TensorLifecycleTracker()
    kept, other = Thing(), Thing()
    before = tracker.born("before", "general", 1, "outside", owned=True, reference=kept)
    session = tracker.begin_session()
    tracker.enter_phase("decode")
    tracker.born("kept", "kv_cache", 4096, "chat.py:3", owned=True, reference=kept)
    dropped = tracker.born("dropped", "general", 8, "chat.py:4", owned=True, reference=other)
    tracker.born("cached", "vision", 8, "cache", owned=False)
    assert (before.reference_count, dropped.reference_count) == (1, 1)
    del other
    gc.collect()
    assert dropped.reference_count == 0
    tracker.end_session()
    leak = Leak("kept", "kv_cache", 4096, "chat.py:3", session, "decode")
    assert tracker.leaks() == [leak]
    assert tracker.stats()["outlived_sessions"] == 1
    tracker.died("kept")
    tracker.stats()  # deaths are counted by whoever looks next
    assert tracker.leaks() == []
    assert tracker.stats()["outlived_sessions"] == 1


def test_sessions_nest_and_each_thread_ends_its_own():
    tracker = TensorLifecycleTracker()
    mine = tracker.begin_session()
    theirs = []

    def work():
        theirs.append(tracker.begin_session())
        barrier.wait(10)
        barrier.wait(10)
        theirs.append(tracker.end_session())

    barrier = threading.Barrier(2)
    thread = threading.Thread(target=work)
    thread.start()
    barrier.wait(10)
    inner = tracker.begin_session()
    assert tracker.born("a", "general", 1, "", owned=True).session == inner
    assert tracker.end_session() == inner
    assert tracker.end_session() == mine
    assert tracker.sessions_open == 1
    barrier.wait(10)
    thread.join(10)
    assert theirs[0] == theirs[1] and tracker.sessions_open == 0
    with pytest.raises(ConfigurationError, match="no session"):
        tracker.end_session()


def test_a_session_begun_in_another_thread_can_be_ended():
    tracker = TensorLifecycleTracker()
    thread = threading.Thread(target=tracker.begin_session)
    thread.start()
    thread.join(10)
    tracker.end_session()
    assert tracker.sessions_open == 0


def test_phases_are_those_of_sessions():
    tracker = TensorLifecycleTracker()
    tracker.enter_phase("decode")
    assert tracker.phase == "idle"
    tracker.begin_session()
    tracker.enter_phase("decode")
    assert tracker.phase == "decode"
    tracker.end_session()
    assert tracker.phase == "idle"


def test_lives_are_counted_a_kind():
    tracker = TensorLifecycleTracker()
    for name in ("a", "b", "c"):
        tracker.born(name, "general", 10, "", owned=True)
    tracker.next_round()
    tracker.died("a")
    tracker.next_round()  # the death is counted in the round in which it is noticed: the second has not ended
    tracker.next_round()
    tracker.died("b")
    row = tracker.stats()["kinds"]["general"]
    assert row == {"births": 3, "deaths": 2, "alive": 1, "alive_bytes": 10, "mean_rounds": 2.0}


def test_the_tracker_follows_the_tensors_of_an_optimizer_and_names_who_made_them(make_optimizer):
    optimizer = make_optimizer(8 << 20)
    with optimizer.inference_session():
        kept = optimizer.allocate_tensor((1 << 20,), torch.uint8)
        gone = optimizer.allocate_tensor((1 << 20,), torch.uint8, "kv_cache")
        assert gone.nbytes == 1 << 20
        del gone
    (leak,) = optimizer.lifecycle.leaks()
    assert leak.tensor_id == kept.tensor_id and leak.n_bytes == 1 << 20
    assert leak.creator.startswith("test_lifecycle.py:")
    assert leak.creator.endswith("test_the_tracker_follows_the_tensors_of_an_optimizer_and_names_who_made_them")
    kinds = optimizer.get_memory_efficiency_stats()["gc"]["life_cycles"]["kinds"]
    assert kinds["kv_cache"]["deaths"] == 1 and kinds["general"]["alive"] == 1


def test_listeners_hear_each_phase_that_begins_until_they_stop():
    tracker, heard = TensorLifecycleTracker(), []
    tracker.begin_session()
    stop = tracker.listen(heard.append)
    for phase in ("prefill", "decode", "decode"):
        tracker.enter_phase(phase)
    tracker.end_session()
    stop()
    tracker.begin_session()
    tracker.enter_phase("vision")
    assert heard == ["prefill", "decode", "idle"]
