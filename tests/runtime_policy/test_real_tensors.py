"""The chosen algorithm decides which managed tensors go to the swap file; their bytes come back as they were."""

from __future__ import annotations

import pytest
import torch

from benchmarks.eviction.replay import TraceRecorder, replay
from qwen3_vl_memory_optimizations.paging import PressureMonitor
from qwen3_vl_memory_optimizations.runtime_policy import create_swapping_algorithm
from tests.paging.weights import settle

MIB = 2**20


def fill(optimizer, n_tensors):
    tensors = []
    for number in range(n_tensors):
        tensors.append(optimizer.allocate_tensor((MIB,), torch.uint8))
        tensors[-1].fill_(number)
    return tensors


@pytest.mark.parametrize("algorithm", ["lru", "clock", "predictive"])
def test_each_algorithm_moves_tensors_bit_by_bit(make_optimizer, algorithm):
    optimizer = make_optimizer(8 * MIB, swap_algorithm=algorithm)
    tensors = fill(optimizer, 14)
    draw = torch.Generator().manual_seed(0)
    for _ in range(120):
        number = int(torch.randint(0, 14, (1,), generator=draw))
        assert bool((tensors[number] == number).all())
    stats = optimizer.pager.stats
    assert stats.swap_writes >= 6 and stats.swap_reads > 20
    assert optimizer.pager.frames.peak_bytes <= 8 * MIB


def scan(optimizer, tensors, rounds):
    before = optimizer.pager.stats.swap_reads
    for _ in range(rounds):
        for number, tensor in enumerate(tensors):
            assert int(tensor.max()) == number
    settle(optimizer.pager)
    return optimizer.pager.stats.swap_reads - before


def test_in_a_cycle_prediction_reads_what_is_missing_and_recency_everything(make_optimizer):
    reads = {}
    for algorithm in ("lru", "clock", "predictive"):
        optimizer = make_optimizer(8 * MIB, swap_algorithm=algorithm)
        tensors = fill(optimizer, 10)
        scan(optimizer, tensors, 4)
        reads[algorithm] = scan(optimizer, tensors, 10)
    assert min(reads["lru"], reads["clock"]) >= 95
    assert reads["predictive"] <= 35  # 2 or 3 of 10 in each round


@pytest.mark.parametrize("algorithm", ["lru", "clock"])
def test_a_replay_of_the_trace_finds_what_the_run_found(make_optimizer, algorithm):
    optimizer = make_optimizer(8 * MIB, swap_algorithm=algorithm)
    tensors = fill(optimizer, 12)
    recorder, draw = TraceRecorder(), torch.Generator().manual_seed(1)
    stats = optimizer.pager.stats
    with optimizer.pager.recording(recorder):
        before = stats.hits, stats.misses
        for _ in range(400):
            tensors[min(int(torch.empty(1).exponential_(0.3, generator=draw)), 11)].sum()
    uses = stats.hits - before[0] + stats.misses - before[1]
    trace = recorder.trace()
    assert len(trace.keys) == uses == 400
    assert set(trace.kinds.tolist()) == {"general"}
    found = replay(trace, create_swapping_algorithm(algorithm), 8 * MIB).hit_rate
    assert (stats.hits - before[0]) / uses == pytest.approx(found, abs=0.03)  # it began with an empty memory


def test_above_the_threshold_tensors_leave_before_the_room_is_needed(make_optimizer):
    optimizer = make_optimizer(10 * MIB, swap_pressure_threshold=0.5, swap_algorithm="lru")
    tensors = fill(optimizer, 8)
    monitor = PressureMonitor(optimizer.pager, 1 << 40, also=optimizer.swapping.look)
    assert monitor.look()
    settle(optimizer.pager)
    assert [tensor.tier for tensor in tensors] == ["ssd"] * 3 + ["cpu"] * 5
    assert optimizer.swapping.swapped_ahead_bytes == 3 * MIB
    assert monitor.look()
    assert optimizer.swapping.swapped_ahead_bytes == 3 * MIB
    assert [int(tensor[0]) for tensor in tensors] == list(range(8))


@pytest.mark.parametrize("switch", ["enable_swapping", "enable_memory_swapping"])
def test_switched_off_the_longest_unused_leave(make_optimizer, switch):
    optimizer = make_optimizer(3 * MIB, **{switch: False})
    assert optimizer.swapping is None
    tensors = fill(optimizer, 3)
    tensors[0].sum()
    fill(optimizer, 1)
    assert [tensor.tier for tensor in tensors] == ["cpu", "ssd", "cpu"] or tensors[1].tier == "ssd"
