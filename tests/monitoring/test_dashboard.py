"""The page is served on this machine alone, and what it is told is what was recorded."""

import csv
import io
import json
import socket
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch

from qwen3_vl_memory_optimizations import ConfigurationError
from qwen3_vl_memory_optimizations.monitoring import Dashboard, Recorder, start_dashboard
from qwen3_vl_memory_optimizations.monitoring.dashboard import serve_run

MIB = 2**20


@pytest.fixture
def optimizer(make_optimizer):
    return make_optimizer(8 * MIB)


@pytest.fixture
def page(optimizer):
    recorder = Recorder(optimizer, period_s=1000.0)
    with Dashboard(recorder, recorder=recorder) as dashboard:
        yield dashboard


def plain(value):
    return json.loads(json.dumps(value))


def events(url, until, headers=None):
    """Return the events of a stream, as (id, name, data), until one is what is waited for."""
    found, current = [], {"id": None, "event": "message"}
    with httpx.stream("GET", url + "api/events", timeout=20, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line:
                key, _, value = line.partition(": ")
                current[key] = value
            elif "data" in current:
                found.append((current["id"], current["event"], json.loads(current["data"])))
                current = {"id": None, "event": "message"}
                if until(found):
                    return found
    return found


def test_the_newest_snapshot_is_the_recorded_one(optimizer, page):
    kept = [optimizer.allocate_tensor((4 * MIB,), torch.uint8, "kv_cache") for _ in range(3)]
    page.source.look()
    answer = httpx.get(page.url + "api/snapshot").json()
    assert answer["snapshot"] == page.source.state.snapshot
    assert answer["snapshot"]["kinds"]["kv_cache"]["tensors"] == 3 == len(kept)
    assert sorted(row["states"] for row in answer["memory_map"]) == ["r", "r", "s"]
    assert {(row["kind"], row["codec"], row["n_bytes"]) for row in answer["memory_map"]} == {
        ("kv_cache", "none", 4 * MIB)
    }
    assert answer["running"] and answer["t"] == page.source.state.t


def test_the_stream_tells_all_records_and_goes_on_where_it_broke(page):
    page.source.look()
    first = events(page.url, lambda found: len(found) == 2)
    assert [name for _, name, _ in first] == ["header", "message"]
    assert first[0][2]["header"] == plain(page.source.header) and first[0][2]["charts"]
    records = first[1][2]
    assert [record["t"] for record in records] == [json.loads(line)["t"] for _, line in page.source.history.after(0)]
    threading.Timer(0.5, page.source.note, ("note", "later")).start()
    again = events(page.url, lambda found: len(found) == 2, headers={"Last-Event-ID": first[1][0]})
    assert [record["text"] for record in again[1][2]] == ["later"]
    other = events(page.url, lambda found: len(found) == 2, headers={"Last-Event-ID": "another-run:99"})
    assert len(other[1][2]) == 3, "of another run it knows nothing"


def test_the_end_of_a_run_is_told_to_those_who_watch(optimizer):
    dashboard = start_dashboard(optimizer)
    threading.Timer(0.5, dashboard.close).start()
    found = events(dashboard.url, lambda found: False)
    assert found[-1][1] == "end"
    assert found[-2][2][-1]["event"] == "end"


def test_an_open_stream_does_not_hold_up_the_end(page):
    with httpx.stream("GET", page.url + "api/events", timeout=20) as answer:
        next(answer.iter_lines())
        begin_s = time.monotonic()
        page.close()
        assert time.monotonic() - begin_s < 5
    page.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(page.url)
    assert not [thread for thread in threading.enumerate() if thread.name == "memory-dashboard" and thread.is_alive()]


def test_a_run_is_exported_whole(page):
    page.source.look()
    document = httpx.get(page.url + "api/run.json")
    assert "attachment" in document.headers["content-disposition"]
    document = document.json()
    assert document["header"] == plain(page.source.header)
    assert len(document["samples"]) == 2
    assert {key: document["samples"][-1][key] for key in page.source.state.snapshot} == page.source.state.snapshot
    table = list(csv.DictReader(io.StringIO(httpx.get(page.url + "api/run.csv").text)))
    assert len(table) == 2
    last = page.source.state.snapshot
    assert int(table[-1]["process.rss_bytes"]) == last["process"]["rss_bytes"]
    assert (
        float(table[-1]["pools.general.external_fragmentation"]) == last["pools"]["general"]["external_fragmentation"]
    )
    assert table[-1]["responses.tokens_per_s"] == "", "not measured is empty, and not 0"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
@pytest.mark.parametrize("path", ["", "api/snapshot", "api/events", "api/run.json", "static/main.js"])
def test_other_names_for_this_machine_are_refused(page, host, path):
    assert httpx.get(page.url + path, headers={"Host": host}).status_code == 400


def test_answers_are_for_this_page_alone(page):
    for path in ("", "api/snapshot", "static/main.js", "static/style.css"):
        answer = httpx.get(page.url + path, headers={"Host": "localhost", "Origin": "http://evil.example"})
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers
    assert httpx.get(page.url + "static/../server.py").status_code == 404
    assert httpx.get(page.url + "static/%2e%2e/server.py").status_code == 404
    assert httpx.post(page.url + "api/snapshot").status_code == 405


def test_it_listens_on_this_machine_alone(page):
    port = int(page.url.rpartition(":")[2].strip("/"))
    table = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert [local for local, _, state in table if state == "0A" and local.endswith(f":{port:04X}")] == [
        f"0100007F:{port:04X}"
    ]


def test_a_port_that_is_taken_is_said_and_nothing_is_left_running(optimizer):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigurationError, match="cannot use port .*: Address already in use"):
            start_dashboard(optimizer, other.getsockname()[1])
    assert optimizer.lifecycle._listeners == ()


def test_what_is_not_installed_is_named_with_the_remedy(optimizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigurationError, match=r"needs uvicorn: pip install '.*\[dashboard\]'"):
        start_dashboard(optimizer)


def test_a_model_or_an_optimizer_is_wanted():
    with pytest.raises(ConfigurationError, match="expected a MemoryOptimizer .* got dict"):
        start_dashboard({})


def test_a_recorded_run_is_served_and_one_under_way_followed(optimizer, tmp_path):
    with Recorder(optimizer, path=tmp_path / "run.jsonl", period_s=1000.0, history=0) as recorder:
        assert recorder.history is None
        with serve_run(tmp_path / "run.jsonl") as page:
            assert httpx.get(page.url + "api/snapshot").json()["running"]
            recorder.look()
            assert httpx.get(page.url + "api/snapshot").json()["t"] == recorder.state.t > 0
            recorder.close()
            answer = httpx.get(page.url + "api/snapshot").json()
            assert not answer["running"] and answer["snapshot"] == recorder.state.snapshot
            assert events(page.url, lambda found: found[-1][1] == "end")
