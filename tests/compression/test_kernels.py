"""Kernels are chosen by time."""

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations.compression import (
    INT8Codec,
    KernelSelector,
)
from qwen3_vl_memory_optimizations.compression.kernels import row_class

from .contract import assert_snr, decoded, product


def iter_timer(durations):
    """A clock that says each timed run took so many seconds, in turn."""
    now, starting, left = 0.0, True, iter(durations)

    def timer():
        nonlocal now, starting
        if not starting:
            now += next(left)
        starting = not starting
        return now

    return timer


@pytest.mark.parametrize(
    ("exact", "rough", "chosen"),
    [
        ([50, 50, 50], [10, 10, 10], "rough"),
        ([50, 50, 50], [48, 48, 48], "exact"),  # not faster by the margin
        ([90, 90, 20], [50, 50, 50], "exact"),  # the best run counts
        ([50, 50, 50], [90, 10, 90], "rough"),
    ],
)
def test_candidates_take_turns_and_the_fastest_stays(exact, rough, chosen):
    warming_up = [999, 999]
    turns = [seconds for pair in zip(exact, rough, strict=True) for seconds in pair]
    selector = KernelSelector(timer=iter_timer(warming_up + turns))
    calls = []

    def kernel(name):
        return lambda: calls.append(name) or torch.tensor(float(len(name)))

    candidates = {"exact": kernel("exact"), "rough": kernel("rough")}
    for turn in range(8):
        assert not selector.choices() or not selector.choices()["key"].name
        assert selector.run("key", candidates) == len(("exact", "rough")[turn % 2])
    assert calls == ["exact", "rough"] * 4
    selector.run("key", candidates)
    assert calls[8:] == [chosen]
    assert selector.choices()["key"].name == chosen
    assert selector.choices()["key"].seconds == {"exact": min(exact), "rough": min(rough)}


def test_a_choice_made_in_a_bad_moment_is_mended():
    disturbed = [1, 1] + [9, 12] * 3  # the second candidate was slow while others ran
    selector = KernelSelector(timer=iter_timer([*disturbed, 9, 5]))
    candidates = {"exact": lambda: torch.tensor(0.0), "rough": lambda: torch.tensor(1.0)}
    chosen = []
    for _ in range(8 + 16):
        selector.run("key", candidates)
        chosen.append(selector.choices()["key"].name)
    assert (chosen[8], chosen[-1]) == ("exact", "rough")


def test_a_kernel_that_is_far_slower_is_not_tried_again():
    selector = KernelSelector(timer=iter_timer([1, 1] + [9, 90] * 3 + [9] * 100))
    calls = []
    candidates = {"exact": lambda: torch.tensor(0.0), "rough": lambda: calls.append(1) or torch.tensor(1.0)}
    for _ in range(200):
        selector.run("key", candidates)
    assert len(calls) == 4


def test_times_are_compared_a_unit_of_work():
    selector = KernelSelector(timer=iter_timer([1, 1] + [30, 20] * 3))
    candidates = {"exact": lambda: torch.tensor(0.0), "rough": lambda: torch.tensor(1.0)}
    for turn in range(8):
        selector.run("key", candidates, work=(3, 1)[turn % 2])
    assert selector.choices()["key"].name == "exact"


def test_rows_are_classed_by_powers_of_two():
    assert [row_class(n) for n in (1, 2, 3, 5, 8, 9, 1000, 5000)] == [1, 2, 4, 8, 8, 16, 1024, 1024]


def test_a_choice_made_for_one_shape_is_not_forced_on_another():
    """A last page of rows that 4 does not divide must not go to the packed kernel."""
    codec = INT8Codec(KernelSelector(timer=iter_timer([9] * 3 + [1, 9, 9] * 30)))
    weights = torch.randn(10, 64)
    encoded = codec.encode(weights)
    x = torch.randn(6, 64)
    for rows in [slice(0, 8)] * 12 + [slice(8, 10)]:
        part = {name: segment[rows] for name, segment in encoded.items()}
        exact = F.linear(x.double(), decoded(codec, part, torch.float64))
        assert_snr(exact, product(codec, x, part), 44, f"{rows}")
