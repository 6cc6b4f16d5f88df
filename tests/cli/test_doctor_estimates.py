"""What `doctor` expects of a model on a machine, and what it recommends."""

import dataclasses

import pytest

from qwen3_vl_memory_optimizations import MemoryConfig
from qwen3_vl_memory_optimizations.cli.common.model_shapes import MODELS, SpecialTokens, build_config
from qwen3_vl_memory_optimizations.cli.common.model_sizes import encoded_bytes
from qwen3_vl_memory_optimizations.cli.doctor import estimates, measurements
from qwen3_vl_memory_optimizations.cli.doctor.estimates import Estimator, estimate_all, least_budgets, page_grid
from qwen3_vl_memory_optimizations.cli.doctor.measurements import Measurements
from qwen3_vl_memory_optimizations.cli.doctor.recommendation import recommend
from qwen3_vl_memory_optimizations.compression.kernels import fastest_dtype
from qwen3_vl_memory_optimizations.figures import Reading
from qwen3_vl_memory_optimizations.model.run.estimate import decode_ops, rates_name, text_ops, vision_ops
from qwen3_vl_memory_optimizations.model.run.rates import RunRates
from qwen3_vl_memory_optimizations.native import core


def config_of(shape):
    return build_config(shape, SpecialTokens())


KINDS = ("float32", "bfloat16", "int8_rotated", "int4")


def machine(*, decode=100e9, prompt=1000e9, ssd=2e9, memory=20e9):
    def rates(per_s):
        return {kind: Reading(per_s, 0.0) for kind in KINDS}

    return Measurements(
        memory=Reading(memory, 0.0),
        ssd=None if ssd is None else Reading(ssd, 0.0),
        ssd_problem=None if ssd else "no disk",
        decode=rates(decode),
        prompt=rates(prompt),
    )


def test_what_does_not_fit_is_read_for_each_token(tmp_path):
    estimator = Estimator(MODELS[2], "int8_rotated", machine(), tmp_path)
    weights = encoded_bytes(MODELS[2].decoder_matrices(), "int8_rotated")
    whole = estimator.row(estimator.whole_bytes)
    assert whole.in_memory and whole.read_bytes_per_token == 0
    # In the native core a token reaches most of what the memory gives.
    assert whole.limit == ("processor" if core() is None else "memory")
    assert whole.tokens_per_s == pytest.approx((0.5 if core() is None else 0.85) * 20e9 / weights)
    assert whole.tokens > 1000

    tight = estimator.row(estimator.whole_bytes - 4_000_000_000)
    assert tight.fits and not tight.in_memory and tight.limit == "SSD" and tight.tokens == 0
    assert tight.read_bytes_per_token == pytest.approx(4e9, rel=0.05)
    assert tight.tokens_per_s == pytest.approx(2e9 / tight.read_bytes_per_token)

    refused = estimator.row(estimator.least_bytes - 1)
    assert not refused.fits
    assert refused.tokens_per_s is None and refused.page_s is None


def test_a_slow_kernel_limits_what_the_memory_would_allow(tmp_path):
    estimator = Estimator(MODELS[0], "int4", machine(decode=10e9), tmp_path)
    row = estimator.row(estimator.whole_bytes)
    assert row.limit == "processor"
    share = 0.5 if core() is None else 0.85
    assert row.tokens_per_s == pytest.approx(share * 10e9 / decode_ops(config_of(MODELS[0]), 1472), rel=0.01)


def test_without_a_measured_ssd_only_what_fits_has_a_speed(tmp_path):
    estimator = Estimator(MODELS[0], "int8_rotated", machine(ssd=None), tmp_path)
    assert estimator.row(estimator.whole_bytes).tokens_per_s is not None
    tight = estimator.row(estimator.least_bytes)
    assert tight.fits and tight.tokens_per_s is None and tight.page_s is None


def test_rates_of_runs_replace_those_of_kernels(tmp_path):
    shape, budget = MODELS[0], 4_000_000_000
    before = Estimator(shape, "int8_rotated", machine(), tmp_path).row(budget)
    assert not before.measured
    settings = MemoryConfig(cache_dir=tmp_path, ram_budget=budget)
    rates = RunRates(settings, rates_name(config_of(shape), "auto", fastest_dtype()))
    ops, vision = decode_ops(config_of(shape), 1472), vision_ops(config_of(shape), [page_grid()])
    rates.note({"decode": (ops, 0.25)}, steps=16)
    rates.note({"vision": (vision, 7.0), "text": (text_ops(config_of(shape), 1512), 11.0)})
    after = Estimator(shape, "int8_rotated", machine(), tmp_path).row(budget)
    assert after.measured
    assert after.tokens_per_s == pytest.approx(4.0)
    assert after.page_s == pytest.approx(18.0, rel=0.01)


def test_a_page_is_one_of_detail_document():
    _, rows, columns = page_grid()
    assert rows % 2 == columns % 2 == 0 and 1.3 < rows / columns < 1.5
    assert 1400 < rows * columns / 4 <= 1536


def test_the_largest_model_that_is_fast_enough_is_recommended(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "_NATIVE_DECODE_SHARE", estimates._DECODE_SHARE)
    fast = machine(decode=1e13, prompt=1e13, memory=100e9)
    rows = estimate_all(fast, limit_bytes=30_000_000_000, exact=False, cache_dir=tmp_path)
    best = recommend(rows, 30_000_000_000)
    assert (best.row.model, best.row.codec, best.row.in_memory) == ("8B", "int8_rotated", True)
    assert best.lines[0].startswith("Use 8B at 8 bits in ")
    assert "tokens/s" in best.lines[0] and "per page" in best.lines[0]
    assert best.lines[1].startswith("Least budget for it: ")
    assert "--codec" not in best.lines[2] and "Qwen3-VL-8B-Instruct --ram-budget" in best.lines[2]

    slower = machine(decode=1e13, prompt=1e13, memory=30e9)
    rows = estimate_all(slower, limit_bytes=30_000_000_000, exact=False, cache_dir=tmp_path)
    best = recommend(rows, 30_000_000_000)
    assert (best.row.model, best.row.codec) == ("8B", "int4")
    assert best.row.tokens_per_s >= 3 and "--codec int4" in best.lines[2]


def test_a_given_budget_is_the_only_one(tmp_path):
    rows = estimate_all(machine(prompt=1e13), limit_bytes=2_600_000_000, exact=True, cache_dir=tmp_path)
    assert {row.budget_bytes for row in rows} == {2_600_000_000}
    best = recommend(rows, 2_600_000_000)
    assert best.row.budget_bytes == 2_600_000_000 and "--ram-budget 2.6GB" in best.lines[2]


def test_on_a_slow_machine_the_fastest_form_of_the_smallest_model_is(tmp_path):
    rows = estimate_all(machine(prompt=1e9), limit_bytes=8_000_000_000, exact=False, cache_dir=tmp_path)
    best = recommend(rows, 8_000_000_000).row
    assert best.model == "2B" and best.in_memory


def test_a_budget_in_which_nothing_fits_is_said(tmp_path):
    rows = estimate_all(machine(), limit_bytes=500_000_000, exact=True, cache_dir=tmp_path)
    best = recommend(rows, 500_000_000)
    assert best.row is None
    assert best.lines[0].startswith("No model fits in 500 MB: 2B needs ")


def test_least_budgets_grow_with_prompts_and_models():
    least = [least_budgets(shape) for shape in MODELS]
    assert all(each["1,024 tokens"] <= each["16,384 tokens"] for each in least)
    assert least[0]["1,024 tokens"] < least[2]["1,024 tokens"]


def test_two_readings_of_one_machine_agree(tmp_path):
    first, second = (measurements.measure(tmp_path, quick=True) for _ in range(2))
    for name, reading in first.readings().items():
        assert 1 / 5 < reading.per_s / second.readings()[name].per_s < 5, (
            name
        )  # a busy machine differs more than a quiet one
    assert dataclasses.asdict(first).keys() == {"memory", "ssd", "ssd_problem", "decode", "prompt"}
