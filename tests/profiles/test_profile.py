"""The files: those of the package, and what is said of a wrong one."""

import re
from pathlib import Path

import pytest

from qwen3_vl_memory_optimizations import ConfigurationError, MemoryConfig, profiles
from qwen3_vl_memory_optimizations.profiles import load_profile
from tests.test_config import SECTION_5_2

from .machines import GIB, GTX_1050, describe

SHIPPED = sorted(Path(profiles.__file__).parent.glob("*.toml"))
NAMES = [
    "ram-16gb",
    "ram-16gb-gpu",
    "ram-4gb",
    "ram-4gb-gpu",
    "ram-8gb",
    "ram-8gb-gpu",
    "reference-laptop",
    "server",
]


def test_these_profiles_are_shipped():
    assert sorted(path.stem for path in SHIPPED) == NAMES


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpu", [None, GTX_1050], ids=["no GPU", "GPU"])
def test_each_shipped_profile_gives_a_valid_configuration_within_the_machine(tmp_path, monkeypatch, path, gpu):
    profile = load_profile(path, of_user=False)
    hardware = describe(tmp_path, monkeypatch, ram_bytes=8 * GIB, gpu=gpu)

    settings, left_out = profile.settings(hardware)

    config = MemoryConfig.from_mapping(settings)
    assert config.ram_budget < hardware.ram_bytes
    assert config.l2_cache_size < config.ram_budget
    assert left_out.keys() <= {"l1_cache_size"}
    assert bool(left_out) == (gpu is None and "%" in str(profile.memory_config.get("l1_cache_size")))


def test_the_reference_profile_is_section_5_2_and_a_budget(tmp_path, monkeypatch):
    profile = load_profile(next(path for path in SHIPPED if path.stem == "reference-laptop"), of_user=False)
    hardware = describe(tmp_path, monkeypatch, ram_bytes=8 * GIB, gpu=GTX_1050)
    settings, left_out = profile.settings(hardware)
    assert left_out == {}
    assert settings.pop("ram_budget") == int(8 * GIB * 0.6)
    assert settings == SECTION_5_2


def test_shares_are_of_the_memory_and_of_the_gpu(tmp_path, monkeypatch):
    path = tmp_path / "mine.toml"
    path.write_text(
        'why = "x"\n[match]\n[memory_config]\nram_budget = "50%"\nl2_cache_size = "12.5 %"\nl1_cache_size = "25%"\n'
        'gpu_budget = "100%"\nl3_cache_size = "3GB"\nswap_pressure_threshold = 0.6\n'
    )
    with_gpu = describe(tmp_path / "a", monkeypatch, ram_bytes=8 * GIB, gpu=GTX_1050)
    without = describe(tmp_path / "b", monkeypatch, ram_bytes=8 * GIB)
    of_ram = {"ram_budget": 4 * GIB, "l2_cache_size": GIB, "l3_cache_size": 3 * 10**9, "swap_pressure_threshold": 0.6}

    assert load_profile(path).settings(with_gpu) == (of_ram | {"l1_cache_size": GIB // 2, "gpu_budget": 2 * GIB}, {})
    settings, left_out = load_profile(path).settings(without)
    assert settings == of_ram
    assert left_out.keys() == {"l1_cache_size", "gpu_budget"}
    assert "there is no GPU" in left_out["gpu_budget"]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('why = "x"\n[match\n', 2, "not TOML"),
        ('why = "x"\nwhy = "y"\n', 2, "not TOML"),
        ('why = "x"\n\n[match]\n[memory_config]\nl2_cache_size =', 5, "not TOML"),
        ('[match]\n[memory_config]\nwhy = "x"\n', 3, "unknown key 'why'"),
        ('why = "x"\nprioritty = 3\n[match]\n[memory_config]\n', 2, "did you mean 'priority'"),
        ('why = "x"\n[match]\nram_form = "3GB"\n[memory_config]\n', 3, "did you mean 'ram_from'"),
        ('why = "x"\n[match]\n[memory_config]\ncodec = "int8"\n\nram_buget = "3GB"\n', 6, "did you mean 'ram_budget'"),
        ('why = "x"\n[match]\n[memory_config]\n"ram_budget" = "3 gold"\n', 4, "'3 gold' is not a size"),
        ('why = "x"\n[match]\n[memory_config]\nram_budget = "101%"\n', 4, "outside"),
        ('why = "x"\n[match]\n[memory_config]\nram_budget = "0%"\n', 4, "outside"),
        ('why = "x"\n[match]\n[memory_config]\nl3_cache_size = "10%"\n', 4, "percentages are only for ram_budget"),
        ('why = "x"\n[match]\n[memory_config]\nprofile = "auto"\n', 4, "cannot refer to another"),
        ('why = "x"\n[match]\n[memory_config]\nenable_tiering = 1\n', 4, "expected True or False"),
        ('why = "x"\npriority = "high"\n[match]\n[memory_config]\n', 2, "whole number"),
        ('why = "x"\npriority = true\n[match]\n[memory_config]\n', 2, "whole number"),
        ('why = ""\n[match]\n[memory_config]\n', 1, "a line of text"),
        ('why = """a\nb"""\n[match]\n[memory_config]\n', 1, "a line of text"),
        ('why = "x"\nmatch = 3\n[memory_config]\n', 2, "needs a table"),
        ('why = "x"\n[match]\nram_from = -1\n[memory_config]\n', 3, "ram_from: -1 is not"),
        ('why = "x"\n[match]\ngpu = true\n[memory_config]\n', 3, "not one of any, none"),
        ('why = "x"\n[match]\nstorage = ["nvme", "tape"]\n[memory_config]\n', 3, "'tape' is not one of nvme"),
        ('why = "x"\n[match]\nstorage = []\n[memory_config]\n', 3, "list of strings"),
        ('why = "x"\n[match]\ngpu_compute_capability = "sm_61"\n[memory_config]\n', 3, "strings such as '6.1'"),
        ('why = "x"\n[match]\ngpu_compute_capability = [6.1]\n[memory_config]\n', 3, "list of strings"),
        ('why = "x"\n[match]\ncpu_model = "(i5"\n[memory_config]\n', 3, "not a regular expression"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path, text, line, words):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=re.escape(words)) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[match]\n[memory_config]\n", "why"),
        ('why = "x"\n[match]\n', r"needs a table \[memory_config\]"),
        ('why = "x"\n[memory_config]\n', r"needs a table \[match\]"),
    ],
)
def test_what_is_missing_has_no_line(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=words) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"none\.toml: cannot read this profile"):
        load_profile(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match=r"binary\.toml: cannot read this profile"):
        load_profile(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("match", "fits"),
    [
        ('ram_from = "8GiB"', True),
        ('ram_below = "8GiB"', False),
        ('ram_from = "9GiB"', False),
        ('ram_from = "4GB"\nram_below = "9GB"', True),
        ('gpu = "any"', True),
        ('gpu = "none"', False),
        ('gpu_memory_from = "2GiB"', True),
        ('gpu_memory_below = "2GiB"', False),
        ('gpu_compute_capability = ["6.1", "7.5"]', True),
        ('gpu_compute_capability = "8.6"', False),
        ('storage = ["ssd", "nvme"]', True),
        ('storage = "hdd"', False),
        ('cpu_model = "ryzen [57]"', True),
        ('cpu_model = "^ryzen"', False),
        ('cpu_model = "ryzen"\nstorage = "hdd"', False),
        ("", True),
    ],
)
def test_conditions(tmp_path, monkeypatch, match, fits):
    hardware = describe(tmp_path / "machine", monkeypatch, ram_bytes=8 * GIB, gpu=GTX_1050)
    path = tmp_path / "mine.toml"
    path.write_text(f'why = "x"\n[match]\n{match}\n[memory_config]\n')
    conditions = load_profile(path).conditions(hardware)
    assert all(condition.met for condition in conditions) == fits
    assert bool(conditions) == bool(match)


def test_without_a_gpu_no_condition_on_one_is_met(tmp_path, monkeypatch):
    hardware = describe(tmp_path / "machine", monkeypatch, ram_bytes=8 * GIB)
    path = tmp_path / "mine.toml"
    path.write_text(
        'why = "x"\n[match]\ngpu = "any"\ngpu_memory_below = "9GB"\ngpu_compute_capability = "6.1"\n[memory_config]\n'
    )
    conditions = load_profile(path).conditions(hardware)
    assert [(each.met, each.found) for each in conditions] == [(False, "none")] * 3
