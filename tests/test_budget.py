"""The budget, proven from outside: control groups without swap whose limit is the budget."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.control_group import control_group, run_in_group, unavailable_reason
from benchmarks.make_checkpoint import make_checkpoint

from .model import tiny

ROOT = Path(__file__).resolve().parents[1]
MEASURE = ROOT / "benchmarks" / "budget" / "measure.py"

needs_control_group = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory):
    """The matrices of the 2B shape, fewer layers: 1.3 GB in bf16, 0.65 GB in INT8."""
    directory = tmp_path_factory.mktemp("checkpoint") / "2B-4layers"
    make_checkpoint("2B", directory, layers=4, vision_layers=4)
    return directory


@needs_control_group
@pytest.mark.parametrize("codec", ["int8", "none"])
def test_a_wide_model_answers_about_an_image_in_less_than_its_own_size(wide_checkpoint, tmp_path, codec):
    limit = 800_000_000  # interpreter, torch and transformers take half of it
    options = ["--codec", codec, "--cache-dir", str(tmp_path), "--tokens", "8"]
    with control_group(limit) as group:
        done = run_in_group(
            [sys.executable, str(MEASURE), str(wide_checkpoint), "--ram-budget", str(limit), *options], group
        )
        peak, kills = group.peak_bytes(), group.kills()
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert kills == 0
    assert peak <= limit
    assert figures["rss_peak_bytes"] <= limit
    assert figures["encoded_bytes"] > figures["frames_limit_bytes"] > figures["resident_bytes"] > 0
    # What is read a token is what has no place in memory, and little more.
    missing = figures["decode_weight_bytes"] - figures["resident_bytes"]
    assert figures["bytes_read_per_token"] <= 1.1 * max(missing, 0) + 24 * 2**20
    assert figures["prefetch_accuracy"] > 0.9


@needs_control_group
def test_a_long_prompt_stays_in_the_budget(wide_checkpoint, tmp_path):
    limit = 1_000_000_000
    options = ["--cache-dir", str(tmp_path), "--image-px", "0", "--prompt-tokens", "1024", "--tokens", "8"]
    with control_group(limit) as group:
        done = run_in_group(
            [sys.executable, str(MEASURE), str(wide_checkpoint), "--ram-budget", str(limit), *options], group
        )
        peak, kills = group.peak_bytes(), group.kills()
    assert done.returncode == 0, done.stderr[-3000:]
    assert (kills, peak <= limit) == (0, True)
    assert json.loads(done.stdout.splitlines()[-1])["rss_peak_bytes"] <= limit


BESIDE_A_NEIGHBOUR = """
import json, sys, time, torch
from qwen3_vl_memory_optimizations import create_optimized_model
model = create_optimized_model(sys.argv[1], {"codec": "none", "ram_budget": int(sys.argv[3]), "cache_dir": sys.argv[2]})
ids = torch.arange(1000, 1032)[None]
def answer():
    with torch.no_grad():
        return model.generate(input_ids=ids, max_new_tokens=12, min_new_tokens=12, do_sample=False).tolist()
before = answer()
print("ready", flush=True)
sys.stdin.readline()
beside = answer()
budget = model.memory_optimizer.get_memory_efficiency_stats()["budget"]
print(json.dumps({"same": before == beside, "budget": budget}), flush=True)
sys.stdin.readline()
deadline = time.monotonic() + 20
while model.memory_optimizer.pager.ledger.held_bytes("pressure") and time.monotonic() < deadline:
    time.sleep(0.1)
print(json.dumps({"pressure": model.memory_optimizer.pager.ledger.held_bytes("pressure"), "same": answer() == before}))
"""
NEIGHBOUR = """
import sys, time
taken = []
for _ in range(int(sys.argv[1]) >> 24):
    taken.append(bytearray(b"x" * (1 << 24)))
    time.sleep(0.05)
print("taken", flush=True)
sys.stdin.readline()
"""


@needs_control_group
def test_a_neighbour_that_takes_memory_kills_nobody_and_changes_nothing(wide_checkpoint, tmp_path):
    limit = 1_400_000_000
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    child = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}
    with control_group(limit) as group, contextlib.ExitStack() as ends:

        def start(code, *arguments):
            command = [sys.executable, "-c", code, *map(str, arguments)]
            process = subprocess.Popen(command, env=child, preexec_fn=group.enter, **pipes)
            ends.enter_context(process)
            ends.callback(process.kill)
            return process

        def go_on(process):
            process.stdin.write("\n")
            process.stdin.flush()

        model = start(BESIDE_A_NEIGHBOUR, wide_checkpoint, tmp_path, limit)
        assert model.stdout.readline() == "ready\n"
        neighbour = start(NEIGHBOUR, limit * 2 // 5)
        go_on(model)
        beside = json.loads(model.stdout.readline())
        assert neighbour.stdout.readline() == "taken\n"
        neighbour.communicate("\n")
        after = json.loads(model.communicate("\n")[0])
        assert (model.returncode, neighbour.returncode, group.kills()) == (0, 0, 0)
    assert beside["same"] and after["same"]
    assert beside["budget"]["frames_limit_bytes"] < 0.6 * beside["budget"]["frames_peak_bytes"]
    assert after["pressure"] == 0


TINY = """
import json, sys, torch
from qwen3_vl_memory_optimizations import create_optimized_model
from tests.model import tiny
model = create_optimized_model(tiny.DIRECTORY, json.loads(sys.argv[1]))
with torch.no_grad():
    for _ in range(3):
        found = model.generate(**tiny.cases()["image"], max_new_tokens=17, min_new_tokens=17, do_sample=False)
stats = model.memory_optimizer.get_memory_efficiency_stats()
print(json.dumps({"ids": found.tolist(), "stats": stats}))
"""


@needs_control_group
def test_the_tiny_model_in_a_third_of_its_weights(tmp_path):
    limit = 600_000_000
    settings = {"codec": "none", "tensor_budget": 3_600_000, "ram_budget": limit, "cache_dir": str(tmp_path)}
    with control_group(limit) as group:
        done = run_in_group(
            [sys.executable, "-c", TINY, json.dumps(settings)], group, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        kills = group.kills()
    assert done.returncode == 0, done.stderr[-3000:]
    assert kills == 0
    result = json.loads(done.stdout.splitlines()[-1])
    expected = tiny.reference().generate(**tiny.cases()["image"], max_new_tokens=17, min_new_tokens=17, do_sample=False)
    assert result["ids"] == expected.tolist()
    budget, paging = result["stats"]["budget"], result["stats"]["paging"]
    assert budget["frames_peak_bytes"] <= 3_600_000
    assert paging["bytes_read"] > 10_800_000  # the SSD tier really worked
    assert paging["evictions"] > 0


def test_a_process_killed_while_generating_leaves_nothing_behind(tmp_path):
    # What is kept of pictures outlives a process on purpose, whole entries only (tests/storage/test_content_store.py).
    settings = {"codec": "none", "tensor_budget": 3_600_000, "cache_dir": str(tmp_path), "private": True}
    endless = TINY.replace("range(3)", "range(10**6)").replace("with torch", "print('ready', flush=True)\nwith torch")
    process = subprocess.Popen(
        [sys.executable, "-c", endless, json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # Which files importing transformers reads is kept on purpose.
    assert [p for p in tmp_path.rglob("*") if p.is_file() and not p.name.startswith("imports-")] == []
