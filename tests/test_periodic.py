import threading

import pytest

from qwen3_vl_memory_optimizations import ConfigurationError
from qwen3_vl_memory_optimizations.periodic import Periodic


def test_it_works_again_and_again_until_there_is_no_more_to_do():
    ended, count = threading.Event(), []

    def work():
        count.append(1)
        if len(count) == 3:
            ended.set()
        return len(count) < 3

    periodic = Periodic(work, 0.001, "test")
    periodic.start()
    assert ended.wait(10)
    periodic.close()
    assert len(count) == 3 and not periodic.is_alive()


def test_a_shorter_pause_counts_at_once_and_closing_does_not_wait_for_a_long_one():
    worked = threading.Event()
    periodic = Periodic(lambda: worked.set() or True, 1000.0, "test")
    periodic.start()
    assert not worked.wait(0.05)
    periodic.interval_s = 0.001
    assert worked.wait(10)
    periodic.interval_s = 1000.0
    periodic.close()
    assert not periodic.is_alive()


def test_it_can_be_woken_and_no_call_is_lost_while_it_works():
    started, go_on, count = threading.Event(), threading.Event(), []

    def work():
        count.append(1)
        started.set()
        return go_on.wait(10)

    periodic = Periodic(work, 1000.0, "test")
    periodic.start()
    periodic.wake()
    assert started.wait(10)
    started.clear()
    periodic.wake()  # it is at work: once more, then
    periodic.wake()
    go_on.set()
    assert started.wait(10)
    periodic.close()
    assert len(count) == 2


@pytest.mark.parametrize("interval_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_pause_that_is_none_is_refused_and_the_old_one_stays(interval_s):
    periodic = Periodic(lambda: True, 2.0, "test")
    with pytest.raises(ConfigurationError, match="above zero"):
        periodic.interval_s = interval_s
    assert periodic.interval_s == 2.0


def test_work_that_raises_is_logged_counted_and_done_again(caplog):
    ended, count = threading.Event(), []

    def work():
        count.append(1)
        if len(count) < 3:
            raise ZeroDivisionError("lost count")
        ended.set()
        return True

    periodic = Periodic(work, 0.001, "counting")
    periodic.start()
    assert ended.wait(10)
    assert periodic.is_alive()
    periodic.close()
    assert periodic.failures == 2 and isinstance(periodic.last_error, ZeroDivisionError)
    assert "counting: failed (2 times so far)" in caplog.text and "lost count" in caplog.text
