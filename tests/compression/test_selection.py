"""The selector picks what trying everything finds best, and says why."""

import json
import math

import pytest
import torch

from benchmarks.compression.cases import ACCESS, SORTS, draw, exhaustive
from qwen3_vl_memory_optimizations import CompressionMethodSelector, ConfigurationError
from qwen3_vl_memory_optimizations.compression import CodecSpeeds, measure_codec_speeds
from qwen3_vl_memory_optimizations.compression.speeds import MEASURED_CODECS, Line, _line, work_of

NS = 1e-9


def speeds(ssd_bytes_per_s=1e9):
    """Of the order of those of a machine with AVX512, and the same in each run."""
    a_value = {
        "none": (0.0, 0.3, 0.15),
        "int8": (0.7, 0.2, 0.05),
        "fp16": (0.3, 0.2, 0.4),
        "svd": (0.8, 0.02, 0.2),
        "sparse": (5.0, 3.0, 3.5),
    }
    names = ("encode", "decode", "linear")
    lines = {
        codec: {name: Line(5e-6, value * NS) for name, value in zip(names, values, strict=True)}
        for codec, values in a_value.items()
    }
    return CodecSpeeds(lines, ssd_bytes_per_s, "bfloat16", "a test")


@pytest.fixture
def selector():
    return CompressionMethodSelector(speeds())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_picks_what_trying_every_method_finds_best(selector, dtype):
    def seconds_of(codec, matrix):
        fitted = codec.fit(lambda: matrix)
        return fitted, {
            name: selector.speeds.seconds(codec.name, name, work_of(fitted, name, *matrix.shape))
            for name in ("encode", "decode", "linear")
        }

    agreed, chosen_in_all = 0, set()
    n_cases = 15
    for number in range(n_cases):
        _, access, matrix = draw(number, dtype, most_rows=384)
        chosen = selector.explain(matrix, kind="weights", access=access).chosen
        costs = exhaustive(matrix, access, 0.02, selector.speeds.ssd_bytes_per_s, seconds_of)
        agreed += costs[chosen] <= min(costs.values()) / 0.95
        chosen_in_all.add(chosen)
    assert agreed >= 0.95 * n_cases
    assert chosen_in_all == {"none", "int8", "sparse", "svd"} | ({"fp16"} if dtype == torch.float32 else set())
    assert {draw(number, dtype)[:2] for number in range(15)} == {(sort, access) for sort in SORTS for access in ACCESS}


def matrix_of(sort, dtype=torch.bfloat16):
    return draw(SORTS.index(sort), dtype, most_rows=384)[2]


@pytest.mark.parametrize(
    ("sort", "access", "chosen"),
    [
        ("dense Gaussian", "hot", "int8"),
        ("dense Gaussian", "cold", "int8"),
        ("90 % zeros", "cold", "sparse"),
        ("90 % zeros", "hot", "int8"),
        ("low rank", "hot", "svd"),
        ("constant", "streamed", "svd"),
        ("outlier columns", "hot", "none"),
        ("outlier columns", "cold", "none"),
    ],
)
def test_what_is_for_what(selector, sort, access, chosen):
    assert selector.explain(matrix_of(sort), kind="weights", access=access).chosen == chosen


def test_a_slow_disk_makes_bytes_count_more(selector):
    zeros = matrix_of("90 % zeros")
    assert selector.explain(zeros, kind="weights", access="streamed").chosen == "int8"
    slow = CompressionMethodSelector(speeds(ssd_bytes_per_s=5e7))
    assert slow.explain(zeros, kind="weights", access="streamed").chosen == "sparse"


def test_the_error_on_outputs_decides_where_inputs_are_given(selector):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    weight[:, 7] *= 60
    assert selector.explain(weight, kind="weights", access="hot").chosen != "int8"
    quiet = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    quiet[:, 7] *= 40  # what is large in the weight is large in its inputs too: the rest hardly matters
    found = selector.explain(weight, kind="weights", access="hot", calibration=quiet)
    int8 = next(each for each in found.candidates if each.method == "int8")
    assert found.chosen == "int8" and int8.relative_error < 0.02
    loud = quiet.clone()
    loud[:, 7] = 0
    again = selector.explain(weight, kind="weights", access="hot", calibration=loud)
    assert next(each for each in again.candidates if each.method == "int8").relative_error > 0.05
    with pytest.raises(ConfigurationError, match="inputs of width 5 for a weight of 512"):
        selector.explain(weight, calibration=torch.zeros(3, 5))


def test_an_explanation_has_each_candidate_its_figures_and_the_reason(selector):
    found = selector.explain(matrix_of("outlier columns"), kind="weights")
    assert found.access == "hot" and found.tolerance == 0.02 and found.sparsity < 0.01 and found.variance > 0
    text = str(found)
    for part in ("* none", "int8", "loses 0.0", "more than 0.02", "saves no bytes", "no low rank", "fullest row"):
        assert part in text, text
    assert text.splitlines()[-1].startswith("none: no other method")
    assert math.isinf(next(each for each in found.candidates if each.method == "int8").cost)


def test_what_is_small_or_not_a_number_is_left_alone(selector):
    for tensor in (torch.randn(30), torch.tensor(2.0), torch.zeros(0, 7), torch.zeros(1000, 1000, dtype=torch.int8)):
        found = selector.explain(tensor)
        assert found.chosen == "none" and len(found.candidates) == 1
    assert "torch.int8 is kept exactly" in str(found)


def test_values_that_are_no_numbers_leave_only_what_keeps_them(selector):
    values = torch.randn(64, 256)
    values[3, 3] = math.nan
    found = selector.explain(values, kind="weights", access="cold")
    assert found.chosen == "fp16"
    refused = {each.method: each.reason for each in found.candidates if each.reason}
    assert "NaN" in refused["int8"] and refused["svd"]


def test_unknown_kinds_and_patterns_are_refused(selector):
    with pytest.raises(ConfigurationError, match="kind: 'weight' is not one of weights"):
        selector.explain(torch.zeros(3), kind="weight")
    with pytest.raises(ConfigurationError, match="access: 'warm' is not one of hot"):
        selector.explain(torch.zeros(3), access="warm")


def test_speeds_are_measured_and_can_be_stored():
    ticks = iter(range(10**9))
    found = measure_codec_speeds(dtype=torch.float32, timer=lambda: next(ticks) * 0.02)
    assert set(found.lines) == set(MEASURED_CODECS)
    assert CodecSpeeds.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(ValueError, match="svd"):
        CodecSpeeds.from_dict({**found.to_dict(), "lines": {"int8": found.to_dict()["lines"]["int8"]}})


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        ((10, 20.0), (110, 120.0), Line(10.0, 1.0)),
        ((10, 1.0), (100, 100.0), Line(0.0, 1.0)),  # no time below zero
        ((10, 50.0), (100, 40.0), Line(40.0, 0.0)),  # no time that falls
    ],
)
def test_a_line_goes_through_two_measurements(small, large, expected):
    found = _line(small, large)
    assert (found.fixed_s, found.per_unit_s) == pytest.approx((expected.fixed_s, expected.per_unit_s))
    assert found.seconds(large[0]) == pytest.approx(large[1])
