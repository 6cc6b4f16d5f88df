import io
import json

import pytest
from rich.console import Console

from qwen3_vl_memory_optimizations.cli import doctor
from qwen3_vl_memory_optimizations.errors import StorageError


def test_json_describes_measures_and_estimates(run, tmp_path):
    result = run("doctor", "--quick", "--json", "--path", tmp_path, "--ram-budget", "4GB")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) == {
        "hardware",
        "measured",
        "compute_dtype",
        "ram_budget_bytes",
        "models",
        "estimates",
    }
    assert report["ram_budget_bytes"] == 4_000_000_000
    assert report["measured"]["ssd_bytes_per_s"] > 0
    assert report["measured"]["memory_bytes_per_s"] > 0
    assert set(report["measured"]["prompt_operations_per_s"]) == {"float32", "bfloat16", "int8"}
    assert report["compute_dtype"] in ("float32", "bfloat16")
    assert [(row["model"], row["codec"]) for row in report["estimates"]] == [
        (model, codec) for model in ("2B", "4B", "8B") for codec in ("none", "int8")
    ]
    assert list(tmp_path.iterdir()) == []


def test_without_room_on_the_disk_the_rest_is_still_told(run, tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> float:
        raise StorageError("the disk is full", path=tmp_path)

    monkeypatch.setattr("qwen3_vl_memory_optimizations.storage.probe.measure_scratch_bandwidth", full)
    result = run("doctor", "--quick", "--path", tmp_path, "--ram-budget", "2GB")
    assert result.exit_code == 0, result.stderr
    assert "not measured: the disk is full" in result.stdout
    assert "Qwen3-VL within 2 GB" in result.stdout
    assert "estimate from the measured bandwidths" in result.stdout


def test_the_report_fits_80_columns():
    report = {
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
        "measured": {
            "ssd_bytes_per_s": 2.1e9,
            "ssd_problem": None,
            "memory_bytes_per_s": 17.3e9,
            "ssd_directory": "/home/someone/.cache/qwen3vl-mem",
            "decode_operations_per_s": {"float32": 8.1e9, "bfloat16": 1.2e9, "int8": 16e9},
            "prompt_operations_per_s": {"float32": 151e9, "bfloat16": 1.3e9, "int8": 260e9},
        },
        "compute_dtype": "float32",
        "ram_budget_bytes": 5.5e9,
        "estimates": [
            {
                "model": "8B",
                "codec": "none",
                "decoder_bytes": 15.1e9,
                "resident_bytes": 5e9,
                "read_bytes_per_token": 10.1e9,
                "tokens_per_s": 0.208,
            }
        ],
    }
    screen = io.StringIO()
    doctor._show(report, Console(file=screen, width=80))
    assert max(len(line.rstrip()) for line in screen.getvalue().splitlines()) <= 80
    assert "bf16 runs at 0.0086 times the speed of fp32" in screen.getvalue()


@pytest.mark.parametrize("size", ["0", "4 gold"])
def test_a_budget_that_is_none_is_refused(run, size):
    assert run("doctor", "--ram-budget", size).exit_code == 2
