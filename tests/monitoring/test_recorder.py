"""The recorder notes what happens to a real optimizer, and ends with it."""

import gc
import json
import threading
import time

import pytest
import torch

import qwen3_vl_memory_optimizations as q
from qwen3_vl_memory_optimizations import ConfigurationError, MemoryOptimizer
from qwen3_vl_memory_optimizations.monitoring import AlertLimits, AlertMonitor, Recorder
from qwen3_vl_memory_optimizations.monitoring.recording.recorder import PhaseTimes
from qwen3_vl_memory_optimizations.monitoring.recording.run_file import RunFile, RunWriter
from qwen3_vl_memory_optimizations.monitoring.run_export import state_of
from tests.model.tiny import DIRECTORY, cases

MIB = 2**20
NEVER_S = 1000.0


def wait_until(condition, timeout_s=20.0):
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.01)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "memory-recorder" and thread.is_alive()]


def test_a_sample_has_the_snapshot_and_where_each_page_is(make_optimizer, tmp_path):
    optimizer = make_optimizer(8 * MIB)
    kept = [optimizer.allocate_tensor((4 * MIB,), torch.uint8, "kv_cache") for _ in range(3)]
    with Recorder(optimizer, path=tmp_path / "run.jsonl", period_s=NEVER_S, about={"command": "test"}) as recorder:
        snapshot, pages = recorder.state.snapshot, recorder.state.memory_map
        assert snapshot["kinds"]["kv_cache"]["tensors"] == 3 == len(kept)
        assert [list(pages.states().values()).count(state) for state in ("r", "s")] == [2, 1]
        kept.pop()
        recorder.look()
        assert len(recorder.state.memory_map.tensors) == 2
        assert recorder.state.snapshot["kinds"]["kv_cache"]["tensors"] == 2
    read = RunFile(tmp_path / "run.jsonl")
    assert read.header["command"] == "test" and read.header["settings"]["tensor_budget"] == 8 * MIB
    assert read.state.snapshot == recorder.state.snapshot
    assert read.state.memory_map == recorder.state.memory_map
    assert read.state.ended


def test_what_did_not_change_is_not_written_again(make_optimizer):
    with Recorder(make_optimizer(8 * MIB), period_s=NEVER_S) as recorder:
        first, second = recorder.history.after(0)[0][1], None
        recorder.look()
        second = recorder.history.after(1)[0][1]
    assert "pools" in json.loads(first)["set"] and "pools" not in json.loads(second)["set"]
    assert "time_s" in json.loads(second)["set"] and len(second) < len(first) / 2


def test_it_samples_by_itself_and_ends_with_close(make_optimizer):
    recorder = Recorder(make_optimizer(8 * MIB), period_s=0.01)
    wait_until(lambda: recorder.history.last >= 5)
    recorder.close()
    recorder.close()
    last = recorder.history.last
    assert not recorder.running and not threads()
    recorder.note("note", "too late")
    assert recorder.history.last == last
    assert [event["event"] for event in recorder.state.events] == ["end"]


def test_it_ends_when_the_optimizer_is_closed(make_optimizer, tmp_path):
    optimizer = make_optimizer(8 * MIB)
    recorder = Recorder(optimizer, path=tmp_path / "run.jsonl", period_s=0.01)
    optimizer.close()
    wait_until(lambda: not recorder.running and not threads())
    assert not RunFile(tmp_path / "run.jsonl").running
    recorder.close()


def test_it_does_not_keep_an_optimizer_alive(tmp_path):
    optimizer = MemoryOptimizer(memory_config={"cache_dir": tmp_path})
    recorder = Recorder(optimizer, period_s=0.01)
    wait_until(lambda: recorder.history.last >= 5)
    del optimizer
    gc.collect()
    wait_until(lambda: not recorder.running and not threads())


def test_answers_phases_and_alerts_are_noted(tmp_path):
    settings = {"cache_dir": tmp_path, "tensor_budget": "1.6MB", "codec": "int8"}
    model = q.create_optimized_model(DIRECTORY, settings)
    monitor = AlertMonitor(AlertLimits(response_s=1e-6, hold_s=0.0))
    with model.memory_optimizer as optimizer, Recorder(optimizer, period_s=NEVER_S, monitor=monitor) as recorder:
        assert len(optimizer.lifecycle._listeners) == 1
        model.generate(**cases()["image"], do_sample=False, max_new_tokens=8)
        recorder.look()
        phases = recorder.state.snapshot["phases"]
        assert phases["now"] == "idle"
        assert all(phases["seconds"][name] > 0 for name in ("vision", "prefill", "decode"))
        responses = recorder.state.snapshot["responses"]
        computed_s = sum(phases["seconds"][name] for name in ("vision", "prefill", "decode"))
        assert computed_s == pytest.approx(responses["seconds"], rel=0.5)
        events = {event["event"]: event["text"] for event in recorder.state.events}
        assert events["response"].startswith(f"{responses['tokens']} tokens in ")
        assert events["alert"].startswith("response_time fires")
        assert [row["name"] for row in recorder.state.snapshot["alerts"] if row["active"]] == ["response_time"]
    assert optimizer.lifecycle._listeners == ()


def test_swaps_are_noted(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    with Recorder(optimizer, period_s=NEVER_S) as recorder:
        kept = [optimizer.allocate_tensor((4 * MIB,), torch.uint8) for _ in range(3)]
        recorder.look()
    assert [event["text"] for event in recorder.state.events if event["event"] == "swap"] == [
        f"pages swapped out: {len(kept) - 2}, swapped in: 0"
    ]


def test_times_of_phases_add_up():
    now = [0.0]
    times = PhaseTimes("idle", lambda: now[0])
    for until_s, phase in ((1.0, "vision"), (3.0, "prefill"), (3.5, "decode"), (10.0, "idle")):
        now[0] = until_s
        times.begin(phase)
    now[0] = 12.0
    assert times.as_dict() == {"now": "idle", "seconds": {"vision": 2.0, "prefill": 0.5, "decode": 6.5, "idle": 3.0}}


def test_a_full_disk_ends_the_file_and_not_the_recording(make_optimizer, tmp_path, monkeypatch, caplog):
    recorder = Recorder(make_optimizer(8 * MIB), path=tmp_path / "run.jsonl", period_s=NEVER_S)
    real = RunWriter._write

    def full(self, record):
        monkeypatch.setattr("os.write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        try:
            real(self, record)
        finally:
            monkeypatch.undo()

    monkeypatch.setattr(RunWriter, "_write", full)
    before = recorder.history.last
    recorder.look()
    assert recorder.path is None and "No space left on device" in caplog.text
    assert recorder.history.last > before and recorder.running
    recorder.close()
    assert RunFile(tmp_path / "run.jsonl").state.snapshot, "what was written before stays"


def test_a_period_of_nothing_is_refused(make_optimizer):
    with pytest.raises(ConfigurationError, match="period_s: 0"):
        Recorder(make_optimizer(8 * MIB), period_s=0)
    assert not threads()


def test_all_samples_come_back_from_the_history(make_optimizer):
    with Recorder(make_optimizer(8 * MIB), period_s=NEVER_S) as recorder:
        for _ in range(3):
            recorder.look()
    state = state_of(line for _, line in recorder.history.after(0))
    assert len(state.samples) == 5
    assert state.samples[-1][1] == recorder.state.snapshot


def test_a_failure_ends_the_recording_and_says_so(make_optimizer, tmp_path, monkeypatch, caplog):
    optimizer = make_optimizer(8 * MIB)
    recorder = Recorder(optimizer, path=tmp_path / "run.jsonl", period_s=0.01)
    monkeypatch.setattr(optimizer.pager, "page_map", lambda: 1 / 0)
    wait_until(lambda: not recorder.running and not threads())
    assert "division by zero" in RunFile(tmp_path / "run.jsonl").state.events[-1]["text"]
    assert "recording failed and stops" in caplog.text and optimizer.lifecycle._listeners == ()
    monkeypatch.undo()
    recorder.close()
