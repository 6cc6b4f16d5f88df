"""Memory is given up when others take it, and taken back. The groups are made up; test_budget.py has real ones."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from qwen3_vl_memory_optimizations.paging import Ledger, Pager, PressureMonitor
from qwen3_vl_memory_optimizations.paging.budget import pressure
from qwen3_vl_memory_optimizations.process import GroupMemory, MemoryStalls
from tests.paging.weights import FRAMES_BYTES, random_weights, register, run_pass, settle

MIB = 2**20
LIMIT = 2048 * MIB


class Machine:
    """What the monitor sees, for a test to change."""

    def __init__(self):
        self.taken, self.files, self.available, self.faults, self.now_s = LIMIT // 2, 100 * MIB, 8192 * MIB, 0, 0.0
        self.stalls = MemoryStalls(None, None)

    def groups(self, *, root):
        used = min(LIMIT, self.taken + self.files)
        files = used - self.taken
        yield GroupMemory(limit_bytes=LIMIT, used_bytes=used, cached_bytes=0, droppable_bytes=0, files_bytes=files)

    def usable(self, *, root, groups):
        assert not groups
        return 16384 * MIB, self.available


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(pressure, "limiting_groups", machine.groups)
    monkeypatch.setattr(pressure, "usable_memory", machine.usable)
    return machine


@pytest.fixture
def pager(tmp_path):
    pager = Pager(Ledger(1024 * MIB, None), swap_dir=tmp_path)
    yield pager
    pager.close()


def watch(pager, machine):
    return PressureMonitor(
        pager,
        LIMIT,
        timer=lambda: machine.now_s,
        major_faults=lambda: machine.faults,
        stalls=lambda: machine.stalls,
    )


def held(pager):
    return pager.ledger.held_bytes(pressure.OWNER)


def test_with_room_nothing_is_given_up(pager, machine):
    monitor = watch(pager, machine)
    machine.faults = 10_000  # libraries are loaded; the group has room
    for machine.now_s in range(5):
        assert monitor.look()
    assert (held(pager), monitor.reliefs) == (0, 0)


def test_what_is_missing_is_given_up_at_once_and_taken_back_when_it_is_calm(pager, machine):
    monitor = watch(pager, machine)
    limit = pager.frames.limit_bytes
    machine.taken = LIMIT - 10 * MIB
    monitor.look()
    assert held(pager) == 50 * MIB  # 10 of 60
    assert pager.frames.limit_bytes == limit - 50 * MIB
    machine.taken -= 50 * MIB
    for machine.now_s in (0.1, 0.5, 5, 10):
        monitor.look()
    assert held(pager) == 50 * MIB, "there is just enough"
    machine.taken -= 300 * MIB
    machine.now_s = 10.5
    monitor.look()
    assert held(pager) == 50 * MIB, "it may be over in a moment"
    for machine.now_s in (11.5, 12.5):
        monitor.look()
    assert (held(pager), pager.frames.limit_bytes) == (0, limit)
    assert (monitor.reliefs, monitor.given_up_bytes) == (1, 50 * MIB)


def test_code_that_is_read_again_and_again_teaches_that_more_room_is_needed(pager, machine):
    monitor = watch(pager, machine)
    machine.taken = LIMIT - 60 * MIB
    monitor.look()
    assert held(pager) == 0, "enough, as far as it is known"
    machine.faults, machine.now_s = 300, 1.0
    monitor.look()
    assert held(pager) == 0, "once is no sign"
    machine.faults, machine.now_s = 600, 2.0
    monitor.look()
    assert held(pager) == (92 * 3 // 2 - 60) * MIB  # 32 more than there was, and half as much again
    for machine.now_s in (3.0, 4.0, 5.0, 6.0, 7.0):
        machine.taken = LIMIT - 60 * MIB - held(pager)
        monitor.look()
    assert held(pager) < 20 * MIB, "what was learnt is doubted after some calm"


def test_short_again_at_the_next_look_more_is_given_up(pager, machine):
    monitor, given = watch(pager, machine), []
    for _ in range(4):
        before, machine.taken = held(pager), LIMIT - 10 * MIB
        monitor.look()
        given.append((held(pager) - before) // MIB)
    assert given == [50, 100, 200, 200]


def test_a_machine_that_runs_short_counts_too(pager, machine):
    monitor = watch(pager, machine)
    machine.available = 100 * MIB
    monitor.look()
    assert held(pager) == (256 * 3 // 2 - 100) * MIB


def test_however_little_room_there_is_weights_keep_some(pager, machine):
    monitor = watch(pager, machine)
    machine.available = 0
    machine.taken = LIMIT
    for _ in range(50):
        monitor.look()
    assert pager.frames.limit_bytes == 64 * MIB


def test_pages_leave_while_another_thread_computes_and_results_stay(tmp_path, machine):
    pager = Pager(Ledger(65 * FRAMES_BYTES + 64 * MIB, None), swap_dir=tmp_path)
    weights = random_weights(64)
    managed = register(pager, weights, tmp_path / "w.safetensors", checksums=True)
    expected = run_pass(managed)
    monitor, ended, wrong = watch(pager, machine), threading.Event(), []

    def compute():
        while not ended.is_set():
            wrong.extend(name for name, found in run_pass(managed).items() if not torch.equal(found, expected[name]))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for step in range(200):
            machine.now_s += 0.6
            machine.taken = LIMIT - (0 if step % 7 == 0 else 500 * MIB)
            monitor.look()
    finally:
        ended.set()
        thread.join()
    settle(pager)
    assert not wrong
    assert monitor.reliefs > 10
    assert pager.frames.used_bytes <= pager.frames.limit_bytes
    pager.close()


def test_it_ends_with_the_pager_and_when_it_is_closed(tmp_path, machine):
    pager = Pager(Ledger(1024 * MIB, None), swap_dir=tmp_path)
    monitor = PressureMonitor(pager, LIMIT, period_s=0.01)
    monitor.start()
    monitor.close()
    assert not monitor._thread.is_alive()
    again = PressureMonitor(pager, LIMIT, period_s=0.01)
    again.start()
    pager.close()
    gone = weakref.ref(pager)
    del pager
    gc.collect()
    assert gone() is None
    again._thread.join(5)
    assert not again._thread.is_alive()


def stall(monitor, machine, n, **stalls):
    """Look at the ends of `n` seconds, in each of which somebody waited for 0.3 s."""
    for _ in range(n):
        machine.now_s += 1
        before = machine.stalls
        machine.stalls = MemoryStalls(*(None if s is None else s + 0.3 * (k in stalls) for k, s in fields(before)))
        monitor.look()


def fields(stalls):
    return (("group_s", stalls.group_s), ("system_s", stalls.system_s))


def test_stalls_in_a_full_group_teach_that_more_room_is_needed(pager, machine):
    machine.taken, machine.files, machine.stalls = LIMIT - 60 * MIB, 60 * MIB, MemoryStalls(5.0, None)
    monitor = watch(pager, machine)
    monitor.look()
    assert held(pager) == 0  # 60 MiB for files are enough, as far as the figures say
    stall(monitor, machine, 1, group_s=True)
    assert held(pager) == 0  # once is no sign
    stall(monitor, machine, 1, group_s=True)
    assert held(pager) > 0


def test_stalls_in_a_group_that_has_room_are_not_ours(pager, machine):
    machine.stalls = MemoryStalls(5.0, None)
    monitor = watch(pager, machine)
    stall(monitor, machine, 5, group_s=True)
    assert held(pager) == 0


def test_where_others_wait_for_memory_twice_as_much_is_left_to_the_machine(pager, machine):
    machine.available, machine.stalls = 400 * MIB, MemoryStalls(None, 0.0)
    monitor = watch(pager, machine)
    monitor.look()
    assert held(pager) == 0
    stall(monitor, machine, 2, system_s=True)
    assert held(pager) > 0
    machine.available = 8192 * MIB  # theirs is the group that is full, not the machine
    given_up = held(pager)
    stall(monitor, machine, 5, system_s=True)
    assert held(pager) < given_up


def test_a_system_that_counts_no_stalls_changes_nothing(pager, machine):
    monitor = watch(pager, machine)
    stall(monitor, machine, 5, group_s=True, system_s=True)
    assert held(pager) == 0 and machine.stalls == MemoryStalls(None, None)


def test_a_look_that_raises_is_logged_and_the_next_one_is_taken(make_optimizer, caplog):
    again, looks = threading.Event(), []

    def also(pager):
        looks.append(1)
        if len(looks) == 1:
            raise ZeroDivisionError("lost count")
        again.set()

    monitor = PressureMonitor(make_optimizer(8 * 2**20).pager, 2**40, also=also, period_s=0.001)
    monitor.start()
    assert again.wait(10)
    monitor.close()
    assert monitor.failures == 1 and isinstance(monitor.last_error, ZeroDivisionError)
    assert "lost count" in caplog.text
