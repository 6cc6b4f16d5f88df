"""Section 8.2: what the two rules change, on real parts."""

import pytest
import torch

import qwen3_vl_memory_optimizations as q
from qwen3_vl_memory_optimizations.tuning import adapt_parameters_based_on_usage

MIB = 2**20
POOR = {"cache_hit_rate": 0.59, "fragmentation": 0.36}
GOOD = {"cache_hit_rate": 0.6, "fragmentation": 0.35}


@pytest.fixture
def optimizer(make_optimizer):
    return make_optimizer(64 * MIB, l2_cache_size=10 * MIB, l2_cache_max=13 * MIB, pool_compaction_interval=4.0)


def test_a_low_hit_rate_grows_the_cache_and_fragmentation_has_the_pools_compacted_more_often(optimizer):
    l2, interval = adapt_parameters_based_on_usage(POOR, optimizer)
    assert (l2.parameter, l2.before, l2.after, l2.applied) == ("l2_cache_size", 10 * MIB, 12 * MIB, True)
    assert "0.59 is below 0.6" in l2.why
    assert (interval.parameter, interval.before, interval.after) == ("pool_compaction_interval", 4.0, 2.0)
    assert "0.36 is above 0.35" in interval.why
    assert optimizer.cache.l2_cache.size_bytes == 12 * MIB
    assert optimizer._compactor.interval_s == 2.0


def test_figures_that_are_good_enough_or_unknown_change_nothing(optimizer):
    for metrics in (GOOD, {}, {"cache_hit_rate": None, "fragmentation": None, "swap_efficiency": 0.1}):
        assert adapt_parameters_based_on_usage(metrics, optimizer) == []
    assert optimizer.cache.l2_cache.size_bytes == 10 * MIB and optimizer._compactor.interval_s == 4.0


def test_the_bounds_hold(optimizer):
    for _ in range(10):
        adapt_parameters_based_on_usage(POOR, optimizer)
    assert optimizer.cache.l2_cache.size_bytes == 13 * MIB and optimizer._compactor.interval_s == 0.5
    assert adapt_parameters_based_on_usage(POOR, optimizer) == []


def test_a_model_stands_for_its_optimizer(optimizer):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(q.ConfigurationError, match="Linear has no memory optimizer"):
        q.adapt_parameters_based_on_usage(POOR, model)
    model.memory_optimizer = optimizer
    adapt_parameters_based_on_usage(POOR, model)
    assert optimizer.cache.l2_cache.size_bytes == 12 * MIB


def test_without_a_target_the_defaults_are_what_it_speaks_of():
    l2, interval = adapt_parameters_based_on_usage(POOR)
    config = q.MemoryConfig()
    assert l2.after == pytest.approx(min(1.2 * config.l2_cache_size, config.most_l2_bytes()), abs=1)
    assert interval.after == config.pool_compaction_interval / 2
    assert not l2.applied and not interval.applied


@pytest.mark.parametrize("value", [1.1, -0.1, float("nan"), "0.5", True])
def test_what_is_no_share_is_refused_before_anything_changes(optimizer, value):
    with pytest.raises(q.ConfigurationError, match="fragmentation"):
        adapt_parameters_based_on_usage({"cache_hit_rate": 0.1, "fragmentation": value}, optimizer)
    assert optimizer.cache.l2_cache.size_bytes == 10 * MIB
