"""A report holds the figures of the run, and needs nothing besides itself."""

import re

import pytest
import torch

from qwen3_vl_memory_optimizations import StorageError
from qwen3_vl_memory_optimizations.errors import format_bytes
from qwen3_vl_memory_optimizations.monitoring import Recorder, write_report
from qwen3_vl_memory_optimizations.monitoring.rendering.charts import CHARTS

MIB = 2**20


@pytest.fixture
def run(make_optimizer, tmp_path):
    with Recorder(
        make_optimizer(8 * MIB),
        path=tmp_path / "run.jsonl",
        period_s=1000.0,
        about={"command": "test", "model": "<b>model</b>"},
    ) as recorder:
        kept = [recorder._optimizer().allocate_tensor((4 * MIB,), torch.uint8) for _ in range(3)]
        recorder.note("note", "something <i>happened</i>")
        recorder.look()
        del kept
    return recorder


def test_the_report_has_the_figures_the_plots_and_the_events(run, tmp_path):
    text = write_report(run.path or tmp_path / "run.jsonl", tmp_path / "out.html").read_text()
    assert text.count("<article>") == len(CHARTS)
    assert format_bytes(run.state.snapshot["process"]["peak_rss_bytes"]) in text
    assert format_bytes(run.state.snapshot["paging"]["bytes_written"]) in text
    assert "pages swapped out: 1, swapped in: 0" in text and "settings: tensor budget" in text
    assert "<i>" not in text and "something &lt;i&gt;happened" in text and "&lt;b&gt;model" in text
    assert "not measured" in text, "no answer was given, and that is no speed of 0"
    assert "had not ended" not in text


def test_the_report_fetches_nothing_and_runs_nothing(run, tmp_path):
    text = write_report(tmp_path / "run.jsonl", tmp_path / "out.html").read_text()
    assert not re.search(r"<script|https?://|@import|url\(|\ssrc=", text)
    assert re.findall(r'href="([^"]*)"', text) == ["data:,"]


def test_a_run_that_was_cut_off_is_reported_as_such(run, tmp_path):
    path = tmp_path / "run.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-2][:20])
    assert "had not ended" in write_report(path, tmp_path / "out.html").read_text()


def test_where_it_cannot_be_written_nothing_is_left(run, tmp_path):
    with pytest.raises(StorageError, match="the report cannot be written"):
        write_report(tmp_path / "run.jsonl", tmp_path / "nowhere" / "out.html")
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []
