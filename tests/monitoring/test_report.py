"""A report holds the figures of the run, and needs nothing besides itself."""

import json
import re

import pytest
import torch

from qwen3_vl_memory_optimizations import StorageError
from qwen3_vl_memory_optimizations.monitoring import AlertMonitor, Recorder, alert_rows, write_report
from qwen3_vl_memory_optimizations.monitoring.rendering.charts import CHARTS
from qwen3_vl_memory_optimizations.monitoring.rendering.comparison import write_comparison
from qwen3_vl_memory_optimizations.monitoring.rendering.formatting import show, show_difference

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
    assert show(run.state.snapshot["process"]["peak_rss_bytes"], "bytes") in text
    assert show(run.state.snapshot["paging"]["bytes_written"], "bytes") in text
    assert "pages swapped out: 1, swapped in: 0" in text and "settings: tensor budget" in text
    assert "<i>" not in text and "something &lt;i&gt;happened" in text and "&lt;b&gt;model" in text
    assert "not measured" in text, "no answer was given, and that is no speed of 0"
    assert "had not ended" not in text


def test_a_breach_of_the_budget_is_an_alert_of_the_report(run, tmp_path):
    path = tmp_path / "run.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    budget = {**records[1]["set"]["budget"], "ram_budget_bytes": 2_000_000_000, "peak_bytes": 2_140_000_000}
    snapshot = {**run.state.snapshot, "budget": budget}
    records[-2]["set"] |= {"budget": budget, "alerts": alert_rows(AlertMonitor().evaluate(snapshot))}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = write_report(path, tmp_path / "out.html").read_text()
    assert "<td>budget</td><td>active</td><td>107 %</td><td>100 %</td>" in text
    assert "peak 2.14 GB, over the budget of 2.00 GB by 0.14 GB" in text


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


def test_the_verdict_stands_first(run, tmp_path):
    text = write_report(tmp_path / "run.jsonl", tmp_path / "out.html").read_text()
    first = re.search(r"</h1><p[^>]*>([^<]*)", text)
    assert first[1] == run.state.snapshot["verdict"]["text"] == "Not measured: no token was decoded yet."


def test_runs_recorded_before_there_was_a_verdict_have_none(run, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(path.read_text().replace('"verdict":', '"unknown":'))
    assert "What limits decoding: not measured." in write_report(path, tmp_path / "out.html").read_text()


def rows_of(text):
    """The cells of each row of a report's tables."""
    return [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", text)]


def test_two_runs_are_compared_figure_by_figure_on_the_same_axes(run, make_optimizer, tmp_path):
    with Recorder(make_optimizer(16 * MIB), path=tmp_path / "other.jsonl", period_s=1000.0) as other:
        kept = [other._optimizer().allocate_tensor((4 * MIB,), torch.uint8) for _ in range(4)]
        other.look()
        del kept
    text = write_comparison(tmp_path / "run.jsonl", tmp_path / "other.jsonl", tmp_path / "out.html").read_text()
    rows = rows_of(text)
    assert ["Tensor memory budget", "8.39 MB", "16.8 MB", "+8.39 MB (+100 %)"] in rows
    assert ["settings: tensor budget", "8.39 MB", "16.8 MB"] in rows
    assert not any("pid" in row[0] for row in rows if row)
    assert text.count("<article>") == 2 * len(CHARTS) and text.count("no token was decoded yet") == 2
    frames = re.findall(r"<article><h3>Page frames: [AB].*?</article>", text)
    scales = [re.findall(r'text-anchor="end">([^<]*)<', frame) for frame in frames]
    assert len(frames) == 2 and scales[0] == scales[1]
    assert not re.search(r"<script|https?://|@import|url\(|\ssrc=", text)


@pytest.mark.parametrize(
    ("first", "second", "unit", "text"),
    [
        (2.0e9, 1.5e9, "bytes", "\u2212500 MB (\u221225 %)"),
        (0.43, 0.51, "share", "+8 points"),
        (2.0, 2.0, "tokens/s", "same"),
        (0.0, 3.0, "s", "+3 s"),
        (None, 3.0, "s", "not measured"),
    ],
)
def test_a_difference_has_a_sign_and_a_share_of_the_first(first, second, unit, text):
    assert show_difference(first, second, unit) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(2e9, "2.00 GB"), (1.234e9, "1.23 GB"), (12.34e6, "12.3 MB"), (999.7e6, "1.00 GB"), (310e6, "310 MB"), (7, "7 B")],
)
def test_sizes_have_three_digits(n_bytes, text):
    assert show(n_bytes, "bytes") == text
