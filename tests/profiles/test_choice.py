"""Which profile a machine gets, and that nobody gets one, or loses a setting to one, unasked."""

import pytest

from qwen3_vl_memory_optimizations import (
    ConfigurationError,
    InputError,
    MemoryConfig,
    MemoryOptimizer,
    create_optimized_model,
)
from qwen3_vl_memory_optimizations.evaluation import codecs
from qwen3_vl_memory_optimizations.hardware import HardwareProfile
from qwen3_vl_memory_optimizations.planning import pack_model
from qwen3_vl_memory_optimizations.profiles import choice as choice_module
from qwen3_vl_memory_optimizations.profiles import choose, configure, user_directory
from tests.model import tiny

from .machines import GIB, GTX_1050, RTX_3060, describe

I5 = "Intel(R) Core(TM) i5-10210U CPU @ 1.60GHz"


def write_profile(directory, name, *, match="", settings="", priority=0):
    path = directory / f"{name}.toml"
    path.write_text(f'why = "{name}"\npriority = {priority}\n[match]\n{match}\n[memory_config]\n{settings}\n')
    return path


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        # What is reported is less than what is built in: the firmware and integrated graphics take a part.
        ({"ram_bytes": 7.6 * GIB, "cpu": I5, "gpu": GTX_1050, "disk": "nvme0n1"}, "reference-laptop"),
        ({"ram_bytes": 15.5 * GIB, "cpu": I5, "gpu": GTX_1050, "disk": "nvme0n1"}, "reference-laptop"),
        ({"ram_bytes": 7.6 * GIB, "cpu": I5, "gpu": GTX_1050, "disk": "sda"}, "ram-8gb-gpu"),
        ({"ram_bytes": 7.6 * GIB, "cpu": I5, "disk": "nvme0n1"}, "ram-8gb"),
        ({"ram_bytes": 3.8 * GIB, "cpu": I5, "gpu": GTX_1050, "disk": "nvme0n1"}, "ram-4gb-gpu"),
        ({"ram_bytes": 3.5 * GIB}, "ram-4gb"),
        ({"ram_bytes": 1.0 * GIB}, "ram-4gb"),
        ({"ram_bytes": 3.8 * GIB, "gpu": GTX_1050}, "ram-4gb-gpu"),
        ({"ram_bytes": 5.8 * GIB}, "ram-8gb"),
        ({"ram_bytes": 7.7 * GIB, "gpu": RTX_3060}, "ram-8gb-gpu"),
        ({"ram_bytes": 13.4 * GIB}, "ram-16gb"),
        ({"ram_bytes": 15.5 * GIB, "gpu": RTX_3060}, "ram-16gb-gpu"),
        ({"ram_bytes": 31.2 * GIB}, "server"),
        ({"ram_bytes": 503 * GIB, "gpu": RTX_3060, "disk": "nvme0n1"}, "server"),
    ],
)
def test_each_machine_gets_the_profile_of_its_class(tmp_path, monkeypatch, machine, expected):
    choice = choose("auto", describe(tmp_path, monkeypatch, **machine))
    assert choice.chosen.profile.name == expected
    assert choice.chosen.fits
    assert len(choice.others) == 7
    if expected != "reference-laptop":
        assert not any(other.fits for other in choice.others), "else the name decides"


def test_a_gpu_that_is_only_asked_for_is_not_made_up(tmp_path, monkeypatch):
    describe(tmp_path, monkeypatch, ram_bytes=8 * GIB, cpu="AMD Ryzen 5", disk="nvme0n1")
    asked = {"cpu_model": "Intel i5-10210U", "gpu_model": "NVIDIA SM61", "memory_size": 8 * GIB, "storage_type": "nvme"}
    hardware = HardwareProfile.from_mapping(asked, root=tmp_path)
    assert choose("auto", hardware).chosen.profile.name == "ram-8gb"


def test_the_users_profile_goes_before_all_that_fit(tmp_path, monkeypatch, user_directory):
    hardware = describe(tmp_path, monkeypatch, ram_bytes=8 * GIB, cpu=I5, gpu=GTX_1050, disk="nvme0n1")
    write_profile(user_directory, "low", settings='codec = "int4"', priority=1)
    write_profile(user_directory, "a-high", settings='codec = "int8"', priority=2)
    write_profile(user_directory, "high", priority=2)
    write_profile(user_directory, "foreign", match='storage = "hdd"', priority=9)
    choice = choose("auto", hardware)
    assert (choice.chosen.profile.name, choice.chosen.profile.of_user) == ("a-high", True)
    assert choice.settings == {"codec": "int8"}
    assert [each.profile.name for each in choice.others if each.fits] == [
        *("high", "low", "reference-laptop", "ram-8gb-gpu")
    ]


def test_a_users_profile_replaces_the_one_of_its_name(tmp_path, monkeypatch, user_directory):
    hardware = describe(tmp_path, monkeypatch, ram_bytes=8 * GIB)
    path = write_profile(user_directory, "ram-8gb", match='storage = "hdd"', settings='ram_budget = "1GB"')
    with pytest.raises(ConfigurationError, match="none of .*ram-8gb.* matches this machine; name one, or add one in"):
        choose("auto", hardware)
    choice = choose("ram-8gb", hardware)
    assert choice.chosen.profile.path == path
    assert not choice.chosen.fits, "it was asked for by name"
    assert choice.settings == {"ram_budget": 10**9}


def test_a_wrong_file_of_the_user_is_never_passed_over_in_silence(tmp_path, monkeypatch, user_directory):
    hardware = describe(tmp_path, monkeypatch, ram_bytes=8 * GIB)
    (user_directory / "broken.toml").write_text("why = \n")
    with pytest.raises(ConfigurationError, match=r"broken\.toml, line 1"):
        choose("auto", hardware)
    assert choose("server", hardware).chosen.profile.name == "server", "a name reads one file"


def test_a_profile_is_found_by_its_path(tmp_path, monkeypatch):
    hardware = describe(tmp_path / "machine", monkeypatch, ram_bytes=8 * GIB)
    path = write_profile(tmp_path, "mine", settings='ram_budget = "25%"')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose(str(path), hardware).settings == choose("~/mine.toml", hardware).settings == {"ram_budget": 2 * GIB}


def test_an_unknown_name_is_told_before_the_machine_is_looked_at(monkeypatch):
    monkeypatch.setattr(choice_module, "detect_hardware", lambda path: pytest.fail("looked"))
    with pytest.raises(
        ConfigurationError, match=r"unknown profile 'servr'; did you mean 'server'\? Use auto, ram-16gb"
    ):
        configure({"profile": "servr"})


@pytest.mark.parametrize("value", ["", 3, True, ["auto"]])
def test_what_is_no_name_is_refused(value):
    with pytest.raises(ConfigurationError, match="profile: expected"):
        MemoryConfig(profile=value)


def test_the_directory_follows_the_rules_of_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    usual = tmp_path / ".config/qwen3vl-mem/profiles"
    for value in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert user_directory() == usual
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert user_directory() == usual
    monkeypatch.setenv("XDG_CONFIG_HOME", "/etc/mine")
    assert str(user_directory()) == "/etc/mine/qwen3vl-mem/profiles"


# --- settings -----------------------------------------------------------------------------------------------------


def test_without_a_profile_nothing_is_chosen_and_nothing_detected(monkeypatch):
    monkeypatch.setattr(choice_module, "detect_hardware", lambda path: pytest.fail("looked"))
    monkeypatch.setattr(choice_module, "_all", lambda: pytest.fail("read"))
    config = MemoryConfig(codec="none")
    assert configure(config) is config
    assert configure() == configure({}) == MemoryConfig()
    assert configure().ram_budget is None


def test_what_the_user_gives_goes_before_the_profile(tmp_path, monkeypatch, user_directory):
    hardware = describe(tmp_path, monkeypatch, ram_bytes=8 * GIB)
    write_profile(
        user_directory, "mine", settings='ram_budget = "50%"\nl2_cache_size = "7MB"\ncodec = "int4"\nprivate = true'
    )
    # One at its default, one that asks for no limit: both were given.
    config = configure({"profile": "mine", "codec": "auto", "ram_budget": None}, hardware)
    assert config == MemoryConfig(l2_cache_size=7_000_000, private=True)


def test_of_an_instance_what_is_not_at_its_default_was_given(tmp_path, monkeypatch, user_directory):
    hardware = describe(tmp_path, monkeypatch, ram_bytes=8 * GIB)
    write_profile(user_directory, "mine", settings='ram_budget = "50%"\nl2_cache_size = "7MB"')
    config = configure(MemoryConfig(profile="mine", l2_cache_size="9MB", codec="none"), hardware)
    assert config == MemoryConfig(ram_budget=4 * GIB, l2_cache_size=9_000_000, codec="none")


def test_settings_hold_no_profile_once_it_was_used(tmp_path, monkeypatch, user_directory):
    hardware = describe(tmp_path, monkeypatch, ram_bytes=8 * GIB)
    path = write_profile(user_directory, "mine", settings='l2_cache_size = "7MB"')
    config = configure({"profile": "mine"}, hardware)
    path.unlink()
    assert config.profile is None
    assert configure(config, hardware) is config


def test_an_optimizer_takes_the_profile_of_the_hardware_it_is_told(tmp_path, monkeypatch, user_directory):
    write_profile(user_directory, "small", match='ram_below = "2GB"', settings='tensor_budget = "10%"\nprivate = true')
    settings = {"cache_dir": tmp_path, "memory_pool_size": 2**20, "profile": "auto"}
    with MemoryOptimizer({"memory_size": 10**9}, settings) as optimizer:
        assert optimizer.config.tensor_budget == optimizer.pager.ledger.tensor_budget_bytes == 10**8
        assert optimizer.config.private
        assert optimizer.config.memory_pool_size == 2**20


def test_a_model_takes_the_profile_it_is_asked_for(tmp_path, user_directory):
    write_profile(user_directory, "mine", settings='tensor_budget = "2MB"\ncodec = "int8"')
    model = create_optimized_model(tiny.DIRECTORY, {"profile": "mine", "cache_dir": tmp_path, "codec": "none"})
    with model.memory_optimizer as optimizer:
        assert optimizer.config.tensor_budget == 2_000_000
        assert optimizer.config.codec == "none"


def test_a_profile_that_the_configuration_of_a_model_names_is_used_and_stays_named(tmp_path, user_directory):
    write_profile(user_directory, "mine", settings='tensor_budget = "2MB"\ncodec = "none"')
    config = tiny.reference().config.__class__.from_pretrained(tiny.DIRECTORY)
    config.memory_optimization_config = MemoryConfig(profile="mine", cache_dir=tmp_path)
    model = create_optimized_model(config)
    with model.memory_optimizer as optimizer:
        assert optimizer.config.tensor_budget == 2_000_000
        assert {entry.codec.name for entry in optimizer.pager.entries.values()} == {"none"}
    # Saved with the model, it is chosen anew on the machine that loads it.
    assert config.memory_optimization_config == {"profile": "mine", "cache_dir": str(tmp_path)}


def test_packing_follows_the_profile(tmp_path, user_directory):
    write_profile(user_directory, "mine", settings='codec = "none"')
    settings = MemoryConfig(profile="mine", cache_dir=tmp_path)
    assert pack_model(tiny.DIRECTORY, settings) == tiny.DIRECTORY, "nothing to encode"
    assert list(tmp_path.iterdir()) == []


def test_each_codec_is_evaluated_within_the_profile_and_not_replaced_by_its_codec(
    tmp_path, monkeypatch, user_directory
):
    write_profile(user_directory, "mine", settings='tensor_budget = "2MB"\ncodec = "int8"')
    loaded = []

    def load(directory, config, **options):
        loaded.append(config)
        raise InputError("seen")

    monkeypatch.setattr(codecs, "create_optimized_model", load)
    with pytest.raises(InputError, match="seen"):
        next(codecs.evaluate_codecs(tiny.DIRECTORY, ["auto"], [], config=MemoryConfig(profile="mine")))
    assert loaded == [MemoryConfig(tensor_budget="2MB", codec="auto")]
