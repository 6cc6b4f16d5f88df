"""Checkpoints that others quantised: every weight is what its format says."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from qwen3_vl_memory_optimizations import MemoryBudgetExceeded
from qwen3_vl_memory_optimizations.config import MemoryConfig
from qwen3_vl_memory_optimizations.model.checkpoint.formats import needs_packing, open_checkpoint, weights_of
from qwen3_vl_memory_optimizations.model.checkpoint.packing import pack_checkpoint
from qwen3_vl_memory_optimizations.storage import Checkpoint

from ..model import tiny
from . import encoders
from .quantized import FORMATS, FP8, UP, check_loaded, quantised, tiny_copy

WHOLE = ("fp8 blocks", "int8 rows", "int4 zeros and order", "nf4 nested", "gptq order", "awq")
"""Loaded and run; of the others the weights are compared."""


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
    monkeypatch.setattr("qwen3_vl_memory_optimizations.model.checkpoint.formats.tensors._CHUNK_BYTES", 4 * 128 * 29)
    monkeypatch.setattr("qwen3_vl_memory_optimizations.model.checkpoint.formats.tensors._BLOCK_VALUES", 128 * 13)
    for which in ("fp8 cut blocks", "fp4 odd blocks", "gptq", "awq", "int4 zeros and order"):
        decoded = quantised(tmp_path / which, *FORMATS[which])[f"{UP}.weight"]
        found = weights_of(open_checkpoint(tmp_path / which))[f"{UP}.weight"].whole()
        torch.testing.assert_close(found, decoded, rtol=1e-6, atol=1e-9)


def test_auto_plans_from_the_decoded_weights(tmp_path):
    from qwen3_vl_memory_optimizations.planning import pack_model

    quantised(tmp_path / "model", *FORMATS["int8 rows"])
    packed = pack_model(tmp_path / "model", MemoryConfig(cache_dir=tmp_path / "cache"))
    plan = json.loads(packed.with_name(f"{packed.name}.plan.json").read_text())
    assert "quantized" in plan["calibrated_on"] and len(plan["weights"]) > 28


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
    with pytest.raises(MemoryBudgetExceeded, match=r"decoding .* needs .*pack once without ram_budget"):
        pack_checkpoint(tmp_path / "model", codec="int8", config=config)
    assert not list(config.packed_dir.glob("*"))
