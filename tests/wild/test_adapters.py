"""LoRA adapters: merged on their base while it is packed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_vl_memory_optimizations import CheckpointError
from qwen3_vl_memory_optimizations.model.checkpoint.formats import open_checkpoint, weights_of
from qwen3_vl_memory_optimizations.model.inputs.processor import load_processor

from ..model import tiny
from .quantized import FORMATS, TEXT, UP, check_loaded, quantised

SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "fan_in_fan_out": False, "use_dora": False}
EMBEDDING = "model.language_model.embed_tokens"


def adapter(directory, *, base=tiny.DIRECTORY, modules=None, extra=None, **settings):
    """Write an adapter of some modules; return the factors."""
    torch.manual_seed(0)
    weights = load_file(tiny.DIRECTORY / "model.safetensors")
    factors, tensors = {}, dict(extra or {})
    for name, rank in (modules or {UP: 4, f"{TEXT}0.self_attn.q_proj": 4}).items():
        rows, columns = weights[f"{name}.weight"].shape
        a, b = torch.randn(rank, columns) / 8, torch.randn(rows, rank) / 8
        factors[name] = b @ a
        tensors |= {
            f"base_model.model.{name}.lora_A.weight": a,
            f"base_model.model.{name}.lora_B.weight": b,
        }
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = SETTINGS | {"base_model_name_or_path": str(base)} | settings
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return factors


def merged(weights, factors, scale):
    return weights | {f"{name}.weight": weights[f"{name}.weight"] + scale * delta for name, delta in factors.items()}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 8 / math.sqrt(4))])
def test_an_adapter_is_merged_on_its_base(rslora, scale, tmp_path):
    factors = adapter(tmp_path / "lora", use_rslora=rslora)
    expected = merged(load_file(tiny.DIRECTORY / "model.safetensors"), factors, scale)
    packed = check_loaded(tmp_path / "lora", expected, tmp_path / "cache")
    assert packed.name.startswith("lora-") and (packed / "tokenizer.json").is_file()
    assert load_processor(tmp_path / "lora").prepare("what?", [])["input_ids"].numel()


def test_ranks_by_module_embeddings_and_whole_weights(tmp_path):
    a, b = torch.randn(4, 68), torch.randn(128, 4)
    norm = torch.randn(128)
    extra = {
        f"base_model.model.{EMBEDDING}.lora_embedding_A": a,
        f"base_model.model.{EMBEDDING}.lora_embedding_B": b,
        "base_model.model.model.language_model.norm.weight": norm,
    }
    patterns = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 6}}
    factors = adapter(tmp_path / "lora", modules={UP: 2}, extra=extra, **patterns)
    base = load_file(tiny.DIRECTORY / "model.safetensors")
    expected = merged(base, factors, 3.0)
    expected[f"{EMBEDDING}.weight"] = base[f"{EMBEDDING}.weight"] + 2.0 * (b @ a).T
    expected["model.language_model.norm.weight"] = norm
    expected["lm_head.weight"] = base[f"{EMBEDDING}.weight"]  # tied in the base, and not adapted
    for name, weight in weights_of(open_checkpoint(tmp_path / "lora")).items():
        torch.testing.assert_close(weight.whole(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_tied_head_is_adapted_alone(tmp_path):
    a, b = torch.randn(4, 128), torch.randn(68, 4)
    extra = {"base_model.model.lm_head.lora_A.weight": a, "base_model.model.lm_head.lora_B.weight": b}
    adapter(tmp_path / "lora", extra=extra)
    weights = weights_of(open_checkpoint(tmp_path / "lora"))
    base = load_file(tiny.DIRECTORY / "model.safetensors")[f"{EMBEDDING}.weight"]
    torch.testing.assert_close(weights["lm_head.weight"].whole(), base + 2.0 * b @ a, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights[f"{EMBEDDING}.weight"].whole(), base)


def test_an_adapter_on_a_quantised_base(tmp_path):
    decoded = quantised(tmp_path / "base", *FORMATS["nf4 nested"])
    factors = adapter(tmp_path / "lora", base="../base")
    check_loaded(tmp_path / "lora", merged(decoded, factors, 2.0), tmp_path / "cache")


def test_a_change_of_the_adapter_is_another_checkpoint(tmp_path):
    adapter(tmp_path / "lora")
    before = open_checkpoint(tmp_path / "lora").fingerprint()
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text()) | {"lora_alpha": 16}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path / "lora").fingerprint() != before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "DoRA is not supported.*merge_and_unload"),
        ({"peft_type": "IA3"}, "a PEFT adapter of type IA3"),
        ({"bias": "all"}, "trained biases"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        (
            {"base": "Qwen/Qwen3-VL-2B-Instruct"},
            "the base 'Qwen/Qwen3-VL-2B-Instruct'.*download it",
        ),
        ({"base": ""}, "base_model_name_or_path is missing"),
        ({"extra": {"base_model.model.x.weight": torch.zeros(2)}}, "matches nothing in the base"),
        ({"extra": {f"base_model.model.{TEXT}9.mlp.up_proj.lora_A.weight": torch.zeros(2, 2)}}, "has no .*up_proj"),
        ({"extra": {f"base_model.model.{TEXT}3.mlp.up_proj.lora_A.weight": torch.zeros(2, 2)}}, "only one of lora_A"),
        ({"r": 0}, "the rank of .* is 0"),
    ],
)
def test_adapters_that_are_not_read_are_named(settings, said, tmp_path):
    adapter(tmp_path / "lora", **settings)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path / "lora")


def test_factors_of_another_model_are_named(tmp_path):
    wrong = {f"base_model.model.{TEXT}3.mlp.up_proj.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}
    adapter(tmp_path / "lora", extra=wrong)
    with pytest.raises(CheckpointError, match="do not form a matrix"):
        open_checkpoint(tmp_path / "lora")


def test_an_adapter_without_safetensors_is_named(tmp_path):
    adapter(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, which is not read"):
        open_checkpoint(tmp_path / "lora")
