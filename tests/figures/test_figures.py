"""Each figure of section 7.1 in a state where its value is known by hand."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_vl_memory_optimizations import MemoryConfig, MemoryOptimizer, create_optimized_model
from qwen3_vl_memory_optimizations.cache import CacheItem, HierarchicalCacheSystem
from qwen3_vl_memory_optimizations.compression import EncodingLog, INT8Codec, create_kv_codec
from qwen3_vl_memory_optimizations.figures import METRICS, MemoryFigures, allocation_speedup
from qwen3_vl_memory_optimizations.model.checkpoint.loading import WeightLoader
from qwen3_vl_memory_optimizations.model.checkpoint.packed_encodings import ENCODINGS_FILE, PackedEncodings
from qwen3_vl_memory_optimizations.model.checkpoint.packing import CODECS_KEY, original_dtypes
from qwen3_vl_memory_optimizations.model.checkpoint.plan import CompressionPlan
from qwen3_vl_memory_optimizations.model.run.response_times import ResponseTimes
from qwen3_vl_memory_optimizations.paging import BlockSpace
from qwen3_vl_memory_optimizations.process import rss_bytes, tame_allocator
from tests.model.tiny import DIRECTORY
from tests.paging.weights import settle

MIB = 2**20


class Clock:
    """A clock in seconds that stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def fill(optimizer, n_tensors):
    return [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(n_tensors)]


def test_before_anything_happened_only_what_is_known_is_said(make_optimizer):
    metrics = make_optimizer(8 * MIB).metrics(measure=False)
    assert tuple(metrics) == METRICS and len(METRICS) == 14
    known = {key: value for key, value in metrics.items() if value is not None}
    assert known == {"pool_utilization_rate": 0.0, "swap_operations_count": 0, "tier_migration_rate": 0.0}


# --- pools --------------------------------------------------------------------------------------------------------


def test_pool_utilization_is_granted_bytes_over_the_address_space_of_all_pools(make_optimizer):
    optimizer = make_optimizer(8 * MIB, memory_pool_size=4 * MIB)
    tensors = [*fill(optimizer, 2), optimizer.allocate_tensor((2 * MIB - 1,), torch.uint8, "kv_cache")]
    assert optimizer.get_pool_utilization() == 4 / 16
    del tensors
    optimizer.pager.trim()
    assert optimizer.get_pool_utilization() == 0.0
    assert make_optimizer(8 * MIB, enable_memory_pooling=False).get_pool_utilization() is None


def test_the_allocation_speedup_is_the_ratio_of_the_best_times():
    took_s = iter([9.0, 6.0, 7.0, 8.0, 9.0] + [50.0] + [4.0, 2.0, 5.0, 4.0, 3.0])
    now_s, starts = 0.0, True

    def timer():
        nonlocal now_s, starts
        now_s += 0.0 if starts else next(took_s)
        starts = not starts
        return now_s

    assert allocation_speedup(MIB, timer) == 3.0  # 6 s to 2 s; the 50 s of the first block of the pool do not count
    assert next(took_s, None) is None


def test_a_pool_gives_memory_faster_than_the_system_and_is_measured_once(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    tame_allocator()
    hole = [torch.ones(20 * MIB, dtype=torch.uint8) for _ in range(2)]
    stays = torch.ones(100)
    del hole  # the heap keeps it, for `torch.empty` to find
    found = optimizer.get_allocation_speedup()
    del stays
    assert found > 1.5
    assert optimizer.get_allocation_speedup() == found
    assert optimizer.pager.ledger.held_bytes("measuring") == 0
    assert make_optimizer(8 * MIB, enable_memory_pooling=False).get_allocation_speedup() is None


def test_nothing_is_measured_where_the_budget_has_no_room_for_it(tmp_path):
    settings = {"ram_budget": rss_bytes() + 28 * MIB, "cache_dir": tmp_path, "tier_migration_interval": 1000.0}
    with MemoryOptimizer(memory_config=settings) as optimizer:
        assert optimizer.get_allocation_speedup() is None
        assert optimizer.pager.ledger.held_bytes("measuring") == 0


# --- cache --------------------------------------------------------------------------------------------------------


def test_cache_hit_rate_and_efficiency_follow_from_hits_and_seconds(make_optimizer):
    clock = Clock()
    config = MemoryConfig(private=True)
    cache = HierarchicalCacheSystem(config, timer=clock)
    optimizer = make_optimizer(8 * MIB)
    optimizer.cache = None
    assert (optimizer.get_cache_hit_rate(), optimizer.get_cache_efficiency()) == (None, None)
    optimizer.cache = cache
    assert (optimizer.get_cache_hit_rate(), optimizer.get_cache_efficiency()) == (None, None)

    def compute():
        clock.now_s += 2.0
        return CacheItem({"x": torch.ones(1000)})

    for _ in range(4):
        cache.get_or_compute("ab" * 32, compute)
    assert optimizer.get_cache_hit_rate() == 3 / 4
    assert optimizer.get_cache_efficiency() == 6.0 / 8.0  # 2 s computed, 3 times 2 s saved


# --- compression --------------------------------------------------------------------------------------------------


def test_the_ratio_counts_weights_with_their_scales_and_blocks_of_keys_and_values(make_optimizer):
    optimizer = make_optimizer()
    model = torch.nn.Sequential(torch.nn.Linear(1024, 2048, bias=False))
    WeightLoader(optimizer.pager, torch.float32).from_memory(model, "int8", initialize=False)
    weight = (4 * 2048 * 1024, 2048 * 1024 + 8 * 2048)  # a scale and a sum a row
    assert optimizer.get_average_compression_ratio() == pytest.approx(weight[0] / weight[1])
    space, codec = BlockSpace(optimizer.pager), create_kv_codec("none")
    layout = codec.layout(2, 32, 16, torch.float32)
    block = space.allocate(sum(segment.n_bytes for segment in layout))
    from qwen3_vl_memory_optimizations.compression import KVBlock

    states = torch.randn(2, 32, 16)
    optimizer.pager.encodings.encode_block("kv_cache", codec, states, states, KVBlock(block.data, layout))
    kv = 2 * states.nbytes
    assert optimizer.get_average_compression_ratio() == pytest.approx((weight[0] + kv) / (weight[1] + kv))


def test_the_quality_of_a_weight_is_one_less_its_error(make_optimizer):
    optimizer = make_optimizer()
    model = torch.nn.Sequential(torch.nn.Linear(1024, 2048, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(0.0)
        model[0].weight[:, 0] = 127.0  # so that the scale is 1
        model[0].weight[:, 1] = 0.4  # becomes 0
    WeightLoader(optimizer.pager, torch.float32).from_memory(model, "int8", initialize=False)
    error = 0.4 / (127.0**2 + 0.4**2) ** 0.5
    assert optimizer.get_compression_quality() == pytest.approx(1 - error, rel=1e-6)


def test_the_error_of_keys_and_values_is_sampled_on_the_first_block_and_one_of_64(make_optimizer):
    from qwen3_vl_memory_optimizations.compression import KVBlock

    log, codec = make_optimizer().pager.encodings, create_kv_codec("int8")
    layout = codec.layout(2, 32, 16, torch.float32)
    states = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(65):
        block = KVBlock(torch.empty(sum(segment.n_bytes for segment in layout), dtype=torch.uint8), layout)
        log.encode_block("kv_cache", codec, states, states, block)
    keys, values = torch.empty_like(states), torch.empty_like(states)
    codec.decode(block, keys, values)
    error = float((torch.cat([keys, values]) - torch.cat([states, states])).norm() / torch.cat([states, states]).norm())
    row = log.rows()["kv_cache"]
    assert row.encodes == 65 and row.decoded_bytes == row.sampled_bytes and row.decode_bytes_per_s > 0
    assert row.timed_bytes == row.original_bytes and row.sampled_bytes == 2 * row.original_bytes // 65
    assert row.relative_error == pytest.approx(error, rel=1e-3) and 0 < error < 0.02


def test_of_weights_packed_by_a_plan_its_errors_are_told(tmp_path):
    def load(codec):
        return create_optimized_model(DIRECTORY, {"cache_dir": tmp_path, "codec": codec})

    with load("auto").memory_optimizer as optimizer:
        [path] = (tmp_path / "packed").glob("*.plan.json")
        plan = CompressionPlan.load(path)
        sizes = {use.tensor_id: use.original_bytes for use in optimizer.pager.usage() if use.kind == "weights"}
        lost = sum(sizes[name] * weight.relative_error for name, weight in plan.weights.items() if name in sizes)
        assert set(sizes) <= set(plan.weights)
        assert optimizer.get_compression_quality() == pytest.approx(1 - lost / sum(sizes.values()))
    with load("int8").memory_optimizer as optimizer:
        assert optimizer.get_average_compression_ratio() > 3
    with load("none").memory_optimizer as optimizer:
        assert optimizer.get_compression_quality() == 1.0


def test_the_ratio_is_relative_to_the_checkpoint_and_not_to_what_the_model_computes_in(tmp_path):
    source = tmp_path / "bf16"
    shutil.copytree(DIRECTORY, source)
    path = source / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path, {"format": "pt"})
    for codec, expected in (("none", 1.0), ("int8", 1.95)):
        model = create_optimized_model(source, {"cache_dir": tmp_path, "codec": codec}, dtype=torch.float32)
        with model.memory_optimizer as optimizer:
            assert optimizer.get_average_compression_ratio() == pytest.approx(expected, rel=0.02)
            kinds = optimizer.get_memory_efficiency_stats()["kinds"]["weights"]
            assert kinds["logical_bytes"] == 2 * kinds["original_bytes"]


def test_of_checkpoints_packed_before_dtypes_were_recorded_the_configuration_counts():
    codecs = {CODECS_KEY: json.dumps({"a": "int8"})}
    for config, dtype in (({"text_config": {"dtype": "bfloat16"}}, torch.bfloat16), ({}, torch.float32)):
        assert original_dtypes(SimpleNamespace(metadata=codecs, config=config)) == {"a": dtype}


# --- swap and tiers -----------------------------------------------------------------------------------------------


def test_swaps_stalls_and_moves_are_counted_page_by_page(make_optimizer):
    optimizer, clock = make_optimizer(4 * MIB, swap_algorithm="lru"), Clock()
    optimizer.figures = MemoryFigures(optimizer.pager, timer=clock)
    tensors = fill(optimizer, 5)  # the first is written
    tensors[0].sum()  # it is read, and the second written for it
    settle(optimizer.pager)
    assert optimizer.get_swap_count() == 3
    assert optimizer.get_swap_efficiency() == 0.0  # one read, and it was waited for
    assert optimizer.get_tier_effectiveness() is None
    clock.now_s = 10.0
    assert optimizer.get_tier_migration_rate() == pytest.approx(3 / 10)
    second, third = tensors[1].tensor_id, tensors.pop(2)
    del third
    assert optimizer.pager.runtime.bring([second]) == [second]
    settle(optimizer.pager)
    tensors[1].sum()  # it is there already
    assert optimizer.get_tier_effectiveness() is None, "tiering did not bring it"
    assert optimizer.get_swap_efficiency() == 0.5
    assert optimizer.get_swap_count() == 4
    assert optimizer.get_tier_migration_rate() == pytest.approx(4 / 10)


def test_lru_on_a_cycle_has_nothing_and_the_prediction_is_measured_against_that(make_optimizer):
    found = {}
    for algorithm in ("lru", "predictive"):
        optimizer = make_optimizer(8 * MIB, swap_algorithm=algorithm)
        tensors = fill(optimizer, 10)
        stats, shadow = optimizer.pager.stats, optimizer.figures.shadow
        before = stats.hits, shadow.shadow_bytes, shadow.found_bytes
        for _ in range(20):
            for tensor in tensors:
                tensor.sum()
        assert shadow.shadow_bytes == before[1]
        assert shadow.found_bytes - before[2] == (stats.hits - before[0]) * MIB
        found[algorithm] = optimizer.get_cache_improvement_over_baseline()
    assert found["lru"] == 0.0 and found["predictive"] > 0.5


# --- collector and hardware ---------------------------------------------------------------------------------------


def test_the_figures_of_the_collector_are_passed_on(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    assert (optimizer.get_gc_success_rate(), optimizer.get_lifetime_prediction_accuracy()) == (None, None)
    optimizer.collector.counters.decided, optimizer.collector.counters.needed_again = 4, 1
    assert optimizer.get_gc_success_rate() == 0.75
    without = make_optimizer(8 * MIB, enable_predictive_gc=False)
    assert (without.get_gc_success_rate(), without.get_lifetime_prediction_accuracy()) == (None, None)


def test_lifetimes_that_came_true_are_counted(make_optimizer):
    optimizer, horizon = make_optimizer(64 * MIB), 10
    tensors = fill(optimizer, 2)
    for _ in range(6 * horizon):  # one is used in each round, the other never again
        tensors[0].sum()
        optimizer.collector.end_round()
        optimizer.collector.look()
    assert optimizer.get_lifetime_prediction_accuracy() > 0.9


def test_bandwidth_is_the_bytes_used_a_second_of_decoding_over_what_was_measured(make_optimizer):
    optimizer, clock, used = make_optimizer(8 * MIB), Clock(), [0]
    optimizer.figures.responses = times = ResponseTimes(lambda: used[0], timer=clock, cpu_timer=clock)
    assert optimizer.get_memory_bandwidth_usage() is None
    times.begin()
    for seconds, n_bytes in ((5.0, 10**12), (0.5, 10**9), (1.5, 10**9)):  # a prefill and two steps
        clock.now_s += seconds
        used[0] += n_bytes
        times.forward_ended()
    times.end(new_tokens=3, length=3)
    bandwidth = optimizer.figures.measured("memory_bandwidth")
    assert 1e9 < bandwidth < 1e12
    assert optimizer.get_memory_bandwidth_usage() == pytest.approx(2e9 / 2.0 / bandwidth)


# --- ours ---------------------------------------------------------------------------------------------------------


def test_the_worst_pool_says_how_fragmented_memory_is(make_optimizer):
    optimizer = make_optimizer(16 * MIB, memory_pool_size=8 * MIB)
    tensors = fill(optimizer, 8)
    assert optimizer.figures.fragmentation() == 0.0
    del tensors[::2]
    optimizer.pager.trim()
    assert optimizer.figures.fragmentation() == 0.75  # 4 MiB free, in holes of 1 MiB
    assert make_optimizer(8 * MIB, enable_memory_pooling=False).figures.fragmentation() is None


def test_data_counts_as_occupied_and_clean_weights_do_not(make_optimizer, tmp_path):
    optimizer = make_optimizer(8 * MIB)
    tensors = fill(optimizer, 6)
    assert optimizer.figures.occupancy().share == 6 / 8
    del tensors
    assert optimizer.figures.occupancy().share == 0.0
    model = create_optimized_model(DIRECTORY, {"cache_dir": tmp_path, "codec": "none", "tensor_budget": "3MB"})
    with model.memory_optimizer as optimizer:
        with torch.no_grad():
            for _ in range(2):
                model(input_ids=torch.tensor([[7, 8, 9]]))
        settle(optimizer.pager)
        resident = sum(use.resident_bytes for use in optimizer.pager.usage())
        occupancy = optimizer.figures.occupancy()
        assert resident > 0.8 * optimizer.pager.frames.limit_bytes, "the budget is full of weights"
        assert occupancy.share < 0.3 and occupancy.capacity_bytes == 3_000_000


def test_with_a_budget_for_the_process_its_own_memory_counts(tmp_path):
    budget = 2 * rss_bytes() + 200 * MIB
    with MemoryOptimizer(memory_config={"ram_budget": budget, "cache_dir": tmp_path}) as optimizer:
        before = optimizer.figures.occupancy()
        assert before.capacity_bytes == budget
        assert before.undroppable_bytes == sum(optimizer.pager.ledger.accounts().values())
        optimizer.reserve_activations(64 * MIB)
        assert optimizer.figures.occupancy().undroppable_bytes - before.undroppable_bytes == 64 * MIB
        tensor = optimizer.allocate_tensor((16 * MIB,), torch.uint8)
        optimizer.cache.put("ab" * 32, CacheItem({"x": torch.ones(100_000)}), saved_s=1.0)
        assert optimizer.pager.ledger.held_bytes("cache") == 400_000, "it leaves when anybody needs the room"
        added = optimizer.figures.occupancy().undroppable_bytes - before.undroppable_bytes
        others = sum(optimizer.pager.ledger.held_bytes(owner) for owner in ("workspace", "pressure"))
        assert added == 80 * MIB + others and tensor.numel() == 16 * MIB


def test_the_error_of_int8_rows_is_that_of_the_first_rows():
    log, codec = EncodingLog(), INT8Codec()
    weight = torch.zeros(200, 16)
    weight[:, 0] = 127.0
    weight[64:, 1] = 0.4  # beyond the sample
    log.encode_weight("a", codec, weight)
    assert log.weight_errors == {"a": 0.0}
    row = log.rows()["weights"]
    assert (row.encodes, row.timed_bytes, row.decoded_bytes) == (1, weight.nbytes, 64 * 16 * 4)
    assert row.encode_bytes_per_s == weight.nbytes / row.encode_s
    assert row.decode_bytes_per_s == row.decoded_bytes / row.decode_s


def test_of_weights_packed_by_a_named_codec_the_errors_and_speeds_of_packing_are_told(tmp_path):
    def load():
        config = {"codec": "int8", "tensor_budget": "2MB", "cache_dir": tmp_path}
        return create_optimized_model(DIRECTORY, config).memory_optimizer

    with load() as optimizer:
        [kept] = tmp_path.glob("packed/*/" + ENCODINGS_FILE)
        errors = json.loads(kept.read_text())["errors"]
        uses = {use.tensor_id: use for use in optimizer.pager.usage() if use.kind == "weights"}
        assert errors.keys() == {name for name, use in uses.items() if not use.lossless}
        lost = sum(errors[name] * uses[name].original_bytes for name in errors)
        quality = optimizer.get_compression_quality()
        assert quality == pytest.approx(1 - lost / sum(use.original_bytes for use in uses.values()))
        assert 0.98 < quality < 1
        first = optimizer.figures.compression()["weights"]
    assert first.encode_bytes_per_s > 0 and first.decode_bytes_per_s > 0
    with load() as optimizer:
        assert optimizer.figures.compression()["weights"] == first, "of the process that packed"
    kept.write_text("{")
    assert PackedEncodings.load(kept.parent) == PackedEncodings()
    with load() as optimizer:
        assert optimizer.get_compression_quality() is None
