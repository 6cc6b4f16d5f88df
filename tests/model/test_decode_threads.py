"""A pass of a few tokens takes the threads for which processors are free; any other, and whoever comes after, all."""

from __future__ import annotations

import os

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.model.layers.decode_threads import (
    FreeProcessors,
    attach_decode_threads,
    busy_seconds,
)

from . import tiny


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_busy_is_all_but_idle_and_waiting_of_the_processors_that_may_be_used(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text(
        "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 20 30 1000 500 4 5 6 50 0\ncpu1 1 1 1 1 1 1 1 1 0 0\n"
        "cpu2 200 0 0 7 7 0 0 0 0 0\nintr 5\n"
    )
    hz = os.sysconf("SC_CLK_TCK")
    assert busy_seconds(frozenset({0, 2}), root=tmp_path) == (165 + 200) / hz
    assert busy_seconds(frozenset({7}), root=tmp_path) is None
    assert busy_seconds(frozenset({0}), root=tmp_path / "nowhere") is None


class Machine:
    """Four processors; seconds that all of this process, and others, worked on them."""

    def __init__(self) -> None:
        self.now_s, self.own_s, self.others_s = 0.0, 0.0, 0.0
        self.reads = 0

    def processors(self) -> FreeProcessors:
        def busy_s(processors):
            self.reads += 1
            return self.own_s + self.others_s

        return FreeProcessors(frozenset(range(4)), busy_s=busy_s, own_s=lambda: self.own_s, timer=lambda: self.now_s)

    def go_on(self, seconds, *, own, others):
        self.now_s += seconds
        self.own_s += own * seconds
        self.others_s += others * seconds


def test_free_is_what_others_left_since_the_look_before():
    machine = Machine()
    processors = machine.processors()
    assert processors.free() == 4, "nothing is known yet"
    machine.go_on(0.4, own=4, others=0)
    assert processors.free() == 4 and machine.reads == 1, "too early to look again"
    machine.go_on(0.6, own=2.5, others=1.5)
    assert processors.free() == 4, "busy for a moment"
    machine.go_on(1.0, own=1, others=3)
    assert processors.free() == pytest.approx(4 - 0.9)
    machine.go_on(1.0, own=1, others=3)
    assert processors.free() == pytest.approx(1)
    machine.go_on(1.0, own=4.01, others=-0.01)  # counted at slightly different times
    assert processors.free() == 4


def test_where_the_system_does_not_tell_all_are_free():
    now = iter(range(100))
    processors = FreeProcessors(frozenset({0, 1}), busy_s=lambda _: None, timer=lambda: float(next(now)))
    assert [processors.free() for _ in range(3)] == [2, 2, 2]


class Free:
    def __init__(self, free: float) -> None:
        self._free = free

    def free(self) -> float:
        return self._free


class Threads(torch.nn.Module):
    """Tells with how many threads it runs."""

    def forward(self, input_ids=None, error=None):
        if error is not None:
            raise error
        return torch.get_num_threads()


@pytest.mark.parametrize(("free", "tokens", "expected"), [(2, 1, 2), (1.5, 1, 2), (1.33, 1, 1), (0, 4, 1), (0, 64, 2)])
def test_few_tokens_take_the_threads_that_have_a_processor(two_threads, free, tokens, expected):
    model = Threads()
    attach_decode_threads(model, Free(free))
    ids = torch.zeros((1, tokens), dtype=torch.long)
    assert model(input_ids=ids) == model(ids) == expected
    assert torch.get_num_threads() == 2


def test_all_threads_are_back_after_a_failure_and_without_ids(two_threads):
    model = Threads()
    attach_decode_threads(model, Free(1))
    with pytest.raises(ValueError, match="as asked"):
        model(input_ids=torch.zeros((1, 1)), error=ValueError("as asked"))
    assert torch.get_num_threads() == 2
    assert model() == 2
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=torch.zeros((1, 1)), error=KeyboardInterrupt())
    assert model() == 2, "the next pass finds them"


@torch.no_grad()
def test_a_model_answers_the_same_whatever_is_free(two_threads, tmp_path, monkeypatch):
    used = set()
    inputs = tiny.cases()["text"]
    model = create_optimized_model(tiny.DIRECTORY, {"codec": "int8", "cache_dir": tmp_path})
    with model.memory_optimizer:
        layer = model.model.language_model
        layer.register_forward_pre_hook(lambda *_: used.add(torch.get_num_threads()))
        answers = []
        for free in (2.0, 1.0):
            monkeypatch.setattr(FreeProcessors, "free", lambda self, free=free: free)
            answers.append(model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False))
    assert torch.equal(*answers) and used == {1, 2}
