"""Ctrl-C at any moment of a `generate` leaves a model that answers right, with all accounts even."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sys
import threading
import time

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.interrupts import ShieldedLock, _Deferrable, deferrable, shield, wait_for

from .model import tiny

INTERRUPTS = int(os.environ.get("QWEN3VL_MEM_INTERRUPTS", "60"))
OPTIONS = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


@contextlib.contextmanager
def interrupts(seed: int):
    """Raise KeyboardInterrupt every 1 to 25 ms, as an alarm does whose handler raises; give the count."""
    draw, count = random.Random(seed), [0]

    def ring(signum, frame):
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.001, 0.025))
        if isinstance(signal.getsignal(signum), _Deferrable):  # within `generate`
            count[0] += 1
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.001, 0.025))
    try:
        yield count
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupt_often(call, n: int, seed: int) -> int:
    """Call again and again until so many interrupts came; return how many calls ended."""
    ended = 0
    while True:
        try:
            with interrupts(seed) as count:
                while count[0] < n:
                    try:
                        call()
                        ended += 1
                    except KeyboardInterrupt:
                        pass
                return ended
        except KeyboardInterrupt:  # between two calls
            n -= count[0]
            seed += 1
            if n <= 0:
                return ended


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"codec": "none", "tensor_budget": 6 << 20}, id="none, above memory"),
        pytest.param({"codec": "int8", "tensor_budget": 3 << 20}, id="int8, above memory"),
        pytest.param({"codec": "int8"}, id="int8"),
    ],
)
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # those between two calls
def test_random_interrupts_leave_a_model_that_answers_right(settings, tmp_path, monkeypatch):
    # pytest would keep exceptions of finalizers, and with them the frames of `generate`
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    prompts = [torch.randint(7, 60, (1, n), generator=torch.Generator().manual_seed(n)) for n in (20, 90, 400)]
    model = create_optimized_model(tiny.DIRECTORY, {**settings, "cache_dir": tmp_path})
    optimizer = model.memory_optimizer
    expected = [model.generate(input_ids=ids, **OPTIONS) for ids in prompts]
    turn = iter(range(1 << 30))
    interrupt_often(lambda: model.generate(input_ids=prompts[next(turn) % 3], **OPTIONS), INTERRUPTS, seed=0)
    for ids, was in zip(prompts, expected, strict=True):
        assert torch.equal(model.generate(input_ids=ids, **OPTIONS), was)
    done = []
    other = threading.Thread(target=lambda: done.append(model.generate(input_ids=prompts[0], **OPTIONS)), daemon=True)
    other.start()
    other.join(60)
    assert done and torch.equal(done[0], expected[0])  # the turn was given back
    gc.collect()
    optimizer.pager.debit("test", 0)  # runs what finalizers queued while another thread held the lock
    optimizer.pager.check()
    held = {page.entry.tensor_id for entry in optimizer.pager.entries.values() for page in entry.pages if page.pins}
    assert held == set() and not shield.up
    assert optimizer.lifecycle.sessions_open == 0
    optimizer.close()


def test_an_interrupt_waits_for_the_end_of_a_block():
    order = []
    with pytest.raises(KeyboardInterrupt), deferrable():
        try:
            with shield:
                with shield:
                    signal.raise_signal(signal.SIGINT)
                    order.append("inner")
                order.append("outer")
            order.append("never")
        finally:
            order.append("after")
    assert order == ["inner", "outer", "after"] and not shield.up


def test_without_a_block_around_it_a_handler_is_what_it_was():
    before = signal.getsignal(signal.SIGINT)
    with deferrable():
        assert signal.getsignal(signal.SIGINT) is not before
        with deferrable():
            pass
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_who_waits_is_interrupted():
    event = threading.Event()
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    start_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt), deferrable(), shield:
        wait_for(event)
    assert time.monotonic() - start_s < 5


def test_a_lock_that_several_hold_is_given_back():
    lock = ShieldedLock()
    condition = threading.Condition(lock)
    with pytest.raises(KeyboardInterrupt), deferrable(), condition, lock:
        signal.raise_signal(signal.SIGINT)
    taken = []
    thread = threading.Thread(target=lambda: taken.append(lock.acquire(blocking=False)))
    thread.start()
    thread.join()
    assert taken == [True]


def test_other_threads_hold_nothing_back():
    inside = []
    thread = threading.Thread(
        target=lambda: [shield.__enter__(), inside.append(shield.up), shield.__exit__(None, None, None)]
    )
    thread.start()
    thread.join()
    assert inside == [False]
