"""Threads that use one model take turns, and each gets what it gets alone."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.model.run.turns import Turns
from qwen3_vl_memory_optimizations.process import rss_bytes

from . import tiny


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def start(call):
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def queue_up(turns, calls):
    """Start threads that come one after another."""
    threads = []
    for number, call in enumerate(calls):
        threads.append(start(call))
        wait_for(lambda number=number: turns.waiting == number + 1)
    return threads


def test_turns_are_taken_in_the_order_in_which_threads_came():
    turns, order = Turns(), []

    def take(number):
        with turns:
            order.append(number)
            time.sleep(0.001)

    with turns:
        threads = queue_up(turns, [lambda number=number: take(number) for number in range(8)])
    for thread in threads:
        thread.join(20)
    assert order == list(range(8))
    assert turns.waiting == 0


def test_the_thread_that_comes_again_does_not_overtake_the_one_that_waits():
    turns, order = Turns(), []

    def other():
        with turns:
            order.append("other")

    with turns:
        (thread,) = queue_up(turns, [other])
    with turns:
        order.append("again")
    thread.join(20)
    assert order == ["other", "again"]


def test_the_thread_that_has_its_turn_may_take_it_again():
    turns, entered = Turns(), threading.Event()

    def other():
        with turns:
            entered.set()

    with turns:
        with turns, turns:
            (thread,) = queue_up(turns, [other])
        time.sleep(0.02)
        assert not entered.is_set()  # the inner ones did not let go
    thread.join(20)
    assert entered.is_set()


def test_an_error_gives_the_turn_back():
    turns, done = Turns(), []
    with pytest.raises(KeyError), turns:
        (thread,) = queue_up(turns, [lambda: turns.__enter__() and done.append(1) or turns.__exit__(None, None, None)])
        with turns:
            raise KeyError("inside")
    thread.join(20)
    assert done == [1]
    with turns:
        pass


class Interrupted(Exception):
    pass


def interrupt(thread):
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupted)) == 1


def test_a_waiter_that_is_interrupted_leaves_the_queue_to_the_others(monkeypatch):
    turns, order, stop = Turns(), [], threading.Event()
    plain = threading.Event.wait

    def wait(self, timeout=None):
        # As Ctrl-C does it in the main thread, an error comes while the thread waits.
        while not plain(self, 0.002):
            if threading.current_thread().name == "interrupted" and stop.is_set():
                raise Interrupted

    monkeypatch.setattr(threading.Event, "wait", wait)

    def take(name):
        threading.current_thread().name = name
        try:
            with turns:
                order.append(name)
        except Interrupted:
            order.append(f"{name} left")

    with turns:
        threads = queue_up(turns, [lambda name=name: take(name) for name in ("first", "interrupted", "last")])
        stop.set()
        wait_for(lambda: turns.waiting == 2)
    for thread in threads:
        thread.join(20)
    assert order == ["interrupted left", "first", "last"]
    with turns:
        pass


def test_a_turn_that_comes_together_with_an_interrupt_is_passed_on(monkeypatch):
    turns, order = Turns(), []
    plain = threading.Event.wait

    def wait(self, timeout=None):
        found = plain(self, timeout)
        if threading.current_thread().name == "interrupted":
            raise Interrupted
        return found

    def take(name):
        threading.current_thread().name = name
        try:
            with turns:
                order.append(name)
        except Interrupted:
            order.append(f"{name} left")

    with turns:
        threads = queue_up(turns, [lambda: take("interrupted"), lambda: take("last")])
        monkeypatch.setattr(threading.Event, "wait", wait)
        threads[0].name = "interrupted"
    for thread in threads:
        thread.join(20)
    assert order[-1] == "last"
    with turns:
        pass


@pytest.mark.parametrize("settings", [{"codec": "none"}, {"codec": "none", "prefix_reuse": "on"}, {"codec": "int8"}])
@torch.no_grad()
def test_threads_that_generate_about_images_get_what_each_gets_alone(tmp_path, settings):
    budget = rss_bytes() + 600 * 2**20
    images, _, questions, _ = tiny.heldout()
    given = [
        tiny.batch([tiny.prompt(questions[number], n_images=1 + number % 2)], images[number : number + 1 + number % 2])
        for number in range(4)
    ]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    alone = []
    model = create_optimized_model(tiny.DIRECTORY, {"cache_dir": tmp_path / "a", "ram_budget": budget, **settings})
    with model.memory_optimizer:
        alone = [model.generate(**inputs, **options) for inputs in given]
    model = create_optimized_model(tiny.DIRECTORY, {"cache_dir": tmp_path / "b", "ram_budget": budget, **settings})
    found, errors = [[] for _ in given], []

    def ask(number):
        try:
            with torch.no_grad():
                for _ in range(3):
                    found[number].append(model.generate(**given[number], **options))
        except BaseException as error:
            errors.append(error)

    with model.memory_optimizer:
        threads = [start(lambda number=number: ask(number)) for number in range(4)]
        for thread in threads:
            thread.join(120)
        assert not errors and not any(thread.is_alive() for thread in threads)
        for each, expected in zip(found, alone, strict=True):
            assert len(each) == 3
            assert all(torch.equal(answer, expected) for answer in each)


@torch.no_grad()
def test_a_thread_whose_call_fails_does_not_keep_the_others_waiting(tmp_path):
    model = create_optimized_model(tiny.DIRECTORY, {"codec": "none", "cache_dir": tmp_path})
    inputs, errors, found = tiny.cases()["image"], [], []
    expected = tiny.reference().generate(**inputs, max_new_tokens=6, do_sample=False)

    def fail():
        with pytest.raises(Exception, match="max_new_tokens"):
            model.generate(**inputs, max_new_tokens=-3)
        errors.append(1)

    def ask():
        with torch.no_grad():
            found.append(model.generate(**inputs, max_new_tokens=6, do_sample=False))

    with model.memory_optimizer:
        threads = [start(call) for call in (fail, ask, fail, ask)]
        for thread in threads:
            thread.join(60)
        assert len(errors) == 2 and len(found) == 2
        assert all(torch.equal(each, expected) for each in found)
