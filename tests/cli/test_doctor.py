import io
import json

import pytest
from rich.console import Console

from qwen3_vl_memory_optimizations.cli.doctor import command as doctor
from qwen3_vl_memory_optimizations.cli.doctor import measurements
from qwen3_vl_memory_optimizations.errors import StorageError

PROFILE = {
    "asked_for": "auto",
    "user_directory": "/home/someone/.config/qwen3vl-mem/profiles",
    "problem": None,
    "chosen": {
        "name": "reference-laptop",
        "file": "/home/someone/" + "deep/" * 20 + "profiles/reference-laptop.toml",
        "why": "the laptop of the specification",
        "conditions": [
            {"wanted": "processor i5-10210U", "found": "Intel(R) Core(TM) i5-10210U CPU @ 1.60GHz", "met": True}
        ],
        "settings": {"ram_budget": 4_800_000_000, "enable_tiering": True, "tier_migration_interval": 0.5},
        "left_out": {"l1_cache_size": "25% of GPU memory, but there is no GPU"},
        "considered": [
            {"name": "server", "conditions": [{"wanted": "memory from 24 GB", "found": "8 GB", "met": False}]},
            {"name": "ram-8gb-gpu", "conditions": [{"wanted": "a GPU", "found": "GTX", "met": True}]},
        ],
    },
}


MEASURED = {
    "ssd_bytes_per_s": 2.1e9,
    "ssd_problem": None,
    "memory_bytes_per_s": 17.3e9,
    "ssd_directory": "/home/someone/.cache/qwen3vl-mem",
    "decode_operations_per_s": {"float32": 8.1e9, "bfloat16": 1.2e9, "int8_rotated": 16e9, "int4": 27e9},
    "prompt_operations_per_s": {"float32": 151e9, "bfloat16": 1.3e9, "int8_rotated": 260e9, "int4": 51e9},
    "spreads": {"decode int4": 0.5, "memory": 0.1},
}
ROW = {
    "model": "8B",
    "codec": "int8_rotated",
    "budget_bytes": 5.5e9,
    "least_bytes": 1.5e9,
    "whole_bytes": 9e9,
    "fits": True,
    "in_memory": False,
    "read_bytes_per_token": 10.1e9,
    "tokens_per_s": 0.208,
    "limit": "SSD",
    "page_s": 7300.0,
    "measured": False,
    "tokens": 262144,
    "pages": 178,
}


def test_the_answer_comes_first_then_the_table(run, tmp_path):
    result = run("doctor", "--quick", "--path", tmp_path, "--ram-budget", "4GB")
    assert result.exit_code == 0, result.stderr
    first, second, third, _, title = result.stdout.splitlines()[:5]
    assert first.startswith("Use ") and " bits in 4 GB: about " in first and "per page to the first token" in first
    assert second.startswith("Least budget for it: ")
    assert third.startswith("qwen3vl-mem generate Qwen/Qwen3-VL-") and "--ram-budget 4GB" in third
    assert title.startswith("Qwen3-VL on this machine")
    assert "Minimum --ram-budget" not in result.stdout


def test_json_recommends_measures_and_estimates(run, tmp_path):
    result = run("doctor", "--quick", "--json", "--path", tmp_path, "--ram-budget", "4GB")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) == {
        "recommendation",
        "estimates",
        "hardware",
        "profile",
        "energy",
        "measured",
        "compute_dtype",
        "kernels",
        "ram_budget_bytes",
        "models",
        "defaults",
    }
    assert report["ram_budget_bytes"] == report["recommendation"]["row"]["budget_bytes"] == 4_000_000_000
    assert len(report["recommendation"]["lines"]) == 3
    assert report["measured"]["ssd_bytes_per_s"] > 0
    assert report["measured"]["memory_bytes_per_s"] > 0
    assert set(report["measured"]["prompt_operations_per_s"]) == {"float32", "bfloat16", "int8_rotated", "int4"}
    assert report["compute_dtype"] in ("float32", "bfloat16")
    assert [(row["model"], row["codec"]) for row in report["estimates"]] == [
        (model, codec) for model in ("2B", "4B", "8B") for codec in ("none", "int8_rotated", "int4")
    ]
    assert list(tmp_path.iterdir()) == []


def test_without_room_on_the_disk_the_rest_is_still_told(run, tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> float:
        raise StorageError("the disk is full", path=tmp_path)

    monkeypatch.setattr(measurements, "scratch_bandwidths", full)
    result = run("doctor", "--quick", "--path", tmp_path, "--ram-budget", "8GB")
    assert result.exit_code == 0, result.stderr
    assert "not measured: the disk is full" in result.stdout
    assert result.stdout.startswith("Use ")


def test_the_report_fits_80_columns():
    report = {
        "defaults": [],
        "recommendation": {"lines": ("Use 8B", "Least budget", "command"), "row": None, "least": None},
        "profile": PROFILE,
        "energy": {
            "processor": {"counters": [], "absent": f"/sys/{'long/' * 20}energy_uj is readable by root only [0]"},
            "gpu": {"counters": ["gpu-0", "gpu-1"], "absent": None},
        },
        "hardware": {
            "cpu_model": "Intel(R) Core(TM) i5-10210U CPU @ 1.60GHz",
            "physical_cores": 4,
            "logical_cores": 8,
            "cpu_capability": "AVX2",
            "ram_bytes": 8e9,
            "available_ram_bytes": 5.5e9,
            "storage_type": "nvme",
            "gpu": {"name": "NVIDIA GeForce GTX 1050 Mobile", "total_bytes": 2e9},
        },
        "measured": MEASURED,
        "compute_dtype": "float32",
        "kernels": "native, avx2",
        "ram_budget_bytes": 5.5e9,
        "models": [{"name": "8B", "least_ram_budget_bytes": {"1,024 tokens": 1e9, "16,384 tokens": 2e9}}],
        "estimates": [ROW, ROW | {"fits": False, "tokens_per_s": None, "page_s": None, "tokens": 0}],
    }
    screen = io.StringIO()
    doctor._show(report, Console(file=screen, width=80), verbose=True)
    lines = screen.getvalue().splitlines()
    free = ("Rule:", "  ±")  # wrapped by the terminal
    assert max(len(line.rstrip()) for line in lines if not line.startswith(free)) <= 80
    assert "bf16 runs at 0.0086 times the speed of fp32" in screen.getvalue()
    assert "27.0 ±25 %" in screen.getvalue()
    text = " ".join(screen.getvalue().split())
    assert "SSD 10.1 GB" in text and "needs 1.5 GB" in text and "262,144 (178)" in text
    assert "is readable by root only [0]" in text
    assert "measured by gpu-0, gpu-1" in text
    assert "ram_budget = 4.8 GB, enable_tiering = on" in text
    assert "not server memory from 24 GB (8 GB)" in text
    assert "not ram-8gb-gpu also matches, but has a lower priority" in text


def test_why_a_profile_was_chosen_is_verbose(run, tmp_path):
    plain = run("doctor", "--quick", "--path", tmp_path).stdout
    assert "Hardware profile" in plain and "not reference" not in plain


def test_the_profile_is_told_with_its_reasons(run, tmp_path, monkeypatch):
    result = run("doctor", "--quick", "--path", tmp_path, "--verbose")
    report = json.loads(run("doctor", "--quick", "--json", "--path", tmp_path).stdout)["profile"]
    chosen = report["chosen"]
    assert chosen["fits"]
    assert all(condition["met"] for condition in chosen["conditions"])
    assert chosen["settings"]["ram_budget"] > 0
    assert {other["name"] for other in chosen["considered"]} | {chosen["name"]} >= {"ram-8gb", "server"}
    assert all(not other["fits"] for other in chosen["considered"])
    for words in (chosen["name"], chosen["why"][:20], "matches", "ram_budget = ", "--profile auto", "not reference"):
        assert words in result.stdout


def test_a_profile_that_does_not_fit_is_told_by_name(run, tmp_path):
    (tmp_path / "mine.toml").write_text(
        'why = "a test"\n[match]\nram_below = "1MB"\n[memory_config]\nl2_cache_size = "7MB"\nprivate = true\n'
    )
    result = run("doctor", "--quick", "--path", tmp_path, "--profile", tmp_path / "mine.toml", "-v")
    text = " ".join(result.stdout.split())
    assert "mine a test" in text
    assert "memory below 1 MB" in text
    assert "used because you requested it" in text
    assert "sets l2_cache_size = 7 MB, private = on" in text


def test_a_wrong_profile_does_not_hide_the_rest(run, tmp_path, cache_dir):
    directory = cache_dir / "config/qwen3vl-mem/profiles"
    directory.mkdir(parents=True)
    try:
        (directory / "mine.toml").write_text("why\n")
        result = run("doctor", "--quick", "--path", tmp_path)
    finally:
        (directory / "mine.toml").unlink()
    assert result.exit_code == 0, result.stderr
    # A path breaks where the line ends.
    assert "mine.toml,line1:notTOML" in "".join(result.stdout.split())
    assert "Matrix products" in result.stdout


def test_what_is_not_counted_is_told_with_the_reason(run, tmp_path):
    energy = json.loads(run("doctor", "--quick", "--json", "--path", tmp_path).stdout)["energy"]
    assert energy.keys() == {"processor", "gpu"}
    for part in energy.values():
        assert bool(part["counters"]) != bool(part["absent"])


@pytest.mark.parametrize("size", ["0", "4 gold"])
def test_a_budget_that_is_none_is_refused(run, size):
    assert run("doctor", "--ram-budget", size).exit_code == 2
