import gc
import logging
import threading
import time
import weakref

import pytest

from qwen3_vl_memory_optimizations.storage import BACKGROUND, DEMAND, PREFETCH, IOQueue


class Gate:
    """Holds the only worker of a queue until it is opened, so that the order of the rest can be seen."""

    def __init__(self, queue):
        self._open = threading.Event()
        running = threading.Event()
        queue.submit(lambda: (running.set(), self._open.wait(5)), DEMAND)
        assert running.wait(5)

    def open(self):
        self._open.set()


def test_lower_priority_first_and_first_come_first_served_inside_one():
    order = []
    with IOQueue(1) as queue:
        gate = Gate(queue)
        for name, priority in [
            ("b1", BACKGROUND),
            ("p1", PREFETCH),
            ("d1", DEMAND),
            ("p2", PREFETCH),
            ("d2", DEMAND),
        ]:
            queue.submit(lambda name=name: order.append(name), priority)
        gate.open()
    assert order == ["d1", "d2", "p1", "p2", "b1"]


def test_promote_moves_a_waiting_job_behind_those_of_its_new_priority():
    order = []
    with IOQueue(1) as queue:
        gate = Gate(queue)
        queue.submit(lambda: order.append("p1"), PREFETCH)
        late = queue.submit(lambda: order.append("p2"), PREFETCH)
        queue.submit(lambda: order.append("d1"), DEMAND)
        assert queue.promote(late, DEMAND)
        assert not queue.promote(late, DEMAND)
        assert not queue.promote(late, BACKGROUND)
        assert late.queued
        gate.open()
    assert order == ["d1", "p2", "p1"]
    assert not late.queued
    assert not queue.promote(late, DEMAND)


def test_submit_does_not_wait_and_pending_counts_down():
    release = threading.Event()
    queue = IOQueue(2)
    assert queue.pending == 0
    start_s = time.perf_counter()
    for _ in range(50):
        queue.submit(lambda: release.wait(5), PREFETCH)
    assert time.perf_counter() - start_s < 1
    assert queue.pending == 50
    release.set()
    queue.close()
    assert queue.pending == 0


def test_threads_start_with_the_first_job_and_stop_with_close():
    others = set(threading.enumerate())  # of models that were dropped, and are about to end

    def names():
        mine = set(threading.enumerate()) - others
        return sorted(thread.name for thread in mine if thread.name.startswith("io-"))

    queue = IOQueue(3)
    assert names() == []
    queue.submit(lambda: None, DEMAND)
    assert names() == ["io-0", "io-1", "io-2"]
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("io-"))
    queue.close()
    queue.close()
    assert names() == []
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit(lambda: None, DEMAND)


def test_closing_a_queue_that_was_never_used():
    IOQueue().close()


def test_jobs_run_at_the_same_time():
    meeting = threading.Barrier(4)
    with IOQueue(4) as queue:
        for _ in range(4):
            queue.submit(lambda: meeting.wait(5), DEMAND)
    assert not meeting.broken


def test_a_job_that_raises_is_logged_and_the_worker_goes_on(caplog):
    done = []

    def fail():
        raise SystemExit("lost block 7")

    with caplog.at_level(logging.ERROR), IOQueue(1) as queue:
        queue.submit(fail, DEMAND)
        queue.submit(lambda: done.append(1), DEMAND)
    assert done == [1]
    assert "lost block 7" in caplog.text


def test_a_job_may_submit_jobs():
    done = threading.Event()
    with IOQueue(1) as queue:
        queue.submit(lambda: queue.submit(done.set, DEMAND), DEMAND)
        assert done.wait(5)


def test_a_finished_job_is_not_kept_alive():
    class Block:
        pass

    with IOQueue(1) as queue:
        block = Block()
        watch = weakref.ref(block)
        ticket = queue.submit(lambda block=block: None, DEMAND)
        del block
        while queue.pending:
            time.sleep(0.001)
        gc.collect()
        assert watch() is None
        assert not ticket.queued


def test_background_jobs_run_one_at_a_time_beside_others():
    running, most, both = 0, 0, threading.Lock()
    first_runs, release = threading.Event(), threading.Event()

    def background():
        nonlocal running, most
        with both:
            running += 1
            most = max(most, running)
        first_runs.set()
        release.wait(5)
        with both:
            running -= 1

    with IOQueue(4) as queue:
        for _ in range(3):
            queue.submit(background, BACKGROUND)
        assert first_runs.wait(5)
        done = threading.Event()
        queue.submit(done.set, PREFETCH)
        assert done.wait(5), "others do not wait for them"
        waiting = queue.submit(done.clear, BACKGROUND)
        assert queue.promote(waiting, PREFETCH)
        while done.is_set():
            time.sleep(0.001)
        release.set()
    assert most == 1 and running == 0


def test_closing_waits_for_background_jobs_and_for_no_thread_that_has_nothing_to_do():
    for _ in range(3):
        queue, running, go = IOQueue(4), threading.Event(), threading.Event()
        done = []

        def first(running=running, go=go, done=done):
            running.set()
            go.wait(5)
            done.append("first")

        queue.submit(first, BACKGROUND)
        assert running.wait(5)
        for _ in range(2):  # long enough for those that were woken to wait again
            queue.submit(lambda done=done: (time.sleep(0.02), done.append("later")), BACKGROUND)
        closing = threading.Thread(target=queue.close, daemon=True)
        closing.start()
        while not queue._closed:
            time.sleep(0.001)
        go.set()
        closing.join(5)
        assert not closing.is_alive(), "a worker waits for good"
        assert done == ["first", "later", "later"]
