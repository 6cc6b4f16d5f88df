"""How long answers take, noted on a real model with a clock that is told what to say."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from qwen3_vl_memory_optimizations.model.run.generation import Generation
from qwen3_vl_memory_optimizations.model.run.response_times import ResponseTimes, attach_response_times
from qwen3_vl_memory_optimizations.model.run.turns import Turns
from tests.model.tiny import reference


class Ticks:
    """A clock that is a second later each time it is asked."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.fixture
def model():
    found = reference()
    before = dict(found._forward_pre_hooks), dict(found._forward_hooks)
    yield found
    found._forward_pre_hooks.clear()
    found._forward_hooks.clear()
    found._forward_hooks_always_called.clear()
    found._forward_pre_hooks.update(before[0])
    found._forward_hooks.update(before[1])
    for name in ("generate", "_prefill"):
        found.__dict__.pop(name, None)


@pytest.fixture
def times(model):
    made = ResponseTimes(lambda: 7, timer=Ticks(), cpu_timer=lambda: 0.0)
    attach_response_times(model, made)
    parts = dict.fromkeys(("change", "budget", "pieces", "make_cache", "reuse"))
    Generation(model, turn=Turns(), session=nullcontext, times=made, **parts).attach()
    return made


IDS = torch.tensor([[7, 8, 9], [10, 11, 12]])


def test_a_generate_is_one_response_with_all_its_tokens(model, times):
    model.generate(input_ids=IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    [found] = times.recent()
    # The clock was asked at the start, after each of four forwards, and at the end.
    assert (found.wall_s, found.first_token_s, found.decode_s) == (5.0, 1.0, 3.0)
    assert (found.new_tokens, found.decode_steps, found.decode_bytes) == (8, 3, 0)
    assert (times.responses, times.tokens, times.seconds) == (1, 8, 5.0)


def test_a_forward_is_a_response_too_and_has_no_tokens(model, times):
    model(input_ids=IDS)
    [found] = times.recent()
    assert (found.generated, found.wall_s, found.first_token_s, found.new_tokens) == (False, 1.0, None, 0)


def test_what_is_under_way_has_a_time(model, times):
    seen = []
    handle = model.model.register_forward_pre_hook(lambda module, args: seen.append(times.running_s()))
    try:
        model(input_ids=IDS)
    finally:
        handle.remove()
    assert seen == [1.0] and times.running_s() is None


def test_an_answer_with_more_than_its_tokens_is_counted_by_its_sequences(model, times):
    model.generate(input_ids=IDS, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    [found] = times.recent()
    assert (found.new_tokens, found.decode_steps, found.decode_s) == (2, 0, 0.0)


def test_a_generate_inside_of_another_is_part_of_it(model, times):
    options = {"max_new_tokens": 1, "do_sample": False}

    def nested(ids, scores, **kwargs):
        model.generate(input_ids=IDS, **options)
        model(input_ids=IDS)
        assert times.recent() == []
        return torch.zeros(len(ids), dtype=torch.bool)

    model.generate(input_ids=IDS, stopping_criteria=[nested], **options)
    [found] = times.recent()
    assert (found.wall_s, found.new_tokens) == (4.0, 2)  # the clock was asked after each of three forwards


def test_a_forward_that_fails_is_no_response_even_where_it_never_began(model, times):
    def refuse(module, args):
        raise MemoryError("mine")

    handle = model.register_forward_pre_hook(refuse, prepend=True)
    try:
        with pytest.raises(MemoryError, match="mine"):
            model(input_ids=IDS)
    finally:
        handle.remove()
    with pytest.raises(IndexError):
        model(input_ids=IDS + 10**9)
    assert times.recent() == [] and times.running_s() is None


def test_only_the_last_64_are_kept(model, times):
    for _ in range(70):
        times.forward_begins()
        times.forward_ended()
    assert len(times.recent()) == 64 and times.responses == 70
