"""Checkpoints in formats that are not read: an error that names the format and what to do."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_vl_memory_optimizations import CheckpointError, create_optimized_model
from qwen3_vl_memory_optimizations.model.checkpoint.formats import open_checkpoint, weights_of

from ..model import tiny
from .quantized import AWQ, FORMATS, GPTQ, UP, compressed, quantised, tiny_copy


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


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_weights_that_nothing_explains_are_refused(dtype, name, run, tmp_path):
    tensors = load_file(tiny.DIRECTORY / "model.safetensors")
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(dtype)
    tiny_copy(tmp_path / "model", tensors)
    refused(run, tmp_path / "model", f"{UP}.weight", name, "use the original model in 16 bits")
    with pytest.raises(CheckpointError, match="it is quantized"):  # paged from its own file
        create_optimized_model(tmp_path / "model", {"codec": "none", "cache_dir": tmp_path / "cache"})


@pytest.mark.parametrize(
    ("which", "part", "change", "said"),
    [
        ("gptq", "qzeros", None, "qzeros is missing"),
        ("gptq", "scales", lambda each: each[:-1], "do not match"),
        ("gptq order", "g_idx", lambda each: each + 90, "g_idx names groups"),
        ("awq", "qweight", lambda each: each[:, :-1], "do not match"),
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
