import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen3_vl_memory_optimizations import process
from qwen3_vl_memory_optimizations.cli.common.model_shapes import ModelShape
from qwen3_vl_memory_optimizations.cli.common.output import console
from qwen3_vl_memory_optimizations.cli.common.random_checkpoint import weight_bytes
from qwen3_vl_memory_optimizations.cli.demo import command as demo
from qwen3_vl_memory_optimizations.cli.demo import large_model
from qwen3_vl_memory_optimizations.errors import InsufficientDiskSpaceError, MemoryOptimizationError, StorageError
from qwen3_vl_memory_optimizations.storage import direct_io, read_header

SHAPE = ModelShape(
    name="test",
    layers=4,
    hidden=256,
    mlp=512,
    heads=8,
    tied=True,
    vision_blocks=4,
    vision_hidden=128,
    vision_mlp=256,
    deepstack=(0, 1, 2),
)
BUDGET = 800_000_000


def compare(directory):
    image = demo._QUESTIONS.parent / demo._LARGE_MODEL_IMAGE
    return large_model.compare(SHAPE, directory, BUDGET, tokenizer_of=demo._MODEL, image=image, quiet=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    found = compare(directory)
    assert list(directory.iterdir()) == []
    return found


def test_both_processes_answer_alike_and_are_measured(report):
    plain, managed = report["plain"], report["managed"]
    assert len(plain["token_ids"]) == 8
    if plain["compute_dtype"] == managed["compute_dtype"]:
        assert plain["token_ids"][:2] == managed["token_ids"][:2]
    assert 200_000_000 < managed["peak_rss_bytes"] <= report["ram_budget_bytes"] == BUDGET
    assert plain["peak_rss_bytes"] > report["weight_bytes"]
    assert plain["tokens_per_s"] > 0 and managed["tokens_per_s"] > 0


def test_the_checkpoint_has_the_size_of_its_shape_and_no_two_rows_alike(tmp_path):
    from safetensors.torch import load_file

    large_model.write_model(SHAPE, tmp_path, tokenizer_of=demo._MODEL)
    path = tmp_path / "model.safetensors"
    n_bytes = sum(extent.n_bytes for extent in read_header(path).tensors.values())
    assert n_bytes == weight_bytes(SHAPE)
    embedding = load_file(path)["model.language_model.embed_tokens.weight"]
    assert len(embedding.unique(dim=0)) == len(embedding)
    assert embedding.float().std() == pytest.approx(0.02, rel=0.02)


def test_the_table_of_both_comes_last(run, report, monkeypatch):
    monkeypatch.setattr(demo, "_ask_plain_transformers", lambda: {"answers": [""] * 14, "weight_bytes": 1})
    monkeypatch.setattr(large_model, "compare", lambda *arguments, **options: report)
    result = run("demo")
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert max(map(len, map(str.rstrip, result.stdout.splitlines()))) <= 80
    assert [line[:3] for line in lines[-3:]] == [
        ["peak", "memory", "of"],
        ["tokens", "per", "second"],
        ["time", "to", "first"],
    ]
    assert "of 8 tokens are those of plain transformers" in result.stdout
    as_json = run("demo", "--json")
    assert json.loads(as_json.stdout)["large_model"] == report


def test_plain_transformers_does_not_run_without_memory(report, monkeypatch, capsys):
    monkeypatch.setattr(process, "usable_memory", lambda: (4 * 10**8, 10**8))
    plain = large_model._ask_plain(SHAPE, ())
    assert plain["not_run"] == "100 MB of memory are available"
    assert plain["needed_bytes"] > report["weight_bytes"]
    large_model.show(report | {"plain": plain}, console())
    shown = capsys.readouterr().out
    assert "Plain transformers did not run: 100 MB of memory are available." in shown
    assert "needs about" in shown


def test_a_killed_process_is_told(report, monkeypatch):
    def fail(*arguments, label):
        raise MemoryOptimizationError(f"{label} failed (exit code -9): it wrote nothing")

    monkeypatch.setattr(large_model, "_ask", fail)
    assert "exit code -9" in large_model._ask_plain(SHAPE, ())["not_run"]


def test_too_little_disk_is_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(direct_io, "free_disk_bytes", lambda path: 10**9)
    with pytest.raises(InsufficientDiskSpaceError, match="3.15 GB .* must be written, 1 GB .* --quick"):
        shape = dataclasses.replace(large_model.SHAPE, layers=large_model.LAYERS)
        large_model.check_disk(shape, tmp_path / "none")
    result = run("demo", "--cache-dir", tmp_path / "none")
    assert result.exit_code == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_a_directory_in_memory_is_refused():
    with pytest.raises(StorageError, match="is a tmpfs, whose files take memory; .*--cache-dir"):
        large_model.check_disk(SHAPE, Path("/dev/shm"))


def test_what_killed_demonstrations_left_is_removed(tmp_path):
    with large_model._scratch_directory(tmp_path) as running:
        abandoned = tmp_path / "demo-checkpoint-x"
        abandoned.mkdir()
        (abandoned / "model.safetensors").write_bytes(b"x")
        large_model.check_disk(SHAPE, tmp_path)
        assert list(tmp_path.iterdir()) == [running]
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import sys
from pathlib import Path
from tests.cli.test_demo_large_model import compare
compare(Path(sys.argv[1]))
"""


def test_an_interrupt_leaves_neither_files_nor_processes(tmp_path):
    running = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (child := _children(running.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(tmp_path.iterdir())) == 1
    running.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in running.communicate(timeout=60)[1]
    assert list(tmp_path.iterdir()) == []
    assert child and not Path("/proc", child[0]).exists()


def _children(pid):
    with contextlib.suppress(FileNotFoundError):
        return Path("/proc", str(pid), "task", str(pid), "children").read_text().split()
    return []
