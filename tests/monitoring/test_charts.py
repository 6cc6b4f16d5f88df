"""Charts name figures that there are, and draw rates between samples."""

import pytest
import torch

import qwen3_vl_memory_optimizations as q
from qwen3_vl_memory_optimizations.monitoring import Recorder
from qwen3_vl_memory_optimizations.monitoring.rendering.charts import CHARTS, Chart, Series, lines_of
from qwen3_vl_memory_optimizations.monitoring.rendering.formatting import show
from qwen3_vl_memory_optimizations.monitoring.rendering.svg import chart_as_svg
from qwen3_vl_memory_optimizations.monitoring.run_export import state_of
from tests.model.tiny import DIRECTORY, cases


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    settings = {"cache_dir": tmp_path_factory.mktemp("cache"), "tensor_budget": "1.6MB", "codec": "int8"}
    model = q.create_optimized_model(DIRECTORY, settings)
    with model.memory_optimizer as optimizer, Recorder(optimizer, period_s=1000.0) as recorder:
        for _ in range(2):
            model.generate(**cases()["image"], do_sample=False, max_new_tokens=6)
            kept = optimizer.allocate_tensor((64, 64), torch.float32, "kv_cache")
            recorder.look()
        del kept
    return state_of(line for _, line in recorder.history.after(0)).samples


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.key)
def test_each_line_of_each_chart_is_a_figure_of_the_snapshot(samples, chart):
    for series in chart.series:
        keys = series.path.split(".")
        table = samples[-1][1]
        for key in keys[: keys.index("*") if "*" in keys else -1]:
            table = table[key]
        if "*" not in keys:
            assert keys[-1] in table, series.path
        else:
            rows = [row for row in table.values() if row is not None]
            assert rows and all(keys[-1] in row for row in rows), series.path
    assert lines_of(chart, samples)


def test_a_rate_is_growth_a_second_and_a_gap_is_no_zero():
    chart = Chart("k", "cache", "Title", "/s", "Note.", (Series("read", "paging.read", rate=True),))
    points = [
        (0.0, {"paging": {"read": 0}}),
        (2.0, {"paging": {"read": 10}}),
        (3.0, {}),
        (4.0, {"paging": {"read": 30}}),
    ]
    assert lines_of(chart, points) == {"read": [(2.0, 5.0), (3.0, None), (4.0, 10.0)]}


def test_a_rate_covers_two_seconds_so_that_a_sample_soon_after_another_is_no_spike():
    chart = Chart("k", "timeline", "Title", "/s", "Note.", (Series("tokens", "tokens", rate=True),))
    times_s = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.001)
    points = [(t, {"tokens": int(10 * t) + (t > 3)}) for t in times_s]
    [line] = lines_of(chart, points).values()
    assert [t for t, _ in line] == list(times_s[1:])
    assert all(rate == pytest.approx(10.0, rel=0.05) for _, rate in line)


def test_keys_of_a_table_become_lines_also_those_that_come_later():
    chart = Chart("k", "cache", "Title", "share", "Note.", (Series("to {}", "levels.*.rate"),))
    points = [
        (0.0, {"levels": {"cpu": {"rate": 0.5}, "gpu": None}}),
        (1.0, {"levels": {"cpu": {}, "ssd": {"rate": 1}}}),
    ]
    assert lines_of(chart, points) == {"to cpu": [(0.0, 0.5), (1.0, None)], "to ssd": [(0.0, None), (1.0, 1)]}


def test_a_limit_that_nobody_set_is_left_out():
    chart = Chart("k", "cache", "Title", "bytes", "Note.", (Series("limit", "budget.limit", optional=True),))
    assert lines_of(chart, [(0.0, {"budget": {"limit": None}})]) == {}
    assert lines_of(chart, [(0.0, {"budget": {"limit": 5}})]) == {"limit": [(0.0, 5)]}


def test_a_plot_without_figures_says_so():
    chart = Chart("k", "cache", "Title <1>", "share", "Note.", (Series("a", "a"),))
    empty = chart_as_svg(chart, {"a": [(0.0, None)]})
    assert empty.count("not measured") == 2 and "Title &lt;1&gt;" in empty and "<path" not in empty
    drawn = chart_as_svg(chart, {"a": [(0.0, 0.25), (1.0, None), (2.0, 0.5)]})
    assert drawn.count("M") == 2, "the line is broken where there is no figure"
    assert "last 50 %, mean 37.5 %, max 50 %" in drawn


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "share", "not measured"),
        (0, "bytes", "0 B"),
        (1.5e6, "bytes/s", "1.50 MB/s"),
        (0.5, "share", "50 %"),
        (1234.5, "/s", "1,234/s"),
    ],
)
def test_figures_for_people(value, unit, text):
    assert show(value, unit) == text
