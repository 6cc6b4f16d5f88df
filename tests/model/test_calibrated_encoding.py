"""Weights encoded for the inputs that they get: what it gains, and that it resumes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen3_vl_memory_optimizations import MemoryBudgetExceeded, MemoryConfig, create_optimized_model
from qwen3_vl_memory_optimizations.compression import INT4Codec
from qwen3_vl_memory_optimizations.evaluation.data import SHIPPED_TEXT
from qwen3_vl_memory_optimizations.model.checkpoint.packing import CALIBRATION_KEY
from qwen3_vl_memory_optimizations.native import core
from qwen3_vl_memory_optimizations.planning import pack_model
from qwen3_vl_memory_optimizations.process import rss_bytes
from qwen3_vl_memory_optimizations.storage import Checkpoint

from . import tiny

pytestmark = pytest.mark.skipif(core() is None, reason="errors are compensated by the native core alone")


def config(cache_dir, **settings):
    return MemoryConfig.from_mapping({"codec": "int4", "cache_dir": cache_dir, **settings})


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    return pack_model(tiny.DIRECTORY, config(tmp_path_factory.mktemp("calibrated")))


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return pack_model(tiny.DIRECTORY, config(tmp_path_factory.mktemp("fast")), fast=True)


@torch.no_grad()
def test_outputs_for_such_inputs_change_less_than_without_calibration(calibrated, fast):
    ids = tiny.tokenizer()(SHIPPED_TEXT.read_text()[:4000], return_tensors="pt")["input_ids"]
    expected = tiny.reference()(input_ids=ids).logits.log_softmax(-1)

    def divergence(packed):
        with create_optimized_model(packed) as model:
            found = model(input_ids=ids).logits.log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    assert divergence(calibrated) < 0.6 * divergence(fast)


def test_only_what_is_encoded_differs(calibrated, fast):
    one, other = (load_file(directory / "model.safetensors") for directory in (calibrated, fast))
    assert one.keys() == other.keys()
    same = {name for name in one if torch.equal(one[name], other[name])}
    assert not any(name.endswith("up_proj.weight") for name in same)
    assert {"model.language_model.norm.weight", "model.language_model.embed_tokens.weight"} <= same
    assert Checkpoint.open(fast).metadata.get(CALIBRATION_KEY) is None


def test_it_resumes_with_the_same_result(calibrated, tmp_path, monkeypatch):
    encoded = []
    encode = INT4Codec.encode_compensated

    def counted(self, rows, compensation):
        if len(encoded) == 20:
            raise KeyboardInterrupt
        encoded.append(rows.shape)
        return encode(self, rows, compensation)

    monkeypatch.setattr(INT4Codec, "encode_compensated", counted)
    with pytest.raises(KeyboardInterrupt):
        pack_model(tiny.DIRECTORY, config(tmp_path))
    monkeypatch.undo()
    again = []
    monkeypatch.setattr(INT4Codec, "encode_compensated", lambda *given: again.append(0) or encode(*given))
    resumed = pack_model(tiny.DIRECTORY, config(tmp_path))
    assert len(encoded) == 20
    whole, found = (load_file(directory / "model.safetensors") for directory in (calibrated, resumed))
    assert (
        len(again) == sum(name.endswith(".weight") and value.dtype == torch.uint8 for name, value in found.items()) - 20
    )
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_calibrated_replaces_fast_but_loading_takes_what_there_is(tmp_path):
    pack_model(tiny.DIRECTORY, config(tmp_path), fast=True)
    with create_optimized_model(tiny.DIRECTORY, config(tmp_path)):
        packed = next((tmp_path / "packed").glob("*-int4_tables"))
        assert CALIBRATION_KEY not in Checkpoint.open(packed).metadata
    pack_model(tiny.DIRECTORY, config(tmp_path))
    assert Checkpoint.open(packed).metadata[CALIBRATION_KEY] == "shipped images and text"


def test_without_a_tokenizer_it_says_so_and_encodes_as_well_as_it_can(tmp_path, caplog):
    bare = tmp_path / "bare"
    shutil.copytree(tiny.DIRECTORY, bare, ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "merges*"))
    packed = pack_model(bare, config(tmp_path))
    assert "encoding without calibration, which loses more" in caplog.text
    assert CALIBRATION_KEY not in Checkpoint.open(packed).metadata


def test_a_budget_without_room_is_refused_before_anything_is_encoded(tmp_path):
    with pytest.raises(MemoryBudgetExceeded, match="pack --fast"):
        pack_model(tiny.DIRECTORY, config(tmp_path, ram_budget=rss_bytes() + 200_000_000))
    assert not list(Path(tmp_path, "packed").glob("*-int4_tables"))


def test_a_plan_with_int4_in_it_is_calibrated_too(tmp_path):
    from qwen3_vl_memory_optimizations.model.checkpoint.plan import CompressionPlan, PlannedWeight

    names = [
        "model.language_model.layers.0.mlp.up_proj.weight",
        "model.language_model.layers.2.self_attn.q_proj.weight",
    ]
    plan = CompressionPlan({name: PlannedWeight("int4", "by hand", {}) for name in names}, 0.02, "nothing", "bytes")
    packed = pack_model(tiny.DIRECTORY, config(tmp_path, codec="auto"), plan=plan)
    assert Checkpoint.open(packed).metadata[CALIBRATION_KEY] == "shipped images and text"
    stored = load_file(packed / "model.safetensors")
    assert {name for name in names if stored[name].dtype == torch.uint8} == set(names)
