"""The collector in the path of real inference: questions about pictures, and runtime tensors within a budget."""

import time

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.model.kv import cache as kv_cache
from tests.model import tiny

MIB = 2**20


@pytest.fixture
def make_model(tmp_path, monkeypatch):
    monkeypatch.setattr(kv_cache, "BLOCK_TOKENS", 32)
    made = []

    def make(name, **settings):
        # With `none`, no kernel is chosen by time: the same bits in each run.
        quiet = {"gc_collection_interval": 1000.0, "codec": "none", "prefix_reuse": "on"}
        made.append(create_optimized_model(tiny.DIRECTORY, {"cache_dir": tmp_path / name, **quiet, **settings}))
        return made[-1]

    yield make
    for model in made:
        model.memory_optimizer.close()


def ask(model, picture, question):
    images, _, questions, _ = tiny.heldout()
    prompt = tiny.prompt(questions[question % len(questions)], n_images=1)
    with torch.no_grad():
        inputs = tiny.batch([prompt], images[[picture]])
        return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0].tolist()


def run(model, pictures):
    """Ask one question about each picture; return the answers and the most that kept results took."""
    optimizer, peak, answers = model.memory_optimizer, 0, []
    for number, picture in enumerate(pictures):
        answers.append(ask(model, picture, number))
        if optimizer.collector is not None:
            optimizer.collector.look()  # the thread may be late
        peak = max(peak, optimizer.cache.l2_cache.used_bytes)
    return answers, peak


PICTURES = [picture for first in range(0, 24) for picture in (first, first, 100)]


def test_kept_results_that_nobody_asks_for_leave_memory_and_answers_stay_the_same(make_model):
    without, with_gc = make_model("a", enable_predictive_gc=False), make_model("b")
    answers, peak = run(without, PICTURES)
    same, lower = run(with_gc, PICTURES)
    assert same == answers
    assert lower < 0.6 * peak
    stats = with_gc.memory_optimizer.get_memory_efficiency_stats()["gc"]
    assert stats["rounds"] == len(PICTURES)
    assert stats["swapped"] and stats["success_rate"] > 0.9 and stats["lifetime_accuracy"] > 0.75
    assert without.memory_optimizer.get_memory_efficiency_stats()["gc"] is None


def test_a_picture_that_comes_back_after_all_is_read_from_the_ssd_and_not_computed_again(make_model):
    model = make_model("a")
    run(model, [50, *range(24)])
    cache = model.memory_optimizer.cache
    hits = cache.l3_cache.counters.hits
    assert hits == 0
    before = model.memory_optimizer.get_memory_efficiency_stats()["gc"]["needed_again"]
    run(model, [50])
    assert cache.l3_cache.counters.hits > hits
    assert model.memory_optimizer.get_memory_efficiency_stats()["gc"]["needed_again"] > before


def test_in_private_mode_nothing_is_written_and_answers_stay_the_same(make_model, tmp_path):
    # A prompt that is computed whole again, not behind what was kept, is rounded differently.
    model = make_model("private", private=True, prefix_reuse="off")
    answers, _ = run(model, PICTURES)
    plain, _ = run(make_model("plain", enable_predictive_gc=False, prefix_reuse="off"), PICTURES)
    assert answers == plain
    stats = model.memory_optimizer.get_memory_efficiency_stats()["gc"]
    assert stats["freed"] and not stats["swapped"]
    assert not (tmp_path / "private" / "reuse").exists()


def test_generate_is_a_session_with_phases(make_model):
    model, seen = make_model("a"), []
    tracker = model.memory_optimizer.lifecycle
    model.register_forward_hook(lambda module, args, output: seen.append((tracker.phase, tracker.sessions_open)))
    ask(model, 3, 0)
    assert seen == [("prefill", 1), *[("decode", 1)] * 3]
    assert (tracker.phase, tracker.sessions_open) == ("idle", 0)


def test_an_error_in_generate_ends_its_session(make_model):
    model = make_model("a")
    with pytest.raises(Exception, match="max_new_tokens"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=-3)
    assert model.memory_optimizer.lifecycle.sessions_open == 0


def test_an_idle_tensor_goes_to_the_swap_file_and_comes_back_with_its_bytes(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    optimizer.collector.close()  # without its thread, rounds end at once
    idle = optimizer.allocate_tensor((2 * MIB,), torch.uint8)
    idle.fill_(7)
    busy = optimizer.allocate_tensor((2 * MIB,), torch.uint8)
    pinned = optimizer.allocate_tensor((2 * MIB,), torch.uint8)
    held = optimizer.migrate_for_compute(pinned)
    for _ in range(25):
        with optimizer.inference_session():
            busy.add_(1)
    optimizer.pager.trim()
    stats = optimizer.get_memory_efficiency_stats()["gc"]
    assert stats["swapped"] == 1 and stats["freed"] == 0
    assert optimizer.collector.has_collected(idle.tensor_id)
    assert not optimizer.collector.has_collected(busy.tensor_id)
    assert not optimizer.collector.has_collected(pinned.tensor_id) and held.sum() == 0
    while idle.tensor_id not in optimizer.pager.runtime.swapped_out():
        time.sleep(0.01)  # it is being written
    optimizer.tiering.note(idle.tensor_id, 2 * MIB, "general")
    assert optimizer.tiering.migrate(optimizer.pager) == 0  # it is not to come back by itself
    assert int(idle.float().mean()) == 7 and int(busy[0]) == 25
    with optimizer.inference_session():
        pass
    assert optimizer.get_memory_efficiency_stats()["gc"]["needed_again"] == 1
    assert optimizer.collector.success_rate() < 1


def test_without_a_budget_no_tensor_is_written_to_the_disk(make_optimizer):
    optimizer = make_optimizer()
    tensor = optimizer.allocate_tensor((MIB,), torch.uint8)
    for _ in range(30):
        with optimizer.inference_session():
            pass
        optimizer.collector.look()
    assert optimizer.collector.stats()["swapped"] == 0 and tensor.sum() == 0
