from pathlib import Path

import pytest

from qwen3_vl_memory_optimizations import ConfigurationError, MemoryConfig
from qwen3_vl_memory_optimizations.config import parse_size

SECTION_5_2 = {
    "memory_pool_size": 2.5 * 1024 * 1024 * 1024,
    "enable_l1_gpu_cache": True,
    "l1_cache_size": 0.5 * 1024 * 1024 * 1024,
    "enable_l2_cpu_cache": True,
    "l2_cache_size": 1 * 1024 * 1024 * 1024,
    "enable_l3_ssd_cache": True,
    "l3_cache_size": 5 * 1024 * 1024 * 1024,
    "enable_int8_quantization": True,
    "enable_sparse_compression": True,
    "enable_memory_swapping": True,
    "swap_pressure_threshold": 0.75,
    "enable_memory_tiering": True,
    "tier_migration_interval": 0.5,
    "enable_predictive_gc": True,
    "gc_collection_interval": 1.0,
}


def test_the_recommended_settings_of_the_specification_are_taken_as_written():
    config = MemoryConfig.from_mapping(SECTION_5_2)
    assert config.memory_pool_size == 2_684_354_560
    assert config.l1_cache_size == 536_870_912
    assert type(config.l1_cache_size) is int
    assert config.swap_pressure_threshold == 0.75


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1.6GB", 1_600_000_000),
        ("4G", 4 * 10**9),
        ("512 MiB", 512 * 2**20),
        ("1.5kib", 1536),
        (" 100 B ", 100),
        ("7", 7),
        (2.5 * 2**30, 2_684_354_560),
    ],
)
def test_sizes(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("value", [0, -1, 0.5, float("nan"), float("inf"), "0GB", "-4GB", "4 parsecs", "GB", "", "1e9"])
def test_impossible_sizes_are_refused_by_name(value):
    with pytest.raises(ConfigurationError, match="ram_budget"):
        MemoryConfig(ram_budget=value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ram_budget", True),
        ("ram_budget", [4]),
        ("memory_pool_size", None),
        ("enable_swapping", 1),
        ("enable_compression", "yes"),
        ("enable_compression", None),
        ("swap_pressure_threshold", "high"),
        ("swap_pressure_threshold", True),
        ("swap_pressure_threshold", 0),
        ("swap_pressure_threshold", 1.01),
        ("tier_migration_interval", 0),
        ("gc_collection_interval", float("inf")),
        ("codec", None),
        ("swap_algorithm", ["lru"]),
        ("image_policy", "crop"),
        ("cache_dir", 7),
        ("swap_dir", 7),
        ("swap_size", "all"),
        ("swap_size", 0),
    ],
)
def test_a_wrong_type_or_value_names_its_key(key, value):
    with pytest.raises(ConfigurationError, match=key):
        MemoryConfig.from_mapping({key: value})


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("ram_buget", "ram_budget"), ("enable_swaping", "enable_swapping"), ("Codec", "codec"), (3, "")],
)
def test_an_unknown_key_names_the_nearest(wrong, nearest):
    with pytest.raises(ConfigurationError, match="unknown key") as caught:
        MemoryConfig.from_mapping({wrong: 1})
    assert repr(wrong) in str(caught.value) and nearest in str(caught.value)


def test_configuration_errors_are_value_errors_and_nothing_else_than_a_mapping_is_taken():
    with pytest.raises(ValueError, match="list"):
        MemoryConfig.from_mapping([("codec", "none")])  # type: ignore[arg-type]


def test_a_config_passes_through_and_cannot_be_changed():
    config = MemoryConfig(codec="none")
    assert MemoryConfig.from_mapping(config) is config
    assert MemoryConfig.from_mapping(None) == MemoryConfig()
    with pytest.raises(AttributeError):
        config.codec = "int8"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "codec", "unmeasured"),
    [
        ({}, "auto", "int8_rotated"),
        ({"enable_compression": False}, "none", "none"),
        ({"enable_int8_quantization": False}, "auto", "none"),
        ({"codec": "int8", "enable_compression": False}, "int8", "int8"),
        ({"codec": "none"}, "none", "none"),
    ],
)
def test_the_codec_of_weights(settings, codec, unmeasured):
    config = MemoryConfig(**settings)
    assert (config.weight_codec(), config.unmeasured_codec()) == (codec, unmeasured)


def test_packed_dir_prefers_the_setting_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("QWEN3VL_MEM_CACHE", str(tmp_path))
    assert MemoryConfig().packed_dir == tmp_path / "packed"
    assert MemoryConfig(cache_dir="~/mem").packed_dir == Path.home() / "mem/packed"
    monkeypatch.delenv("QWEN3VL_MEM_CACHE")
    assert MemoryConfig().packed_dir == Path.home() / ".cache/qwen3vl-mem/packed"


@pytest.mark.parametrize(
    ("given", "seconds"), [(30, 30.0), ("30s", 30.0), ("1.5min", 90.0), ("2m", 120.0), ("500 ms", 0.5), ("1h", 3600.0)]
)
def test_durations(given, seconds):
    assert MemoryConfig(first_token_s=given).first_token_s == seconds


@pytest.mark.parametrize("given", [0, -1, "soon", "30 days", True, float("inf"), None])
def test_durations_that_are_none(given):
    with pytest.raises(ConfigurationError, match="first_token_s"):
        MemoryConfig(first_token_s=given)


def test_a_level_of_detail_is_one_of_a_few():
    assert MemoryConfig(detail="document").detail == "document"
    with pytest.raises(ConfigurationError, match="low, medium, document, high, auto"):
        MemoryConfig(detail="best")
