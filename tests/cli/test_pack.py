import json
from pathlib import Path

import pytest
from safetensors import safe_open

from qwen3_vl_memory_optimizations.native import core


def test_a_checkpoint_is_packed_once(run, tiny, tmp_path):
    first = run("pack", tiny, "--cache-dir", tmp_path)
    assert first.exit_code == 0, first.stderr
    assert "packed in" in first.stdout
    assert "10.8 MB -> " in first.stdout
    directory = first.stdout.strip().splitlines()[-1]
    assert directory.startswith(str(tmp_path))

    second = run("pack", tiny, "--cache-dir", tmp_path)
    assert second.exit_code == 0
    assert "already packed" in second.stdout
    assert second.stdout.strip().splitlines()[-1] == directory


def test_json_says_where_and_how_large(run, tiny, tmp_path):
    packed = json.loads(run("pack", tiny, "--cache-dir", tmp_path, "--json").stdout)
    assert set(packed) == {
        "directory",
        "codec",
        "already_packed",
        "source_bytes",
        "packed_bytes",
        "seconds",
        "plan",
        "calibrated_on",
        "codecs",
    }
    assert not packed["already_packed"]
    assert packed["packed_bytes"] < packed["source_bytes"] / 3
    with safe_open(f"{packed['directory']}/model.safetensors", framework="pt") as checkpoint:
        assert "model.language_model.norm.weight" in checkpoint.keys()
    assert packed["codecs"]["int8_rotated"]["weights"] > 40
    assert 0 < packed["codecs"]["int8_rotated"]["largest_error"] < 0.02
    again = json.loads(run("pack", tiny, "--cache-dir", tmp_path, "--json").stdout)
    assert again["already_packed"]
    assert again["seconds"] is None


def test_a_plan_can_be_edited_and_packed_again(run, tiny, tmp_path):
    packed = json.loads(run("pack", tiny, "--cache-dir", tmp_path, "--json").stdout)
    edited = tmp_path / "edited.json"
    plan = json.loads(Path(packed["plan"]).read_text())
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    plan["weights"][name]["codec"] = "none"
    edited.write_text(json.dumps(plan))

    result = run("pack", tiny, "--cache-dir", tmp_path, "--plan", edited)
    assert result.exit_code == 0, result.stderr
    assert f"{name}: none" in result.stdout
    with safe_open(f"{packed['directory']}/model.safetensors", framework="pt") as checkpoint:
        assert checkpoint.get_slice(name).get_dtype() == "F32"
    assert not list(Path(packed["directory"]).parent.glob("*.old"))
    assert "already packed" in run("pack", tiny, "--cache-dir", tmp_path).stdout


def test_a_bad_plan_is_refused_with_its_place(run, tiny, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    assert "not a compression plan" in run("pack", tiny, "--cache-dir", tmp_path, "--plan", plan).stderr
    result = run("pack", tiny, "--cache-dir", tmp_path, "--plan", tmp_path / "none.json")
    assert (result.exit_code, "cannot be read" in result.stderr) == (2, True)
    result = run("pack", tiny, "--cache-dir", tmp_path, "--codec", "int8", "--plan", plan)
    assert "requires codec auto" in result.stderr


def test_calibration_takes_a_directory_of_samples(run, tiny, tmp_path):
    result = run("pack", tiny, "--cache-dir", tmp_path / "cache", "--calibration", tmp_path)
    assert (result.exit_code, "has neither images nor .txt files" in result.stderr) == (2, True)
    (tmp_path / "a.txt").write_text("The cat sat on the mat. " * 20)
    result = run("pack", tiny, "--cache-dir", tmp_path / "cache", "--calibration", tmp_path, "--json")
    assert json.loads(result.stdout)["calibrated_on"].startswith("0 images and text")


@pytest.mark.skipif(core() is None, reason="errors are compensated by the native core alone")
def test_int4_is_calibrated_unless_it_shall_be_fast(run, tiny, tmp_path):
    options = ("pack", tiny, "--cache-dir", tmp_path, "--codec", "int4", "--json")
    fast = json.loads(run(*options, "--fast").stdout)
    assert (fast["already_packed"], fast["calibrated_on"]) == (False, None)
    assert "not calibrated" in run(*options[:-1], "--fast").stdout
    calibrated = json.loads(run(*options).stdout)
    assert (calibrated["already_packed"], calibrated["directory"]) == (False, fast["directory"])
    assert calibrated["calibrated_on"] == "shipped images and text"
    for again in (run(*options), run(*options, "--fast")):
        assert json.loads(again.stdout)["already_packed"]

    own = tmp_path / "own"
    own.mkdir()
    (own / "a.txt").write_text("The cat sat on the mat. " * 20)
    assert str(own) in json.loads(run(*options, "--calibration", own).stdout)["calibrated_on"]
    assert json.loads(run(*options, "--calibration", own).stdout)["already_packed"]
    (own / "a.txt").write_text("The dog sat on the mat. " * 20)
    assert not json.loads(run(*options, "--calibration", own).stdout)["already_packed"]
    assert json.loads(run(*options).stdout)["already_packed"]


def test_options_of_calibration_that_exclude_each_other(run, tiny, tmp_path):
    options = ("pack", tiny, "--cache-dir", tmp_path, "--calibration", tmp_path, "--codec")
    assert "requires codec auto, or int4" in run(*options, "int8").stderr
    assert "--fast encodes without calibration" in run(*options, "int4", "--fast").stderr


def test_pack_mixes_codecs_to_fit(run, tiny, tmp_path):
    options = ("pack", tiny, "--cache-dir", tmp_path)
    fitted = run(*options, "--fit", "2.2MB")
    assert fitted.exit_code == 0, fitted.stderr
    assert "one step up: +" in fitted.stdout and "one step down: -" in fitted.stdout
    packed = json.loads(run(*options, "--fit", "2.2MB", "--json").stdout)
    assert packed["already_packed"]
    assert {"int4", "int8_rotated"} <= set(packed["codecs"])
    assert 2.0e6 < sum(row["bytes"] for row in packed["codecs"].values()) <= 2.2e6
    plan = json.loads(Path(packed["plan"]).read_text())
    assert plan["most_bytes"] == 2_200_000
    assert json.loads(run(*options, "--json").stdout)["already_packed"]  # what there is, is used

    looser = json.loads(run(*options, "--tolerance", "8%", "--json").stdout)
    assert not looser["already_packed"]
    assert looser["codecs"]["int4"]["weights"] > 10
    fewer = json.loads(run(*options, "--bits", "5.5", "--json").stdout)
    assert fewer["codecs"]["int4"]["weights"] > packed["codecs"]["int4"]["weights"]


def test_needs_that_cannot_be_met_are_refused_with_numbers(run, tiny, tmp_path):
    options = ("pack", tiny, "--cache-dir", tmp_path)
    for given, message in (
        (("--fit", "1MB"), "the smallest codecs take 1.54 MB"),
        (("--fit", "much"), "--fit: 'much' is not a size"),
        (("--bits", "0"), "--bits: 0 is not a number of bits"),
        (("--tolerance", "huge"), "--tolerance: 'huge' is not a percentage"),
        (("--bits", "5", "--fit", "2MB"), "--fit and --bits exclude each other"),
        (("--codec", "int4", "--bits", "5"), "--bits requires codec auto"),
    ):
        result = run(*options, *given)
        assert (result.exit_code, message in result.stderr) == (2, True), (given, result.stderr)
