"""Checkpoints that others quantised: every weight is what its format says, and formats that are not read are named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_vl_memory_optimizations import CheckpointError, MemoryBudgetExceeded, create_optimized_model
from qwen3_vl_memory_optimizations.config import MemoryConfig
from qwen3_vl_memory_optimizations.model.checkpoint import needs_packing, open_checkpoint, weights_of
from qwen3_vl_memory_optimizations.model.packing import pack_checkpoint
from qwen3_vl_memory_optimizations.storage import Checkpoint

from ..model import tiny
from . import encoders

IDS = torch.randint(7, 60, (1, 24), generator=torch.Generator().manual_seed(1))
TEXT = "model.language_model.layers."
UP = f"{TEXT}1.mlp.up_proj"


def compressed(form, **weights):
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
PACKED = compressed("pack-quantized", num_bits=4, group_size=32)

FORMATS = {
    "fp8 blocks": (encoders.fp8, {"block": (128, 128), "dtype": torch.bfloat16}, FP8),
    "fp8 cut blocks": (encoders.fp8, {"block": (48, 80)}, FP8 | {"weight_block_size": [48, 80]}),
    "fp8 one scale": (encoders.fp8, {"name": "weight_scale", "shape": ()}, {"quant_method": "fp8"}),
    "fp8 blocks, compressed-tensors": (
        encoders.fp8,
        {"block": (128, 64), "name": "weight_scale"},
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 64]),
    ),
    "int8 rows": (encoders.int8_channels, {}, compressed("int-quantized", num_bits=8)),
    "int8 rows with zeros": (encoders.int8_channels, {"zeros": True}, compressed("int-quantized", num_bits=8)),
    "int8 groups": (encoders.int8_channels, {"group": 48}, compressed("int-quantized", num_bits=8, group_size=48)),
    "int4 groups": (encoders.packed, {}, PACKED),
    "int4 zeros and order": (encoders.packed, {"zeros": True, "order": True}, PACKED),
    "int4 cut groups": (encoders.packed, {"group": 52}, compressed("pack-quantized", num_bits=4, group_size=52)),
    "int8 packed": (encoders.packed, {"bits": 8}, compressed("pack-quantized", num_bits=8, group_size=32)),
    "bnb 8": (encoders.bnb8, {}, BNB8),
    "nf4": (encoders.bnb4, {}, BNB4),
    "nf4 nested": (encoders.bnb4, {"nested": True}, BNB4),
    "fp4 odd blocks": (encoders.bnb4, {"kind": "fp4", "block": 100}, BNB4),
    "gptq": (encoders.gptq, {}, GPTQ),
    "gptq order": (encoders.gptq, {"order": True}, GPTQ | {"desc_act": True}),
    "gptq v2 cut groups": (
        encoders.gptq,
        {"version": 2, "group": 48, "index": False},
        GPTQ | {"checkpoint_format": "gptq_v2", "group_size": 48},
    ),
    "gptq 2 bits": (encoders.gptq, {"bits": 2}, GPTQ | {"bits": 2}),
    "gptq 3 bits": (encoders.gptq, {"bits": 3}, GPTQ | {"bits": 3}),
    "gptq 8 bits": (encoders.gptq, {"bits": 8}, GPTQ | {"bits": 8}),
    "awq": (encoders.awq, {}, AWQ),
}
WHOLE = ("fp8 blocks", "int8 rows", "int4 zeros and order", "nf4 nested", "gptq order", "awq")
"""Loaded and run; of the others the weights are compared."""


def is_linear(name):
    return name.startswith(TEXT) and name.endswith("proj.weight")


def tiny_copy(directory, tensors, **settings):
    """Write the tiny checkpoint with other tensors and changes to its config.json."""
    shutil.copytree(tiny.DIRECTORY, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({name: each.contiguous() for name, each in tensors.items()}, directory / "model.safetensors")
    config = json.loads((tiny.DIRECTORY / "config.json").read_text()) | settings
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def quantised(directory, encode, options, quantization):
    """Write the tiny checkpoint with quantised text layers; return what its weights are."""
    torch.manual_seed(0)
    tensors = load_file(tiny.DIRECTORY / "model.safetensors")
    decoded = dict(tensors)
    for name in filter(is_linear, list(tensors)):
        parts, decoded[name] = encode(tensors.pop(name), **options)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": each for part, each in parts.items()}
    tiny_copy(directory, tensors, quantization_config=quantization)
    return decoded


def reference_logits(weights):
    """The logits of plain transformers with these weights."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_pretrained(tiny.DIRECTORY)).eval()
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return model(input_ids=IDS).logits


def check_loaded(path, decoded, cache, **settings):
    """Load a model, compare its packed weights and its logits; return the packed directory."""
    config = {"codec": "none", "cache_dir": cache, **settings}
    model = create_optimized_model(path, config, dtype=torch.float32)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    packed = model.memory_optimizer.figures.packed_dirs[""]
    model.memory_optimizer.close()
    if config["codec"] == "none":
        stored = load_file(packed / "model.safetensors")
        for name, expected in decoded.items():
            torch.testing.assert_close(stored[name], expected, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(found, reference_logits(decoded), rtol=1e-4, atol=1e-4)
    else:
        expected = reference_logits(decoded)
        assert (found - expected).norm() < 0.1 * expected.norm()
    config = json.loads((packed / "config.json").read_text())
    assert not {"quantization_config", "quantization"} & config.keys()
    return packed


@pytest.mark.parametrize("which", FORMATS)
def test_every_weight_is_what_its_format_says(which, tmp_path):
    encode, options, quantization = FORMATS[which]
    decoded = quantised(tmp_path / "model", encode, options, quantization)
    source = open_checkpoint(tmp_path / "model")
    assert needs_packing(source)
    weights = weights_of(source)
    assert weights.keys() == decoded.keys()
    for name, expected in decoded.items():
        assert (weights[name].shape, weights[name].dtype) == (tuple(expected.shape), torch.float32)
        torch.testing.assert_close(weights[name].whole(), expected, rtol=1e-6, atol=1e-9)
    rows = weights[f"{UP}.weight"].sample(32)
    torch.testing.assert_close(rows[:16], decoded[f"{UP}.weight"][:16], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("which", WHOLE)
def test_a_quantised_checkpoint_runs_as_transformers_does(which, tmp_path):
    decoded = quantised(tmp_path / "model", *FORMATS[which])
    packed = check_loaded(tmp_path / "model", decoded, tmp_path / "cache")
    assert packed.parent == MemoryConfig(cache_dir=tmp_path / "cache").packed_dir
    assert Checkpoint.open(packed).packed and not needs_packing(Checkpoint.open(packed))


def test_it_is_encoded_again_and_runs_within_a_budget(tmp_path):
    decoded = quantised(tmp_path / "model", *FORMATS["gptq"])
    check_loaded(tmp_path / "model", decoded, tmp_path / "cache", codec="int8", tensor_budget=1_200_000)


def test_small_chunks_give_the_same(tmp_path, monkeypatch):
    """Of each format that counts rows: chunks that end anywhere."""
    monkeypatch.setattr("qwen3_vl_memory_optimizations.model.checkpoint.tensors._DECODED_CHUNK_BYTES", 4 * 128 * 13)
    for which in ("fp8 cut blocks", "fp4 odd blocks", "gptq", "awq", "int4 zeros and order"):
        decoded = quantised(tmp_path / which, *FORMATS[which])[f"{UP}.weight"]
        found = weights_of(open_checkpoint(tmp_path / which))[f"{UP}.weight"].whole()
        torch.testing.assert_close(found, decoded, rtol=1e-6, atol=1e-9)


def test_auto_plans_from_the_decoded_weights(tmp_path):
    from qwen3_vl_memory_optimizations.planning import pack_model

    quantised(tmp_path / "model", *FORMATS["int8 rows"])
    packed = pack_model(tmp_path / "model", MemoryConfig(cache_dir=tmp_path / "cache"))
    plan = json.loads(packed.with_name(f"{packed.name}.plan.json").read_text())
    assert "quantised" in plan["calibrated_on"] and len(plan["weights"]) > 28


def test_weights_are_read_in_the_dtype_of_the_model(tmp_path):
    quantised(tmp_path / "model", *FORMATS["gptq"])
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert weights_of(open_checkpoint(tmp_path / "model"))[f"{UP}.weight"].dtype == torch.bfloat16


def test_a_head_that_is_quantised_is_not_tied(tmp_path):
    torch.manual_seed(0)
    tensors = load_file(tiny.DIRECTORY / "model.safetensors")
    parts, head = encoders.fp8(tensors["model.language_model.embed_tokens.weight"] * 2, block=(128, 128))
    tiny_copy(
        tmp_path / "model", tensors | {f"lm_head.{part}": each for part, each in parts.items()}, quantization_config=FP8
    )
    stored = pack_checkpoint(tmp_path / "model", codec="none", config=MemoryConfig(cache_dir=tmp_path / "cache"))
    torch.testing.assert_close(load_file(stored / "model.safetensors")["lm_head.weight"], head)


def test_an_interrupted_packing_goes_on(tmp_path):
    decoded = quantised(tmp_path / "model", *FORMATS["awq"])
    config, done = MemoryConfig(cache_dir=tmp_path / "cache"), []

    def stop(description, n_bytes, total):
        done.append(n_bytes)
        if n_bytes > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_checkpoint(tmp_path / "model", codec="none", config=config, progress=stop)
    packed = pack_checkpoint(tmp_path / "model", codec="none", config=config)
    stored = load_file(packed / "model.safetensors")
    for name, expected in decoded.items():
        torch.testing.assert_close(stored[name], expected, rtol=1e-6, atol=1e-9)


def test_a_budget_too_small_to_decode_is_refused_before_anything_is_written(tmp_path):
    quantised(tmp_path / "model", *FORMATS["gptq"])
    config = MemoryConfig(cache_dir=tmp_path / "cache", ram_budget=64 << 20)
    with pytest.raises(MemoryBudgetExceeded, match=r"decoding .* takes .*pack once without ram_budget"):
        pack_checkpoint(tmp_path / "model", codec="int8", config=config)
    assert not list(config.packed_dir.glob("*"))


# What is not read


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command line in this process."""
    from typer.testing import CliRunner

    from qwen3_vl_memory_optimizations.cli import app

    monkeypatch.setenv("QWEN3VL_MEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    return lambda *arguments: CliRunner(env={"NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])


def refused(run, path, *said):
    """Pack at the command line: one line that says what it is and what to do, and no traceback."""
    done = run("pack", path, "--codec", "int8", "--json")
    assert done.exit_code != 0 and isinstance(done.exception, SystemExit)
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "CheckpointError"
    for words in said:
        assert words in error["message"]
    assert "Traceback" not in done.output


UNREAD = {
    "hqq": ({"quant_method": "hqq"}, "hqq"),
    "aqlm": ({"quant_method": "aqlm"}, "aqlm"),
    "quanto": ({"quant_method": "quanto"}, "quanto"),
    "eetq": ({"quant_method": "eetq"}, "eetq"),
    "mxfp4": ({"quant_method": "mxfp4"}, "mxfp4"),
    "torchao": ({"quant_method": "torchao"}, "torchao"),
    "auto-round": ({"quant_method": "auto-round"}, "auto-round"),
    "awq gemv": ({**AWQ, "version": "gemv"}, "gemv"),
    "gptq marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
    "nvfp4": (compressed("nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
    "sparse": (compressed("pack-quantized") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
    "rotated": (compressed("pack-quantized") | {"transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
    "mlx": ({"group_size": 64, "bits": 4}, "mlx"),
}


@pytest.mark.parametrize("which", UNREAD)
def test_formats_that_are_not_read_are_named(which, run, tmp_path):
    quantization, name = UNREAD[which]
    tiny_copy(tmp_path / "model", load_file(tiny.DIRECTORY / "model.safetensors"), quantization_config=quantization)
    refused(run, tmp_path / "model", name, "not read", "use the original model in 16 bits")


def test_quantised_weights_that_config_json_does_not_declare_are_refused(run, tmp_path):
    quantised(tmp_path / "model", *FORMATS["int8 rows"][:2], None)
    refused(run, tmp_path / "model", "has no quantization_config", "weight_scale", "take config.json from")


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "float8_e4m3fn"), (torch.int8, "int8")])
def test_weights_that_nothing_explains_are_refused(dtype, name, run, tmp_path):
    tensors = load_file(tiny.DIRECTORY / "model.safetensors")
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(dtype)
    tiny_copy(tmp_path / "model", tensors)
    refused(run, tmp_path / "model", f"{UP}.weight", name, "use the original model in 16 bits")
    with pytest.raises(CheckpointError, match="it is quantised"):  # paged from its own file
        create_optimized_model(tmp_path / "model", {"codec": "none", "cache_dir": tmp_path / "cache"})


@pytest.mark.parametrize(
    ("which", "part", "change", "said"),
    [
        ("gptq", "qzeros", None, "qzeros is missing"),
        ("gptq", "scales", lambda each: each[:-1], "do not belong together"),
        ("gptq order", "g_idx", lambda each: each + 90, "g_idx names groups"),
        ("awq", "qweight", lambda each: each[:, :-1], "do not belong together"),
        ("int8 rows", "weight", lambda each: each.float(), "neither INT8 nor FP8"),
        ("int4 groups", "weight_shape", lambda each: each * 2, "weight_packed has shape"),
        ("int8 rows", "weight_scale", lambda each: each[:-1], "do not fit"),
        ("nf4", "weight.absmax", lambda each: each[:-1], "blocks"),
        ("bnb 8", "weight_format", lambda each: each + 1, "weight_format is not 'row'"),
        ("fp8 blocks", "weight_scale_2", torch.ones(1), "weight_scale_2 is not a part of this format"),
    ],
)
def test_parts_that_contradict_each_other_are_named(which, part, change, said, tmp_path):
    quantised(tmp_path / "model", *FORMATS[which])
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = f"{UP}.{part}"
    if change is None:
        del tensors[name]
    else:
        tensors[name] = (change if isinstance(change, torch.Tensor) else change(tensors[name])).contiguous()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=said) as caught:
        weights_of(open_checkpoint(tmp_path / "model"))[f"{UP}.weight"].whole()
    assert UP in str(caught.value)


def test_another_vision_language_model_is_named(run, tmp_path):
    from transformers import Qwen2_5_VLConfig

    tiny_copy(tmp_path / "model", load_file(tiny.DIRECTORY / "model.safetensors"))
    config = Qwen2_5_VLConfig().to_dict() | {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    refused(run, tmp_path / "model", "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "Use a Qwen3-VL checkpoint")
