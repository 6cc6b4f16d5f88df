"""A snapshot is what the parts say, as JSON."""

from __future__ import annotations

import json

import pytest
import torch

import qwen3_vl_memory_optimizations as q
from qwen3_vl_memory_optimizations.figures import METRICS
from qwen3_vl_memory_optimizations.monitoring import get_memory_performance_metrics, take_snapshot
from tests.model.tiny import DIRECTORY, cases

MIB = 2**20
KEYS = {
    "schema",
    "time_s",
    "uptime_s",
    "process",
    "budget",
    "memory_map",
    "tiers",
    "pools",
    "fragmentation",
    "kinds",
    "codecs",
    "cache",
    "paging",
    "swapping",
    "migrations",
    "prediction",
    "gc",
    "life_cycles",
    "progress",
    "responses",
    "sessions_open",
    "verdict",
    "metrics",
    "alerts",
}


def test_the_map_says_what_lies_where(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    tensors = [optimizer.allocate_tensor((MIB,), torch.uint8, kind) for kind in ["general"] * 6 + ["kv_cache"] * 4]
    snapshot = take_snapshot(optimizer)
    assert set(snapshot) == KEYS
    where = {(row["tier"], row["kind"], row["codec"]): (row["tensors"], row["bytes"]) for row in snapshot["memory_map"]}
    assert sum(n_bytes for _, n_bytes in where.values()) == 10 * MIB
    assert sum(n_bytes for (tier, *_), (_, n_bytes) in where.items() if tier == "ssd") == 2 * MIB
    lives = {kind: (row["births"], row["alive"]) for kind, row in snapshot["life_cycles"].items()}
    assert lives == {"general": (6, 6), "kv_cache": (4, 4)}
    assert where["cpu", "kv_cache", "none"] == (4, 4 * MIB)
    assert snapshot["budget"]["undroppable_share"] == 1.0 and len(tensors) == 10
    assert json.loads(json.dumps(snapshot)) == snapshot


@pytest.mark.parametrize(
    "off",
    ["enable_memory_pooling", "enable_cache_hierarchy", "enable_swapping", "enable_tiering", "enable_predictive_gc"],
)
def test_what_is_switched_off_is_absent_and_breaks_nothing(make_optimizer, off):
    snapshot = take_snapshot(make_optimizer(8 * MIB, **{off: False}))
    assert set(snapshot) == KEYS and json.dumps(snapshot)
    gone = {
        "enable_memory_pooling": snapshot["pools"] == {} and snapshot["fragmentation"] is None,
        "enable_cache_hierarchy": snapshot["cache"] is None,
        "enable_swapping": snapshot["swapping"] is None,
        "enable_predictive_gc": snapshot["gc"] is None,
        "enable_tiering": snapshot["migrations"]["tensors"] is None,
    }
    assert gone[off]


def test_a_model_that_answers_fills_the_figures(tmp_path):
    model = q.create_optimized_model(DIRECTORY, {"cache_dir": tmp_path, "tensor_budget": "1MB", "codec": "int8"})
    inputs = cases()["image"]
    with model.memory_optimizer as optimizer:
        before = take_snapshot(optimizer)["responses"]
        assert before["count"] == 0 and before["last"] is None and before["current_s"] is None
        new = 0
        for first_id in (inputs["input_ids"][0, 0], 7):  # the same image in another conversation
            inputs["input_ids"][0, 0] = first_id
            out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            new += out.shape[1] - inputs["input_ids"].shape[1]
        model(**inputs)
        snapshot = take_snapshot(optimizer)
        responses = snapshot["responses"]
        assert (responses["count"], responses["tokens"]) == (3, new) == (3, 8)
        assert responses["last"]["generated"] is False and responses["running_s"] is None
        assert responses["current_s"] == responses["last"]["wall_s"] > 0
        first, second = (each for each in optimizer.figures.responses.recent() if each.generated)
        assert 0 < first.first_token_s < first.wall_s and first.decode_steps == 3
        assert responses["tokens_per_s"] == pytest.approx(6 / (first.decode_s + second.decode_s))
        assert first.decode_bytes > 3 * 0.5 * snapshot["kinds"]["weights"]["encoded_bytes"] * 0.5
        assert snapshot["metrics"]["cache_hit_rate"] > 0 and snapshot["metrics"]["cache_efficiency"] > 0
        assert snapshot["metrics"]["allocation_speedup"] is None, "a snapshot measures nothing"
        metrics = get_memory_performance_metrics(model)
        assert tuple(metrics) == METRICS
        methods = {
            "pool_utilization_rate": "get_pool_utilization",
            "allocation_speedup": "get_allocation_speedup",
            "cache_hit_rate": "get_cache_hit_rate",
            "cache_efficiency": "get_cache_efficiency",
            "compression_ratio": "get_average_compression_ratio",
            "compression_quality": "get_compression_quality",
            "swap_operations_count": "get_swap_count",
            "swap_efficiency": "get_swap_efficiency",
            "tier_optimization_effectiveness": "get_tier_effectiveness",
            "gc_success_rate": "get_gc_success_rate",
            "predicted_lifetime_accuracy": "get_lifetime_prediction_accuracy",
            "memory_bandwidth_utilization": "get_memory_bandwidth_usage",
            "cache_hit_improvement": "get_cache_improvement_over_baseline",
        }
        assert {key: getattr(optimizer, name)() for key, name in methods.items()} == {
            key: metrics[key] for key in methods
        }
        assert optimizer.get_tier_migration_rate() == pytest.approx(metrics["tier_migration_rate"], rel=0.5)
        assert 0 < metrics["memory_bandwidth_utilization"] < 1
        for share in ("swap_efficiency", "cache_hit_improvement"):
            assert 0 <= metrics[share] <= 1, share
        assert metrics["tier_optimization_effectiveness"] == snapshot["prediction"]["tier_effectiveness"]


def test_an_answer_in_progress_shows_its_figures(tmp_path):
    model = q.create_optimized_model(DIRECTORY, {"cache_dir": tmp_path, "codec": "none"})
    seen = []
    with model.memory_optimizer as optimizer:
        assert take_snapshot(optimizer)["progress"] is None
        handle = model.lm_head.register_forward_pre_hook(lambda *_: seen.append(take_snapshot(optimizer)))
        model.generate(input_ids=torch.tensor([[7, 8]]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        handle.remove()
        after = take_snapshot(optimizer)
    assert [each["progress"]["phase"] for each in seen] == ["prompt", *["answer"] * 4]
    assert seen[0]["responses"]["tokens_per_s"] is None and seen[0]["responses"]["first_token_s"] is None
    last = seen[-1]
    assert (last["progress"]["done"], last["progress"]["total"]) == (4, 5)
    assert last["responses"]["tokens_per_s"] == last["progress"]["tokens_per_s"] > 0
    assert last["responses"]["first_token_s"] == last["progress"]["first_token_s"] > 0
    assert [each["responses"]["tokens"] for each in seen] == [0, 1, 2, 3, 4]
    assert after["progress"] is None and after["responses"]["tokens"] == 5


def test_metrics_of_what_is_no_optimized_model_are_refused():
    with pytest.raises(q.ConfigurationError, match="Linear is not an optimized model"):
        get_memory_performance_metrics(torch.nn.Linear(1, 1))


def test_a_generate_that_fails_is_a_response_without_tokens(tmp_path):
    model = q.create_optimized_model(DIRECTORY, {"cache_dir": tmp_path, "codec": "none"})
    with model.memory_optimizer as optimizer:
        with pytest.raises(ValueError, match="temperature"):
            model.generate(input_ids=torch.tensor([[7]]), do_sample=True, temperature=-1.0, max_new_tokens=2)
        [failed] = optimizer.figures.responses.recent()
        assert (failed.new_tokens, failed.first_token_s, failed.decode_s) == (0, None, 0.0)
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[10**9]]))
        assert optimizer.figures.responses.running_s() is None
        assert optimizer.figures.responses.responses == 1
