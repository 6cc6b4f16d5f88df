"""`codec="auto"`: each weight gets the codec that its outputs allow."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_vl_memory_optimizations import ConfigurationError, create_optimized_model, planning
from qwen3_vl_memory_optimizations.config import MemoryConfig
from qwen3_vl_memory_optimizations.model.checkpoint.packing import CODECS_KEY, plan_path
from qwen3_vl_memory_optimizations.model.checkpoint.plan import CompressionPlan, PlannedWeight
from qwen3_vl_memory_optimizations.planning import Need, make_plan, pack_model
from qwen3_vl_memory_optimizations.storage import Checkpoint, PackedWriter

from .model import tiny

UP = "model.language_model.layers.1.mlp.up_proj.weight"
DOWN = "model.language_model.layers.1.mlp.down_proj.weight"


def changed_checkpoint(directory, change):
    """Return a copy of the tiny checkpoint whose tensors a function changed."""
    shutil.copytree(tiny.DIRECTORY, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def plan_of(directory, tmp_path, **settings):
    return make_plan(Checkpoint.open(directory), MemoryConfig(cache_dir=tmp_path / "cache", **settings))


def test_the_tiny_model_is_calibrated_on_images_and_text(tmp_path):
    plan = plan_of(tiny.DIRECTORY, tmp_path)
    assert plan.calibrated_on.startswith("3 images and text")
    assert {weight.codec for weight in plan.weights.values()} == {"int8_rotated"}
    errors = [weight.relative_error for weight in plan.weights.values()]
    assert all(0.001 < error < plan.tolerance for error in errors)


def test_each_weight_gets_the_codec_that_suits_it(tmp_path):
    def change(tensors):
        generator = torch.Generator().manual_seed(0)
        up = tensors[UP]
        tensors[UP] = torch.randn(len(up), 4, generator=generator) @ torch.randn(4, up.shape[1], generator=generator)
        tensors[DOWN][torch.rand(tensors[DOWN].shape, generator=generator) > 0.05] = 0

    plan = plan_of(changed_checkpoint(tmp_path / "model", change), tmp_path)
    assert (plan.weights[UP].codec, plan.weights[DOWN].codec) == ("svd", "sparse")
    without = plan_of(tmp_path / "model", tmp_path, enable_sparse_compression=False)
    assert without.weights[DOWN].codec == "int8_rotated"
    assert "sparse" not in without.weights[DOWN].candidates


def test_what_int8_would_harm_stays_in_16_bits(tmp_path):
    def change(tensors):
        # Each row has one weight beside which all others are small, and the inputs that meet it are zero: the norm
        # before takes them out. INT8 then spends its steps on what does not count.
        tensors[UP][:, 0] = 300 * tensors[UP].abs().max()
        tensors["model.language_model.layers.1.post_attention_layernorm.weight"][0] = 0

    plan = plan_of(changed_checkpoint(tmp_path / "model", change), tmp_path)
    chosen = plan.weights[UP]
    assert chosen.codec == "fp16"
    assert chosen.candidates["int8_rotated"].relative_error > plan.tolerance
    assert "loses" in chosen.why_not("int8_rotated")
    others = [weight.codec for name, weight in plan.weights.items() if name != UP]
    assert others.count("int8_rotated") >= len(others) - 1  # gate has the same inputs


def test_the_plan_is_kept_and_what_was_interrupted_goes_on_by_it(tmp_path):
    config = MemoryConfig(cache_dir=tmp_path)
    source = Checkpoint.open(tiny.DIRECTORY)
    plan = CompressionPlan({UP: PlannedWeight("int8", "asked for", {})}, 0.02, "nothing", "bytes")
    plan.save(plan_path(source, config))  # as a packing that was stopped leaves it
    packed = Checkpoint.open(pack_model(tiny.DIRECTORY, config))
    codecs = json.loads(packed.metadata[CODECS_KEY])
    assert codecs.pop(UP) == "int8"
    assert set(codecs.values()) == {"int8_rotated"}
    assert CompressionPlan.load(plan_path(source, config)) == plan
    assert pack_model(tiny.DIRECTORY, config) == packed.directory


def codecs_of(directory):
    return json.loads(Checkpoint.open(directory).metadata[CODECS_KEY])


def test_a_packing_that_was_interrupted_is_not_planned_again(tmp_path, monkeypatch):
    config = MemoryConfig(cache_dir=tmp_path)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PackedWriter, "append", interrupted)
        pack_model(tiny.DIRECTORY, config)
    monkeypatch.setattr("qwen3_vl_memory_optimizations.planning.make_plan", None)
    plan = CompressionPlan.load(plan_path(Checkpoint.open(tiny.DIRECTORY), config))
    assert codecs_of(pack_model(tiny.DIRECTORY, config)) == {name: each.codec for name, each in plan.weights.items()}


def test_a_plan_that_was_edited_where_it_is_kept_is_packed_again(tmp_path):
    config = MemoryConfig(cache_dir=tmp_path)
    directory = pack_model(tiny.DIRECTORY, config)
    path = plan_path(Checkpoint.open(tiny.DIRECTORY), config)
    content = json.loads(path.read_text())
    content["weights"][UP]["codec"] = "int8"
    path.write_text(json.dumps(content))
    assert pack_model(tiny.DIRECTORY, config) == directory
    assert codecs_of(directory)[UP] == "int8"
    assert codecs_of(directory)[DOWN] == "int8_rotated"
    written = path.stat().st_mtime_ns
    assert pack_model(tiny.DIRECTORY, config) == directory
    assert path.stat().st_mtime_ns == written, "what is packed already is not written to"


def test_where_nothing_is_encoded_the_source_is_read_in_place(tmp_path):
    config = MemoryConfig(cache_dir=tmp_path)
    names = make_plan(Checkpoint.open(tiny.DIRECTORY), config).weights
    plan = CompressionPlan({name: PlannedWeight("none", "", {}) for name in names}, 0.02, "nothing", "bytes")
    assert pack_model(tiny.DIRECTORY, config, plan=plan) == tiny.DIRECTORY
    assert pack_model(tiny.DIRECTORY, config) == tiny.DIRECTORY  # and is not planned again


def test_a_plan_of_another_checkpoint_is_refused(tmp_path):
    plan = CompressionPlan({"model.up": PlannedWeight("int8", "", {})}, 0.02, "nothing", "bytes")
    with pytest.raises(ConfigurationError, match="'model.up', not a large weight"):
        pack_model(tiny.DIRECTORY, MemoryConfig(cache_dir=tmp_path), plan=plan)
    assert not list(tmp_path.rglob("*"))


def test_a_plan_that_is_refused_leaves_the_one_that_is_kept(tmp_path):
    config = MemoryConfig(cache_dir=tmp_path)
    directory = pack_model(tiny.DIRECTORY, config)
    path = plan_path(Checkpoint.open(tiny.DIRECTORY), config)
    kept, packed = path.read_bytes(), codecs_of(directory)
    other = CompressionPlan({"model.up": PlannedWeight("int8", "", {})}, 0.02, "nothing", "bytes")
    with pytest.raises(ConfigurationError, match=r"model\.up"):
        pack_model(tiny.DIRECTORY, config, plan=other)
    assert (path.read_bytes(), codecs_of(directory)) == (kept, packed)


def test_without_a_tokenizer_the_weights_alone_decide(tmp_path):
    directory = changed_checkpoint(tmp_path / "model", lambda tensors: None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    plan = plan_of(directory, tmp_path)
    assert "no tokenizer" in plan.calibrated_on
    assert {weight.codec for weight in plan.weights.values()} == {"int8_rotated"}


def outlier_checkpoint(directory):
    """Return the tiny checkpoint with 50-fold activations in 0.5 % of the channels (one), compensated in the weights.

    The function is the same: the norm before a product gives more, and the columns that meet it are smaller.
    """

    def change(tensors):
        for layer in range(4):
            prefix = f"model.language_model.layers.{layer}"
            for norm, parts in (
                ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            ):
                channel = int(tensors[f"{prefix}.{norm}.weight"].abs().argmax())
                tensors[f"{prefix}.{norm}.weight"][channel] *= 50
                for part in parts:
                    tensors[f"{prefix}.{part}.weight"][:, channel] /= 50

    return changed_checkpoint(directory, change)


def test_outlier_channels_cost_less_than_two_points(tmp_path):
    directory = outlier_checkpoint(tmp_path / "model")
    exact = type(tiny.reference()).from_pretrained(directory, dtype=torch.float32).eval()
    inputs = tiny.cases()["image"]
    assert torch.allclose(exact(**inputs).logits, tiny.reference()(**inputs).logits, atol=1e-3)  # the same function
    before = tiny.share_right(exact, 500)
    assert before > 0.85
    plan = plan_of(directory, tmp_path)
    harmed = [weight for weight in plan.weights.values() if weight.candidates["int8_rotated"].reason]
    assert len(harmed) >= 10  # of 20 whose inputs have an outlier
    assert {weight.codec for weight in harmed} <= {"fp16", "int8"}
    model = create_optimized_model(directory, {"cache_dir": tmp_path / "cache"})
    try:
        assert tiny.share_right(model, 500) >= before - 0.02
    finally:
        model.memory_optimizer.close()


@pytest.mark.parametrize("need", [Need(bits=6.5), Need(tolerance=0.08)])
def test_needs_are_met_where_speeds_count_too(need, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "_WORTH_MEASURING_BYTES", 0)
    plan = make_plan(Checkpoint.open(tiny.DIRECTORY), MemoryConfig(cache_dir=tmp_path), need=need)
    assert plan.machine
    assert "int4" in {weight.codec for weight in plan.weights.values()}
    assert plan.most_bytes is None or plan.n_bytes <= plan.most_bytes
