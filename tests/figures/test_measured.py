"""Rates that are read several times."""

import itertools

import pytest

from qwen3_vl_memory_optimizations.figures import Reading, read_rates


class Clock:
    """A clock that only runs of known length move."""

    now_s = 0.0

    def __call__(self):
        return self.now_s

    def runs(self, seconds):
        lengths = itertools.cycle(seconds)

        def run():
            self.now_s += next(lengths)

        return run


def test_a_rate_is_work_per_second():
    clock = Clock()
    rates = read_rates({"fast": (clock.runs([0.001]), 5.0), "slow": (clock.runs([0.1]), 5.0)}, timer=clock)
    assert rates["fast"].per_s == pytest.approx(5000.0)
    assert rates["slow"].per_s == pytest.approx(50.0)
    assert rates["fast"].spread == pytest.approx(0.0)


def test_interrupted_runs_are_no_part_of_a_reading():
    clock = Clock()
    rates = read_rates({"": (clock.runs([0.001, 0.007, 0.003]), 1.0)}, timer=clock)
    assert rates[""].per_s == pytest.approx(1000.0)


def test_readings_that_differ_have_a_spread():
    assert Reading.of([2.0, 27.0, 27.0, 27.0, 2.2]).per_s == 27.0
    assert Reading.of([2.0, 27.0, 27.0, 27.0, 2.2]).spread > 0.2
    assert Reading.of([27.0, 27.1, 26.9]).spread < 0.01


def test_slow_runs_are_read_twice():
    clock, counted = Clock(), []

    def run():
        counted.append(True)
        clock.now_s += 2.0

    read_rates({"": (run, 1.0)}, timer=clock)
    assert len(counted) == 1 + 2
