"""Locks are taken in the order that docs/locking.md gives, whatever threads do; and the instrument sees it if not."""

import re
import threading
from pathlib import Path

import pytest

from qwen3_vl_memory_optimizations.paging import PressureMonitor
from qwen3_vl_memory_optimizations.storage import direct_io
from tests.stress.locks import LockGraph
from tests.stress.machine import BUDGET_BYTES, N_THREADS, Machine

DOCUMENT = Path(__file__).parents[2] / "docs" / "locking.md"
GATE = "Pager"
WAITS_WITH_A_LOCK = {("Pager", "PredictiveGarbageCollector")}


def documented_order():
    return re.findall(r"^\d+\. `(\w+)`", DOCUMENT.read_text(), re.MULTILINE)


def test_locks_are_taken_in_the_documented_order(tmp_path, monkeypatch):
    graph = LockGraph()
    monkeypatch.setattr(direct_io, "_probe_lock", graph.noted(threading.Lock(), "DirectFile"))
    monkeypatch.setattr(direct_io, "_direct_by_device", {})
    with graph.watching():
        machine = Machine(tmp_path, seed=7, interval_s=0.02)
        monitor = PressureMonitor(machine.optimizer.pager, BUDGET_BYTES, also=machine.optimizer.swapping.look)
        monitor.start()
        machine.run(3000 // N_THREADS)
        assert not machine.failures, machine.failures[0]
        monitor.close()
        machine.close()
    order = documented_order()
    events = {"PressureMonitor", "Flight", "Periodic"}
    of_numpy = {"LightweightMLPredictor", "SimpleMLPredictor"}  # which takes one or none, by its version
    assert set(order) - of_numpy <= graph.names - events <= set(order), "the document lists each lock"
    assert not graph.disorder(order, GATE)
    assert not graph.cycles()
    assert set(graph.waits) <= WAITS_WITH_A_LOCK, graph.waits
    assert {("Pager", "SwapFile"), ("Pager", "IOQueue"), ("PredictiveGarbageCollector", "Pager")} <= set(graph.gates)


@pytest.fixture
def graph():
    return LockGraph()


def take(*locks):
    """Take locks one inside the other, in a thread of its own."""

    def run(left):
        if left:
            with left[0]:
                run(left[1:])

    thread = threading.Thread(target=run, args=(locks,))
    thread.start()
    thread.join()


def named(graph, *names):
    return [graph.noted(threading.RLock(), name) for name in names]


def test_a_cycle_is_seen_though_nobody_waited(graph):
    a, b, c = named(graph, "a", "b", "c")
    take(a, b)
    take(b, c)
    assert not graph.cycles()
    take(c, a)
    assert graph.cycles() == [["a", "b", "c"]]
    assert set(graph.disorder(["a", "b", "c"], gate="none")) == {("c", "a")}


def test_what_is_only_done_by_one_thread_at_a_time_is_no_cycle(graph):
    gate, a, b = named(graph, "gate", "a", "b")
    take(gate, a, b)
    take(gate, b, a)
    assert not graph.cycles() and not graph.disorder(["gate", "a", "b"], gate="gate")
    take(b, a)  # past the gate, while another thread comes through it
    assert graph.cycles() == [["a", "b"]]
    assert set(graph.disorder(["gate", "a", "b"], gate="gate")) == {("b", "a")}


def test_a_lock_that_is_taken_only_if_it_is_free_is_not_waited_for(graph):
    a, b = named(graph, "a", "b")
    take(a, b)
    with b:
        assert a.acquire(blocking=False)
        a.release()
    assert not graph.cycles()


def test_who_waits_for_a_change_with_a_lock_in_hand_is_seen(graph):
    a, b = named(graph, "a", "b")
    changed = threading.Condition(a)
    with a, changed:
        changed.wait(0.01)
    assert not graph.waits
    assert graph.stack() == []
    with b, a:
        changed.wait(0.01)
        assert graph.stack() == ["b", "a"]
    assert set(graph.waits) == {("a", "b")}


def test_a_lock_that_is_not_in_the_order_is_out_of_it(graph):
    a, b = named(graph, "a", "b")
    take(a, b)
    assert set(graph.disorder(["a"], gate="none")) == {("a", "b")}
