"""What is computed now: the vision tower, the prompt and the answer, on a real model and with a clock of the test."""

from __future__ import annotations

import threading

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.model.run.progress import ANSWER, PICTURES, PROMPT, ProgressTracker
from tests.model.tiny import DIRECTORY, batch, prompt


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def tracker(clock):
    return ProgressTracker(clock)


def run_prompt(tracker, length, layers=4):
    tracker.forward_begins(1, length, 0)
    tracker.piece_begins(length, 0, layers)
    for layer in range(layers):
        tracker.layer_ends(layer)


def test_a_prompt_advances_with_each_layer_of_each_piece_and_has_a_time_left(tracker, clock):
    tracker.call_begins(0.0, 2000, 10)
    tracker.forward_begins(1, 2000, 0)
    tracker.piece_begins(1000, 0, 4)
    assert (tracker.now().done, tracker.now().left_s) == (0, None), "nothing is done, so nothing is known"
    clock.now_s = 1.0
    tracker.layer_ends(0)
    found = tracker.now()
    assert (found.phase, found.unit, found.done, found.total, found.left_s) == (PROMPT, "tokens", 250, 2000, 7.0)
    for layer in (1, 2, 3):
        tracker.layer_ends(layer)
    clock.now_s = 4.0
    tracker.piece_begins(1000, 1000, 4)
    assert (tracker.now().done, tracker.now().elapsed_s, tracker.now().left_s) == (1000, 4.0, 4.0)


def test_a_wait_within_a_layer_counts_down(tracker, clock):
    tracker.call_begins(0.0, 1000, 10)
    tracker.forward_begins(1, 1000, 0)
    tracker.piece_begins(1000, 0, 4)
    left_s = []
    for clock.now_s in (2.0, 2.5, 3.0, 99.0):
        if clock.now_s == 2.0:
            tracker.layer_ends(0)
        left_s.append(tracker.now().left_s)
    assert left_s == [6.0, 5.5, 5.0, 0.0]


def test_reused_tokens_are_done_but_say_nothing_about_speed(tracker, clock):
    tracker.call_begins(0.0, 1000, 10)
    tracker.forward_begins(1, 200, 800)
    tracker.piece_begins(200, 800, 2)
    clock.now_s = 1.0
    tracker.layer_ends(0)
    assert (tracker.now().done, tracker.now().total, tracker.now().left_s) == (900, 1000, 1.0)


def decode(tracker, clock, steps, prompt_tokens, tokens=1, step_s=0.5):
    for _ in range(steps):
        tracker.forward_begins(1, 1, prompt_tokens + tokens - 1)
        clock.now_s += step_s
        tracker.forward_ended(clock.now_s)
        tokens += 1
    return tokens


def test_an_answer_has_a_rate_while_it_is_decoded(tracker, clock):
    tracker.call_begins(0.0, 8, 100)
    run_prompt(tracker, 8)
    clock.now_s = 3.0
    tracker.forward_ended(3.0)
    found = tracker.now()
    assert (found.phase, found.done, found.total, found.first_token_s, found.tokens_per_s) == (
        ANSWER,
        1,
        100,
        3.0,
        None,
    )
    tokens = decode(tracker, clock, 4, 8)
    found = tracker.now()
    assert (found.done, found.tokens_per_s, found.left_s) == (5, 2.0, 47.5)
    assert tracker.new_tokens() == 5
    decode(tracker, clock, 40, 8, tokens, step_s=1.0)
    assert tracker.now().tokens_per_s == pytest.approx(1.0), "older steps are forgotten"


def test_a_look_at_any_time_shows_no_spike_and_a_stall_lowers_the_rate(tracker, clock):
    tracker.call_begins(0.0, 8, 100)
    run_prompt(tracker, 8)
    tracker.forward_ended(0.0)
    decode(tracker, clock, 6, 8)
    for look_s in (0.001, 0.01, 0.4):
        clock.now_s = 3.0 + look_s
        assert tracker.now().tokens_per_s == pytest.approx(2.0)
    clock.now_s = 13.0
    assert tracker.now().tokens_per_s == pytest.approx(7 / 13)


def test_drafted_tokens_count_once_they_are_accepted(tracker, clock):
    tracker.call_begins(0.0, 8, 100)
    run_prompt(tracker, 8)
    tracker.forward_ended(0.0)
    tracker.forward_begins(1, 4, 8)
    clock.now_s = 1.0
    tracker.forward_ended(1.0)
    tracker.forward_begins(1, 4, 11)  # three of them were accepted
    assert tracker.now().done == 4
    assert tracker.now().tokens_per_s == pytest.approx(3.0)


def test_a_prompt_in_several_forwards_has_no_first_token_before_its_end(tracker, clock):
    tracker.call_begins(0.0, 8, 10)
    tracker.forward_begins(1, 4, 0)
    tracker.piece_begins(4, 0, 2)
    tracker.forward_ended(1.0)
    assert tracker.now().phase == PROMPT
    tracker.forward_begins(1, 4, 4)
    tracker.piece_begins(4, 4, 2)
    tracker.forward_ended(2.0)
    assert tracker.now().first_token_s == 2.0


def test_a_waiting_thread_does_not_end_the_phase_of_another(tracker):
    tracker.call_begins(0.0, 8, 10)
    run_prompt(tracker, 8)

    def interrupted():
        tracker.call_begins(0.0, 5, 10)
        assert tracker.call_ends() == (0, 1)

    thread = threading.Thread(target=interrupted)
    thread.start()
    thread.join()
    assert tracker.now().phase == PROMPT
    tracker.call_ends()
    assert tracker.now() is None


# --- a real model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    made = create_optimized_model(DIRECTORY, {"codec": "none"})
    with made.memory_optimizer:
        yield made


def seen_during(model, call):
    """Return the progress after each block and layer, and at each text forward."""
    tracker, seen = model.memory_optimizer.figures.responses.progress, []
    watched = (*model.model.visual.blocks, *model.model.language_model.layers, model.lm_head)
    handles = [each.register_forward_hook(lambda *_: seen.append(tracker.now())) for each in watched]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_a_real_answer_shows_all_its_phases(model):
    import numpy as np

    image = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), dtype=np.uint8)
    inputs = batch([prompt("What is this?")], image)
    length = inputs["input_ids"].shape[1]
    seen = seen_during(model, lambda: model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False))
    phases = list(dict.fromkeys(each.phase for each in seen))
    assert phases == [PICTURES, PROMPT, ANSWER]
    blocks = [each for each in seen if each.phase == PICTURES]
    assert [each.done for each in blocks] == list(range(1, len(model.model.visual.blocks) + 1))
    tokens = [each.done for each in seen if each.phase == PROMPT]
    assert tokens == sorted(tokens) and tokens[-1] == length and tokens[0] < length
    answer = [each for each in seen if each.phase == ANSWER]
    assert answer[-1].done == 5 and answer[-1].total == 6, "the sixth is being computed"
    assert answer[-1].tokens_per_s > 0 and answer[-1].first_token_s > 0
    assert model.memory_optimizer.figures.responses.progress.now() is None


def test_a_forward_of_its_own_is_a_prompt(model):
    seen = seen_during(model, lambda: model(input_ids=torch.tensor([[7, 8, 9]])))
    assert {each.phase for each in seen} == {PROMPT} and seen[-1].total == 3
    assert model.memory_optimizer.figures.responses.progress.now() is None


def test_an_interrupted_answer_counts_its_tokens(model):
    times = model.memory_optimizer.figures.responses
    calls = []

    def stop(module, args):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = model.lm_head.register_forward_pre_hook(stop)
    before = times.tokens
    try:
        with pytest.raises(KeyboardInterrupt):
            model.generate(input_ids=torch.tensor([[7, 8, 9]]), max_new_tokens=9, min_new_tokens=9, do_sample=False)
    finally:
        handle.remove()
    assert times.tokens - before == 3
    assert times.progress.now() is None
