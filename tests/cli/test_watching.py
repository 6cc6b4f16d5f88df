"""Runs are recorded by the commands that run a model, and shown by those that watch."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console

from qwen3_vl_memory_optimizations.cli.top import frame
from qwen3_vl_memory_optimizations.monitoring.recording.run_file import RunFile, recorded_runs

PROGRAM = [sys.executable, "-c", "from qwen3_vl_memory_optimizations.cli import main; main()"]


@pytest.fixture
def question(tiny, demo_images):
    image = demo_images / "digits_0.png"
    return ["generate", tiny, "-i", image, "-p", "read the digits.", "--tensor-budget", "2MB", "--codec", "int8"]


@pytest.fixture
def runs(cache_dir):
    for path in recorded_runs(cache_dir / "runs"):
        path.unlink()
    return cache_dir / "runs"


@pytest.fixture
def recorded(run, question, runs):
    assert run(*question).exit_code == 0
    return recorded_runs(runs)[0]


def test_an_answer_leaves_its_record(recorded):
    run = RunFile(recorded)
    assert run.state.ended and not run.running
    assert (run.header["command"], run.header["model"]) == ("generate", "tiny-qwen3vl")
    assert run.header["settings"]["tensor_budget"] == 2_000_000
    assert run.state.snapshot["responses"]["tokens"] == 17
    assert "read the digits" not in recorded.read_text(), "no prompt and no answer is in it"


@pytest.mark.parametrize("option", ["--private", "--no-record"])
def test_it_leaves_none_where_that_is_not_wanted(run, question, runs, option):
    assert run(*question, option).exit_code == 0
    assert recorded_runs(runs) == []


def test_a_record_that_cannot_be_made_does_not_cost_the_answer(run, question, runs, cache_dir):
    runs.rmdir() if runs.exists() else None
    runs.write_text("in the way")
    try:
        result = run(*question)
    finally:
        runs.unlink()
    assert result.exit_code == 0 and result.stdout.strip()
    assert "this run is not recorded" in result.stderr


def test_top_prints_a_frame(run, recorded):
    result = run("top", "--once")
    assert result.exit_code == 0, result.stderr
    for words in ("generate · tiny-qwen3vl", "ended", "tokens/s", "2 MB for tensors", "weights", "int8", "absent"):
        assert words in result.stdout
    assert "no alerts" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_top_shows_the_phase_its_rate_and_its_time_left(recorded, monkeypatch):
    followed = RunFile(recorded)
    answer = {"phase": "answer", "done": 12, "total": 256, "unit": "tokens", "elapsed_s": 6.0}
    answer |= {"left_s": 122.0, "tokens_per_s": 2.0, "first_token_s": 31.4}
    followed.state.snapshot = {**followed.state.snapshot, "progress": answer}
    monkeypatch.setattr(RunFile, "running", True)
    screen = Console(width=80, file=io.StringIO())
    screen.print(frame(followed, None, 80))
    assert "answer  12 of 256 tokens, 2 tokens/s, at most 2 min 2 s left" in screen.file.getvalue()


def test_top_gives_the_newest_figures_as_json(run, recorded):
    answer = json.loads(run("top", recorded, "--json").stdout)
    assert answer["snapshot"] == RunFile(recorded).state.snapshot
    assert answer["header"]["command"] == "generate" and not answer["running"]
    weights = [row for row in answer["memory_map"] if row["kind"] == "weights"]
    assert len(weights) == answer["snapshot"]["kinds"]["weights"]["tensors"]


def test_report_writes_one_file(run, recorded, tmp_path):
    result = run("report", "-o", tmp_path / "out.html")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "out.html")
    assert "tiny-qwen3vl" in (tmp_path / "out.html").read_text()


def test_report_compares_two_runs(run, recorded, tmp_path):
    result = run("report", recorded, recorded, "-o", tmp_path / "out.html", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["other"] == str(recorded)
    assert "comparison of two runs" in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize("command", ["top", "report", "dashboard"])
def test_without_a_run_the_commands_say_what_to_do(run, runs, command):
    result = run(command)
    assert result.exit_code == 2
    assert re.fullmatch(r"error: no run is recorded in .*`qwen3vl-mem generate`.*\n", result.stderr)


@pytest.mark.parametrize("command", ["top", "report", "dashboard"])
def test_a_file_that_is_no_run_is_named(run, command, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    result = run(command, tmp_path / "notes.txt")
    assert result.exit_code == 2 and "notes.txt: not a recorded run" in result.stderr
    assert result.stderr.count("\n") == 1


def test_watching_a_recorded_run_needs_no_torch(recorded, cache_dir):
    code = (
        "import sys\nfrom qwen3_vl_memory_optimizations.cli import app\n"
        "app(['top', '--once'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'starlette', 'uvicorn'} & set(sys.modules)"
    )
    environment = os.environ | {"QWEN3VL_MEM_CACHE": str(cache_dir)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def wait_for_url(process):
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
            return found[0]
    raise AssertionError("no page was announced")


def wait_for_passes(url, timeout_s=60.0):
    """Return the state that the page shows once the model has made a pass."""
    end_s = time.monotonic() + timeout_s
    while True:
        with urllib.request.urlopen(url + "api/snapshot", timeout=20) as answer:
            state = json.load(answer)
        if state["snapshot"]["paging"]["passes"] > 0 and state["t"] > 0.4:
            return state
        assert time.monotonic() < end_s, "the model makes no pass"
        time.sleep(0.2)


def test_dashboard_serves_the_newest_run_until_ctrl_c(recorded, cache_dir):
    environment = os.environ | {"QWEN3VL_MEM_CACHE": str(cache_dir), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([*PROGRAM, "dashboard"], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        url = wait_for_url(process)
        with urllib.request.urlopen(url + "api/snapshot", timeout=20) as answer:
            assert json.load(answer)["snapshot"] == RunFile(recorded).state.snapshot
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


def interrupt(process):
    """Press Ctrl-C, again if nothing happens: Python drops one that falls into a finalizer. Return the exit status."""
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue
    return None


def test_the_page_of_an_answer_is_live_and_others_find_the_run(run, question, runs, cache_dir, tmp_path):
    environment = os.environ | {"QWEN3VL_MEM_CACHE": str(cache_dir)}
    # The same question until it is interrupted: an answer of the tiny model is over before one can look.
    code = (
        "import sys\nfrom transformers import GenerationMixin\n"
        "plain = GenerationMixin.generate\n"
        "def again(self, *args, streamer=None, **kwargs):\n"
        "    while True:\n        plain(self, *args, **kwargs)\n"
        "GenerationMixin.generate = again\n"
        "from qwen3_vl_memory_optimizations.cli import main\nmain()\n"
    )
    command = [sys.executable, "-c", code, *map(str, question), "--dashboard", "0"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        url = wait_for_url(process)
        first = wait_for_passes(url)
        followed = json.loads(run("top", "--json").stdout)
        assert followed["running"] and followed["header"]["pid"] == process.pid
        assert followed["t"] >= first["t"] > 0.4
        assert followed["snapshot"]["paging"]["passes"] >= first["snapshot"]["paging"]["passes"] > 0
        assert interrupt(process) == 130
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
    assert RunFile(recorded_runs(runs)[0]).state.ended


def test_a_page_that_cannot_be_served_is_said_before_the_model_is_loaded(run, question, monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette", None)
    begin_s = time.monotonic()
    result = run(*question, "--dashboard", "0")
    assert result.exit_code == 2 and "qwen3-vl-memory-optimizations[dashboard]" in result.stderr
    assert time.monotonic() - begin_s < 1.0


def test_paths_are_where_the_documentation_says(recorded, cache_dir):
    assert recorded.parent == Path(cache_dir) / "runs"
