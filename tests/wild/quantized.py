"""The tiny checkpoint in the formats of others, and what loading it must give."""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from qwen3_vl_memory_optimizations import create_optimized_model

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
