import json
import shutil
import sys

import pytest

from qwen3_vl_memory_optimizations.cli.demo import command as demo
from qwen3_vl_memory_optimizations.errors import MemoryOptimizationError


@pytest.fixture(scope="module")
def plain():
    return demo._ask_plain_transformers()


def test_the_answers_come_out_of_a_third_of_the_weights(run, plain, monkeypatch):
    monkeypatch.setattr(demo, "_ask_plain_transformers", lambda: dict(plain))
    result = run("demo", "--quick", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) == {"questions", "plain", "managed", "large_model"}
    assert report["large_model"] is None
    managed = report["managed"]
    assert managed["resident_weight_bytes"] <= managed["tensor_budget_bytes"] < managed["stored_weight_bytes"] / 2
    assert managed["bytes_read"] > 0
    assert report["plain"]["weight_bytes"] > 10_000_000
    assert report["plain"]["peak_rss_bytes"] > 200_000_000
    rows = report["questions"]
    assert sum(row["answer"] == row["plain_answer"] for row in rows) >= len(rows) - 1
    assert sum(row["correct"] for row in rows) >= len(rows) - 3


def test_the_tables_fit_80_columns(run, plain, monkeypatch):
    monkeypatch.setattr(demo, "_ask_plain_transformers", lambda: dict(plain))
    result = run("demo", "--quick", "--tensor-budget", "2MB", "--codec", "none")
    assert result.exit_code == 0, result.stderr
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 80
    assert "what clothing item is this?" in result.stdout
    assert "14 of 14 answers are those of plain transformers" in result.stdout
    assert "B of 10.8 MB (none); plain transformers: 10.8 MB" in result.stdout


def test_a_failure_of_the_other_process_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(MemoryOptimizationError, match="plain transformers failed .exit code 1.: it wrote nothing"):
        demo._ask_plain_transformers()
