"""The verdict follows from counters, and its estimate from the bytes that a token reads."""

from __future__ import annotations

import pytest

from qwen3_vl_memory_optimizations.figures.verdict import judge, tokens_per_s_with
from qwen3_vl_memory_optimizations.model.run.decode_steps import DecodeSteps, DecodeUse
from qwen3_vl_memory_optimizations.paging import PagingStats

GB = 10**9
# Ten steps of 0.4 s: 0.3 s of computing beside the reads, 0.1 s of waiting; 0.8 GB each at 2 GB/s.
STREAMING = DecodeUse(4.0, 1.0, 4.0, 10, 10, 8 * GB, 16 * GB)


def test_before_the_first_decode_step_nothing_is_judged():
    verdict = judge(None, budget_bytes=2 * GB)
    assert verdict.limit is None and verdict.text.startswith("Not measured")
    assert (verdict.waiting_share, verdict.tokens_per_s, verdict.more_tokens_per_s) == (None, None, None)


@pytest.mark.parametrize(
    ("more_bytes", "seconds"),
    [(0, 4.0), (0.1 * GB, 3.5), (0.2 * GB, 3.0), (0.8 * GB, 3.0), (100 * GB, 3.0)],
)
def test_more_memory_saves_the_time_of_the_reads_it_replaces_but_no_computing(more_bytes, seconds):
    assert tokens_per_s_with(STREAMING, more_bytes) == pytest.approx(10 / seconds)


def test_with_a_draft_a_step_gives_several_tokens_and_reads_the_weights_once():
    drafted = DecodeUse(4.0, 1.0, 4.0, 10, 25, 8 * GB, 16 * GB)
    assert tokens_per_s_with(drafted, 0.1 * GB) == pytest.approx(25 / 3.5)
    assert judge(drafted).read_bytes_per_token == 8 * GB / 25


def test_where_nothing_is_read_nothing_is_estimated():
    assert tokens_per_s_with(DecodeUse(4.0, 1.0, 0.0, 10, 10, 0, 16 * GB), GB) is None


@pytest.mark.parametrize(
    ("budget_bytes", "available_bytes", "text"),
    [
        (0.4 * GB, None, "SSD-bound: 25 % waiting; 100 MB more would give about 2.9 tokens/s."),
        (2 * GB, None, "SSD-bound: 25 % waiting; 200 MB more would give about 3.3 tokens/s."),  # that ends the waiting
        (2 * GB, 50e6, "SSD-bound: 25 % waiting; 50 MB more would give about 2.7 tokens/s."),
        (2 * GB, 0, "SSD-bound: 25 % waiting; this machine has no memory left to add."),
    ],
)
def test_the_verdict_names_memory_that_helps_and_is_there(budget_bytes, available_bytes, text):
    verdict = judge(STREAMING, budget_bytes=budget_bytes, available_bytes=available_bytes)
    assert (verdict.limit, verdict.text) == ("SSD", text)
    assert (verdict.waiting_share, verdict.tokens_per_s, verdict.disk_bytes_per_s) == (0.25, 2.5, 2 * GB)


def test_without_waiting_the_processor_or_memory_limits():
    resident = DecodeUse(4.0, 0.04, 0.1, 10, 10, GB // 10, 80 * GB)
    assert judge(resident).text == "Processor-bound: 1 % waiting for the SSD; more memory would change little."
    assert judge(resident, bandwidth=100 * GB).limit == "processor"
    memory = judge(resident, bandwidth=25 * GB)
    assert (memory.limit, memory.memory_share) == ("memory", 0.8)
    assert memory.text == "Memory-bound: 80 % of the memory bandwidth, 1 % waiting."
    assert memory.more_bytes is None


def test_decode_steps_are_what_was_counted_between_the_ends_of_passes():
    stats = PagingStats()
    steps = DecodeSteps(stats)
    assert steps.recent() is None
    stats.bytes_read, stats.stall_s = 500, 9.0  # the prompt
    steps.begin(10.0, tokens=1)
    assert steps.recent() is None
    stats.bytes_read, stats.stall_s, stats.reading_s, stats.hit_bytes = 600, 9.5, 0.75, 40
    steps.end_step(12.0, tokens=2)
    stats.bytes_read, stats.miss_bytes = 650, 10
    steps.end_step(13.0, tokens=5)
    assert steps.recent() == DecodeUse(3.0, 0.5, 0.75, 2, 4, 150, 50)
    stats.bytes_read = 10_000  # between two answers
    steps.begin(20.0, tokens=1)
    steps.end_step(21.0, tokens=2)
    assert steps.recent() == DecodeUse(4.0, 0.5, 0.75, 3, 5, 150, 50)
