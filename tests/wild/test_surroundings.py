"""Machines and shells as they are: no home directory, closed outputs, odd arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from qwen3_vl_memory_optimizations.config import MemoryConfig
from qwen3_vl_memory_optimizations.errors import ConfigurationError

PROGRAM = [sys.executable, "-m", "qwen3_vl_memory_optimizations"]


def run(*arguments, **options):
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=120, **options)


def test_a_user_without_a_home_directory_is_told_what_to_set(monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("QWEN3VL_MEM_CACHE", raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", lambda self: none())
    with pytest.raises(ConfigurationError, match="no home directory; set QWEN3VL_MEM_CACHE"):
        _ = MemoryConfig().base_dir


def test_the_home_directory_may_be_named_short(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QWEN3VL_MEM_CACHE", "~/x")
    assert MemoryConfig().base_dir == tmp_path / "x"


def test_an_empty_directory_is_refused():
    with pytest.raises(ConfigurationError, match="cache_dir: is empty"):
        MemoryConfig(cache_dir="")


@pytest.mark.parametrize("arguments", [["nonsense", "--json"], ["generate", "--json"], ["pack", "x", "--no", "--json"]])
def test_a_wrong_command_is_json_where_that_was_asked(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["type"] == "UsageError"
    assert "Traceback" not in done.stderr


def test_text_that_is_not_utf8_is_an_error_of_ours(tmp_path):
    from ..model import tiny

    done = subprocess.run(
        [*PROGRAM, "generate", str(tiny.DIRECTORY), "-p", b"\xff\xfe", "--cache-dir", str(tmp_path)],
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 2 and b"not valid text" in done.stderr and b"Traceback" not in done.stderr


def test_a_closed_output_is_no_traceback():
    done = subprocess.run(
        " ".join([*PROGRAM, "--version", ">&-"]), shell=True, capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_the_program_is_imported(tmp_path):
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    done = run("--version", env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_a_budget_above_that_of_the_group_is_lowered_to_it(monkeypatch, caplog):
    from qwen3_vl_memory_optimizations import profiles
    from qwen3_vl_memory_optimizations.process import GroupMemory

    group = GroupMemory(limit_bytes=2_000_000_000, used_bytes=0, cached_bytes=0, droppable_bytes=0)
    monkeypatch.setattr(profiles.choice, "limiting_groups", lambda: iter([group]))
    assert profiles.configure({"ram_budget": "4GB"}).ram_budget == 2_000_000_000
    assert "exceeds the control group limit of 2 GB for this process" in caplog.text
    caplog.clear()
    assert profiles.configure({"ram_budget": 2_000_000_001}).ram_budget == 2_000_000_000
    assert not caplog.text, "the kernel rounds limits down to pages"
    assert profiles.configure({"ram_budget": "1GB"}).ram_budget == 1_000_000_000
    assert profiles.configure({}).ram_budget is None
