"""The time to the first token, estimated from measured rates."""

import json
import math
import time

import pytest
import torch

from qwen3_vl_memory_optimizations import MemoryConfig, create_optimized_model, load_processor, prepare_within_budget
from qwen3_vl_memory_optimizations.errors import format_duration
from qwen3_vl_memory_optimizations.model.run.estimate import decode_ops, text_ops, vision_ops
from qwen3_vl_memory_optimizations.model.run.rates import RATES_FILE, RunRates

from .test_documents import TINY


def rates(tmp_path, **settings) -> RunRates:
    return RunRates(MemoryConfig(cache_dir=tmp_path, **settings), "a model")


def test_measured_rates_hold_for_the_next_process(tmp_path):
    rates(tmp_path).note({"vision": (2.0**40, 20.0), "text": (2.0**42, 40.0)})
    assert rates(tmp_path).seconds("vision", 2.0**40) == (pytest.approx(20.0), True)
    assert rates(tmp_path).seconds("text", 2.0**43) == (pytest.approx(80.0), True)
    assert rates(tmp_path, ram_budget="2GB").seconds("text", 2.0**42) == (pytest.approx(40.0), True), "another budget"
    assert not RunRates(MemoryConfig(cache_dir=tmp_path), "another").seconds("text", 2.0**42)[1]


def test_the_rate_is_that_of_the_budget_and_of_the_size(tmp_path):
    mine = rates(tmp_path, ram_budget="1GB")
    mine.note({"text": (2.0**40, 100.0)})
    mine.note({"text": (2.0**30, 1.0)})
    rates(tmp_path).note({"text": (2.0**40, 10.0)})
    assert rates(tmp_path, ram_budget="1.1GB").seconds("text", 2.0**40)[0] == pytest.approx(100.0)
    assert rates(tmp_path).seconds("text", 2.0**40)[0] == pytest.approx(10.0)
    assert rates(tmp_path, ram_budget="1GB").seconds("text", 2.0**29)[0] == pytest.approx(0.5)


def test_later_runs_count_as_much_as_all_before(tmp_path):
    mine = rates(tmp_path)
    for seconds in (10.0, 20.0, 20.0):
        mine.note({"text": (2.0**40, seconds)})
    assert mine.seconds("text", 2.0**40)[0] == pytest.approx(17.5)


def test_the_slow_start_of_a_short_run_is_not_taken_for_its_rate(tmp_path):
    mine = rates(tmp_path)
    mine.note({"vision": (2.0**20, 2.0)})
    seconds, measured = mine.seconds("vision", 2.0**30)
    assert 2.0 < seconds < 100.0, "in proportion it would be 2048 s"
    assert not measured


@pytest.mark.parametrize("content", ["", "[]", '{"a": {"b": {"c": {"text": {"x": 1}}}}}', '{"a": 1}'])
def test_a_damaged_file_costs_the_rates_and_nothing_else(tmp_path, content):
    (tmp_path / RATES_FILE).write_text(content)
    mine = rates(tmp_path)
    assert not mine.seconds("text", 2.0**40)[1]
    mine.note({"text": (2.0**40, 10.0)})
    assert rates(tmp_path).seconds("text", 2.0**40)[1]


def test_what_cannot_be_written_fails_no_run(tmp_path):
    (tmp_path / "file").touch()
    mine = RunRates(MemoryConfig(cache_dir=tmp_path / "file"), "a model")
    mine.note({"text": (2.0**40, 10.0)})
    assert mine.seconds("text", 2.0**40)[0] == pytest.approx(10.0)


@pytest.fixture
def model(tmp_path):
    model = create_optimized_model(TINY, {"cache_dir": tmp_path, "tensor_budget": "3MB"})
    yield model
    model.memory_optimizer.close()


def prompt(model, text: str = "read the digits. " * 40, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, 128, 128), generator=generator, dtype=torch.uint8)
    return prepare_within_budget(load_processor(TINY), model, text, [image])[0]


def test_generate_measures_and_known_work_costs_nothing(model, tmp_path):
    estimator, inputs = model.memory_optimizer.estimator, prompt(model)
    before = estimator.of_inputs(inputs)
    assert not before.measured
    assert (before.tokens, before.patches) == (inputs["input_ids"].shape[1], 64)
    model.generate(**inputs, max_new_tokens=2)
    (machine,) = json.loads((tmp_path / RATES_FILE).read_text()).values()
    ((name, budgets),) = machine.items()
    assert "vision" in name
    assert all(budgets["none"][kind] for kind in ("vision", "text"))
    after = estimator.of_inputs(inputs)
    assert after.measured
    assert (after.tokens, after.patches) == (1, 0), "all but the last token are known"
    assert after.seconds < before.seconds
    other = estimator.of_inputs(prompt(model, seed=1))
    assert (other.tokens, other.patches) == (before.tokens, 64) or other.tokens > before.tokens - 8


def test_decode_steps_are_measured_without_their_waits(model, tmp_path):
    start_s = time.perf_counter()
    model.generate(**prompt(model, "what is this?"), max_new_tokens=20, min_new_tokens=20)
    took_s = time.perf_counter() - start_s
    (machine,) = json.loads((tmp_path / RATES_FILE).read_text()).values()
    (budgets,) = machine.values()
    (rate,) = budgets["none"]["decode"].values()
    assert 0 < 16 * decode_ops(model.config) / rate < took_s


def test_another_question_about_the_same_picture_computes_its_own_tokens(model):
    processor, inputs = load_processor(TINY), prompt(model, "what is this?")
    model.generate(**inputs, max_new_tokens=2)
    asked = processor.ask_again("what color is the shape?", inputs)
    encoded = []

    def note(*_):
        encoded.append(True)

    note.changes_nothing = True  # other hooks make a model one whose results are not reused
    model.model.visual.register_forward_hook(note)
    estimate = model.memory_optimizer.estimator.of_inputs(asked)
    assert estimate.patches == 0
    assert estimate.tokens < asked["input_ids"].shape[1] - 16
    model.generate(**asked, max_new_tokens=2)
    assert not encoded


def test_a_private_run_leaves_no_rates(tmp_path):
    model = create_optimized_model(TINY, {"cache_dir": tmp_path, "tensor_budget": "3MB", "private": True})
    model.generate(**prompt(model), max_new_tokens=2)
    assert model.memory_optimizer.estimator.of_sizes([(1, 8, 8)], 200).measured
    assert not (tmp_path / RATES_FILE).exists()
    model.memory_optimizer.close()


def test_auto_takes_the_most_pixels_that_are_in_time(model, monkeypatch):
    processor, estimator = load_processor(TINY), model.memory_optimizer.estimator
    image = torch.zeros(3, 1024, 1024, dtype=torch.uint8)

    def auto(seconds_per_patch):
        def seconds(kind, ops):
            return (
                (ops / vision_ops(model.config, [(1, 8, 8)]) * 64 * seconds_per_patch, True)
                if kind == "vision"
                else (0, True)
            )

        monkeypatch.setattr(estimator.rates, "seconds", seconds)
        return prepare_within_budget(processor, model, "what is this?", [image], detail="auto")

    inputs, notes = auto(1e-6)
    assert notes == ["detail auto: all pixels per picture; first token after about " + notes[0].rsplit("about ", 1)[1]]
    most = inputs["image_grid_thw"].prod().item()
    _, notes = auto(1e3)
    assert "at most 0.26 million pixels" in notes[0]
    assert "30 s cannot be reached" in notes[0]
    assert (
        most
        >= prepare_within_budget(processor, model, "what is this?", [image], detail="low")[0]["image_grid_thw"]
        .prod()
        .item()
    )


def test_operations_grow_as_the_arithmetic_does(model):
    config = model.config
    assert vision_ops(config, [(1, 8, 8), (1, 8, 8)]) == pytest.approx(2 * vision_ops(config, [(1, 8, 8)]))
    assert vision_ops(config, [(1, 16, 16)]) > 4 * vision_ops(config, [(1, 8, 8)]), "attention is quadratic"
    assert text_ops(config, 100) + text_ops(config, 100, 100) == pytest.approx(text_ops(config, 200))
    assert math.isclose(vision_ops(config, []), 0)


def test_durations_read_well():
    shown = [format_duration(seconds) for seconds in (0.254, 9.6, 70.4, 130, 4000, 9000)]
    assert shown == ["0.25 s", "9.6 s", "70 s", "2.2 min", "67 min", "2.5 h"]
