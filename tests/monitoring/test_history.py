"""A history is bounded, keeps the whole run, and ends in the same state."""

import json

from qwen3_vl_memory_optimizations.monitoring.recording.history import History, to_line
from qwen3_vl_memory_optimizations.monitoring.recording.run_state import RunState, merge_samples


def sample(t):
    changed = {"count": t} if t % 3 else {"count": t, "rare": f"at {t}"}
    return {"t": float(t), "set": changed, "map": f"{t + 1}r"}


def replayed(lines):
    state = RunState(keep_samples=True)
    for _, line in lines:
        state.apply(json.loads(line))
    return state


def test_old_samples_become_coarser_and_none_of_the_run_is_lost():
    history, plain = History(limit=64), RunState()
    for t in range(1000):
        history.append(sample(t))
        plain.apply(sample(t))
    lines = history.after(0)
    assert 21 <= len(lines) <= 64
    state = replayed(lines)
    assert (state.t, state.snapshot, state.memory_map) == (plain.t, plain.snapshot, plain.memory_map)
    times = [t for t, _ in state.samples]
    assert times == sorted(times) and times[0] == 0.0
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert max(gaps) <= 200 and gaps[-20:] == [1.0] * 20
    # Each sample that stayed is what was true at its time.
    for t, snapshot in state.samples:
        assert snapshot == {"count": t, "rare": f"at {int(t) // 3 * 3}"}


def test_events_are_bounded_too():
    history = History(limit=64)
    for t in range(1000):
        history.append({"t": float(t), "event": "note", "text": str(t)})
    lines = history.after(0)
    assert len(lines) <= 64
    assert json.loads(lines[-1][1])["text"] == "999"


def test_what_is_routine_does_not_crowd_out_an_alert():
    history, state = History(limit=64), RunState()
    for t in range(5000):
        record = {"t": float(t), "event": "alert" if t == 7 else "response", "text": str(t)}
        history.append(record)
        state.apply(record)
    assert [record["text"] for record in state.events if record["event"] == "alert"] == ["7"]
    assert [event["text"] for event in replayed(history.after(0)).events][:1] == ["7"]
    assert [event["t"] for event in state.events] == sorted(event["t"] for event in state.events)


def test_only_what_is_new_is_given():
    history = History()
    assert history.after(0) == [] and history.last == 0
    for t in range(3):
        history.append(sample(t))
    assert [number for number, _ in history.after(1)] == [2, 3]
    assert history.after(3) == []


def test_merged_samples_have_the_effect_of_both():
    first, second = {"t": 1.0, "set": {"a": 1, "b": 1}, "map": "1r"}, {"t": 2.0, "set": {"b": 2}}
    assert merge_samples(first, second) == {"t": 2.0, "set": {"a": 1, "b": 2}, "map": "1r"}


def test_a_number_that_json_does_not_know_is_null():
    record = {"t": 1.0, "set": {"a": [float("nan"), 1.5], "b": {"c": float("inf")}}}
    assert json.loads(to_line(record)) == {"t": 1.0, "set": {"a": [None, 1.5], "b": {"c": None}}}
