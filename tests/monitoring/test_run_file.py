"""Runs on the disk: readable while and after they are written, whatever happened to the process."""

import json
import os
import subprocess
import sys

import pytest

from qwen3_vl_memory_optimizations import ConfigurationError, StorageError
from qwen3_vl_memory_optimizations.monitoring.recording import run_file
from qwen3_vl_memory_optimizations.monitoring.recording.run_file import (
    KEPT_RUNS,
    RunFile,
    RunWriter,
    find_run,
    is_running,
    new_run_path,
    recorded_runs,
)
from qwen3_vl_memory_optimizations.monitoring.recording.run_state import FORMAT, VERSION

HEADER = {"format": FORMAT, "version": VERSION, "started_s": 1.0, "pid": 1, "period_s": 0.5}


def sample(t):
    return {"t": float(t), "set": {"count": t}}


def test_a_run_can_be_followed_while_it_is_written_and_nobody_else_may_read_it(tmp_path):
    path = tmp_path / "run.jsonl"
    writer = RunWriter(path, HEADER)
    writer.append(sample(0))
    run = RunFile(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert run.header == HEADER and run.state.snapshot == {"count": 0} and run.running
    writer.append(sample(1))
    run.poll()
    assert run.state.snapshot == {"count": 1} and run.state.t == 1.0
    writer.close()
    assert not run.running and not run.state.ended


def test_a_line_that_is_not_whole_waits_for_its_end(tmp_path):
    path = tmp_path / "run.jsonl"
    line = json.dumps(sample(1)).encode()
    path.write_bytes(json.dumps(HEADER).encode() + b"\n" + json.dumps(sample(0)).encode() + b"\n" + line[:9])
    run = RunFile(path)
    assert run.state.snapshot == {"count": 0}
    with path.open("ab") as file:
        file.write(line[9:] + b"\n")
    run.poll()
    assert run.state.snapshot == {"count": 1}


def test_a_process_that_was_killed_leaves_a_run_that_can_be_read(tmp_path):
    path = tmp_path / "run.jsonl"
    code = (
        "import os, signal, sys, pathlib\n"
        "from qwen3_vl_memory_optimizations.monitoring.recording.run_file import RunWriter\n"
        f"writer = RunWriter(pathlib.Path(sys.argv[1]), {HEADER!r})\n"
        "writer.append({'t': 0.0, 'set': {'count': 7}})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, env=os.environ)
    assert not is_running(path)
    run = RunFile(path)
    assert run.state.snapshot == {"count": 7} and not run.running and not run.state.ended


def test_a_long_run_grows_ever_more_slowly_and_loses_no_change(tmp_path, monkeypatch):
    monkeypatch.setattr(run_file, "_SAMPLES_A_STAGE", 10)
    writer = RunWriter(tmp_path / "run.jsonl", HEADER)
    for t in range(150):
        writer.append(sample(t) if t % 2 else {"t": float(t), "set": {"even": t}})
    writer.append({"t": 150.0, "event": "note", "text": "now"})
    writer.close()
    run = RunFile(tmp_path / "run.jsonl", keep_samples=True)
    assert len(run.state.samples) < 45
    assert run.state.snapshot == {"count": 149, "even": 148}
    assert [event["text"] for event in run.state.events] == ["now"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a recorded run"),
        (b'{"t": 1}\n', "not a recorded run"),
        (b"\x00\xff" * 100, "not a recorded run"),
        (json.dumps(HEADER | {"version": 99}).encode() + b"\n", "format 99; this version reads format 1"),
    ],
)
def test_what_is_no_run_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=words) as caught:
        RunFile(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("mine")
    with pytest.raises(StorageError, match="cannot be recorded: File exists"):
        RunWriter(path, HEADER)
    assert path.read_text() == "mine"


def test_the_newest_that_runs_is_meant_else_the_newest(tmp_path):
    with pytest.raises(ConfigurationError, match="no run is recorded in .*--no-record"):
        find_run(None, tmp_path / "runs")
    old, running, new = (tmp_path / f"{name}.jsonl" for name in ("old", "running", "new"))
    old.write_text("")
    writer = RunWriter(running, HEADER)
    new.write_text("")
    for age, path in enumerate((new, running, old)):
        os.utime(path, (1000 - age, 1000 - age))
    assert recorded_runs(tmp_path) == [new, running, old]
    assert find_run(None, tmp_path) == running
    writer.close()
    assert find_run(None, tmp_path) == new
    assert find_run(old, tmp_path) == old
    with pytest.raises(ConfigurationError, match="no such file"):
        find_run(tmp_path / "nowhere", tmp_path)


def test_old_runs_go_and_those_under_way_stay(tmp_path):
    directory = tmp_path / "runs"
    first = new_run_path(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    writer = RunWriter(first, HEADER)
    os.utime(first, (1, 1))
    for _ in range(KEPT_RUNS + 5):
        RunWriter(new_run_path(directory), HEADER).close()
    assert len(recorded_runs(directory)) <= KEPT_RUNS + 1
    assert first.exists() and is_running(first)
    writer.close()
