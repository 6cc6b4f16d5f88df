import json
import re
import shutil
import urllib.request

import pytest
import torch

from qwen3_vl_memory_optimizations.compression import codec_names


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products so small are computed by one thread: several would mostly wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def test_every_codec_is_compared_with_plain_transformers(run, tiny):
    result = run("evaluate", tiny, "--full", "--images", "6", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["baseline"] == "plain transformers"
    rows = {row["codec"]: row for row in report["codecs"]}
    assert tuple(rows) == codec_names()
    unchanged, quantized = (rows[codec]["tasks"]["images"] for codec in ("none", "int8"))
    assert unchanged["positions"] == 6
    assert unchanged["difference"]["perplexity"] == unchanged["difference"]["layer_relative_error"] == 0
    assert unchanged["baseline"] == unchanged["optimized"] == quantized["baseline"]
    assert 0 < quantized["difference"]["layer_relative_error"] < 0.05
    assert quantized["difference"]["top1_agreement"] == 1
    assert len(quantized["layer_relative_errors"]) == 4 + 3 + 4
    assert rows["none"]["share_of_16_bit"] == 2  # the shipped checkpoint is fp32
    assert rows["int8"]["share_of_16_bit"] == rows["int8"]["weight_bytes"] / report["weight_bytes_16_bit"] < 0.6
    assert list(rows["int8"]["weights_stored_as"]) == ["int8"]
    assert 4.5 < rows["int4"]["bits_per_weight"] < 6 < 8 < rows["int8"]["bits_per_weight"] < 9
    assert all(row["tokens_per_s"] > 0 and row["whole_bytes"] > row["weight_bytes"] for row in rows.values())


def test_by_default_few_codecs_are_compared_and_one_is_recommended(run, tiny):
    result = run("evaluate", tiny, "--images", "3")
    assert result.exit_code == 0, result.stderr
    table = result.stdout.split("weights by codec")[1]
    assert all(name in table for name in ("int8_rotated", "int8 ", "int4"))
    assert "svd" not in result.stdout and "sparse" not in result.stdout
    assert "perplexity: how unsure" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("Use int4")
    line = next(line for line in result.stdout.splitlines() if line.startswith("int4: 1.79 MB"))
    assert re.fullmatch(
        r"int4: 1\.79 MB, 5\.3 bits per weight, accuracy [+-]\d+\.\d points about images, "
        r"fits whole in \d+ MB, [\d.e+]+ tokens per second here",
        line,
    )


def test_within_a_budget_the_table_fits_80_columns(run, tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("what is the color of the shape? is there a red circle?")
    result = run("evaluate", tiny, "--codec", "int8", "--images", "2", "--text", text, "--tensor-budget", "2MB")
    assert result.exit_code == 0, result.stderr
    tables = result.stdout.split("largest layer errors")[0]
    assert max(len(line.rstrip()) for line in tables.splitlines()[:-1]) <= 80
    assert "codec none, within the same budget" in result.stdout
    assert "images: 2 predictions" in result.stdout
    assert "text: " in result.stdout
    assert "54 int8" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--codec", "zip"), "'zip' is not one of auto, "),
        (("--text", "no-such-file.txt"), "no-such-file.txt: cannot read this text"),
        (("--images", "1001"), "easy-VQA"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(run, tiny, options, message):
    result = run("evaluate", tiny, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_language_model_is_shown_no_images(run, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((tiny / "config.json").read_text())
    del config["vision_config"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    result = run("evaluate", tmp_path / "model", "--images", "3")
    assert result.exit_code == 2
    assert "is a language model" in result.stderr


def test_help_has_an_example(run):
    assert "qwen3vl-mem evaluate" in run("evaluate", "--help").stdout


def test_the_page_shows_each_codec_at_work(run, tiny, monkeypatch):
    from qwen3_vl_memory_optimizations.monitoring.dashboard.server import Dashboard

    close, served = Dashboard.close, []

    def fetching_close(page):
        with urllib.request.urlopen(page.url + "api/snapshot", timeout=20) as answer:
            served.append(json.load(answer)["snapshot"])
        close(page)

    monkeypatch.setattr(Dashboard, "close", fetching_close)
    result = run("evaluate", tiny, "--codec", "int8", "--codec", "fp16", "--images", "4", "--dashboard", "0")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("dashboard: http://127.0.0.1:") == 2
    codecs = [{row["codec"] for row in snapshot["memory_map"]} for snapshot in served]
    assert "int8" in codecs[0] and "fp16" in codecs[1] and "int8" not in codecs[1]
