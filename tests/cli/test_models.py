"""`qwen3vl-mem models`: what is listed, and what is removed."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time

import pytest

from ..model.sources.hub_server import COMMIT

REPO = "owner/tiny-qwen3vl"


@pytest.fixture
def hub_cache(tiny, tmp_path, monkeypatch):
    """A hub cache with the small model, and one whose download was stopped."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    folder = cache / "models--owner--tiny-qwen3vl"
    snapshot = folder / "snapshots" / COMMIT
    for part in (folder / "blobs", folder / "refs", snapshot):
        part.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for path in tiny.iterdir():
        blob = folder / "blobs" / path.name.replace(".", "")
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    stopped = cache / "models--owner--stopped" / "blobs"
    stopped.mkdir(parents=True)
    (stopped / f"{'0' * 64}.incomplete").write_bytes(bytes(1 << 16))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def listed(run, tmp_path):
    def listed():
        rows = json.loads(run("models", "--cache-dir", tmp_path, "--json").stdout)["models"]
        return {row["name"]: row for row in rows}

    return listed


def test_nothing_is_said_to_be_there(run, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    found = run("models", "--cache-dir", tmp_path)
    assert (found.exit_code, "qwen3vl-mem pull" in found.stdout) == (0, True)


def test_checkpoints_and_packed_forms_are_listed(run, listed, hub_cache, tiny, tmp_path):
    before = listed()
    assert before[REPO]["complete"] and before[REPO]["used_at"] is None
    assert before[REPO]["n_bytes"] >= (tiny / "model.safetensors").stat().st_size
    assert not before["owner/stopped"]["complete"]
    now = time.time()
    assert run("pack", REPO, "--codec", "int8", "--cache-dir", tmp_path).exit_code == 0
    assert run("pack", tiny, "--codec", "int8_rotated", "--cache-dir", tmp_path).exit_code == 0
    rows = listed()
    packed = {row["codec"]: row for row in rows.values() if row["kind"] == "packed"}
    assert set(packed) == {"int8", "int8_rotated"}
    assert packed["int8"]["source"] == REPO and packed["int8_rotated"]["source"] == str(tiny)
    assert packed["int8"]["name"].startswith("tiny-qwen3vl-")
    assert rows[REPO]["used_at"] >= now and packed["int8"]["used_at"] >= now
    assert not rows[str(tiny)]["removable"]
    text = run("models", "ls", "--cache-dir", tmp_path).stdout
    assert "packed, int8" in text and "checkpoint, incomplete" in text


def test_a_use_is_recorded_when_a_model_is_loaded(run, listed, hub_cache, tmp_path):
    from qwen3_vl_memory_optimizations import create_optimized_model, load_processor

    settings = {"codec": "int8", "cache_dir": tmp_path}
    create_optimized_model(REPO, settings).memory_optimizer.close()
    (first,) = (row for row in listed().values() if row["kind"] == "packed")
    create_optimized_model(REPO, {**settings, "private": True}).memory_optimizer.close()
    assert listed()[first["name"]]["used_at"] == first["used_at"]
    create_optimized_model(REPO, settings).memory_optimizer.close()
    assert listed()[first["name"]]["used_at"] > first["used_at"]
    assert load_processor(REPO).tokens.image_id


def test_one_is_removed(run, listed, hub_cache, tiny, tmp_path):
    assert run("pack", REPO, "--codec", "int8", "--cache-dir", tmp_path).exit_code == 0
    gc.collect()  # packing in this process
    (packed,) = (name for name, row in listed().items() if row["kind"] == "packed")
    asked = run("models", "rm", packed, "--cache-dir", tmp_path)
    assert asked.exit_code == 1 and packed in listed()
    done = json.loads(run("models", "rm", packed, "--cache-dir", tmp_path, "--json").stdout)
    assert done["freed_bytes"] > 0
    assert list((tmp_path / "packed").iterdir()) == []
    for name in (REPO, "stopped"):
        assert run("models", "rm", name, "--yes", "--cache-dir", tmp_path).exit_code == 0
    assert listed() == {} and list(hub_cache.glob("models--*")) == []
    unknown = run("models", "rm", REPO, "--yes", "--cache-dir", tmp_path)
    assert unknown.exit_code == 2 and "no model with this name" in unknown.stderr


def test_a_directory_of_the_user_is_not_removed(run, hub_cache, tiny, tmp_path):
    assert run("pack", tiny, "--codec", "int8", "--cache-dir", tmp_path).exit_code == 0
    refused = run("models", "rm", tiny, "--yes", "--cache-dir", tmp_path)
    assert refused.exit_code == 2 and "remove this directory yourself" in refused.stderr
    assert (tiny / "model.safetensors").is_file()


_PROCESS = """
import sys
from qwen3_vl_memory_optimizations import create_optimized_model
model = create_optimized_model(sys.argv[1], {"codec": "int8", "cache_dir": sys.argv[2]})
print("loaded", flush=True)
sys.stdin.read()
model.memory_optimizer.close()
"""


def test_a_model_in_use_stays(run, listed, hub_cache, tiny, tmp_path):
    arguments = [sys.executable, "-c", _PROCESS, str(tiny), str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "loaded\n"
        (packed,) = (name for name, row in listed().items() if row["kind"] == "packed")
        refused = run("models", "rm", packed, "--yes", "--cache-dir", tmp_path)
        assert refused.exit_code == 2 and f"process {process.pid}" in refused.stderr
        process.stdin.close()
        process.wait(timeout=60)
    assert run("models", "rm", packed, "--yes", "--cache-dir", tmp_path).exit_code == 0
