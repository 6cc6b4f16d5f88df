"""Checkpoints as they are found: what the files say counts."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_vl_memory_optimizations import CheckpointError, create_optimized_model
from qwen3_vl_memory_optimizations.compression.codecs import rotation

from ..model import tiny

IDS = torch.randint(7, 60, (1, 40), generator=torch.Generator().manual_seed(1))
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


def changed(directory, change, **config):
    """Copy the tiny checkpoint with other tensors and another configuration."""
    shutil.copytree(tiny.DIRECTORY, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    settings.update(config)
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def plain_logits(directory):
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def logits(directory, cache, codec):
    model = create_optimized_model(directory, {"codec": codec, "cache_dir": cache}, dtype=torch.float32)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    model.memory_optimizer.close()
    return found


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("which", ["other head", "same head", "head alone"])
def test_tied_or_not_the_files_decide(which, codec, tmp_path):
    def change(tensors):
        head = tensors.get(HEAD, tensors[EMBEDDING]).clone()
        tensors[HEAD] = head
        if which == "other head":
            tensors[HEAD] = (
                head + torch.randn(head.shape, generator=torch.Generator().manual_seed(0)).to(head.dtype) / 8
            )
        if which == "same head":
            tensors[HEAD] = tensors[EMBEDDING].clone()
        if which == "head alone":
            tensors[HEAD] = tensors.pop(EMBEDDING)

    directory = changed(tmp_path / "model", change, tie_word_embeddings=True)
    settings = json.loads((directory / "config.json").read_text())
    settings["text_config"]["tie_word_embeddings"] = True
    (directory / "config.json").write_text(json.dumps(settings))
    expected = plain_logits(directory)
    for _ in range(2):  # packed, and then from what was packed
        found = logits(directory, tmp_path / "cache", codec)
        tolerance = 1e-4 if codec == "none" else 0.15 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_a_generation_config_that_is_no_json_is_named(tmp_path):
    directory = changed(tmp_path / "model", lambda tensors: None)
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: cannot be used"):
        create_optimized_model(directory, {"codec": "none", "cache_dir": tmp_path / "cache"})


@pytest.mark.parametrize("codec", ["int8", "int4", "int8_rotated"])
def test_weights_that_are_no_numbers_are_named(codec, tmp_path):
    name = "model.language_model.layers.1.mlp.up_proj.weight"

    def change(tensors):
        tensors[name][3, 5] = float("nan")

    directory = changed(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        create_optimized_model(directory, {"codec": codec, "cache_dir": tmp_path / "cache"})


@pytest.mark.parametrize("codec", ["none", "int8", "int8_rotated", "int4", "fp16"])
def test_another_default_dtype_around_a_load_changes_nothing(codec, tmp_path):
    expected = logits(tiny.DIRECTORY, tmp_path / "before", codec)
    for cached in (rotation._factors, rotation.rotation_signs):
        cached.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = create_optimized_model(
            tiny.DIRECTORY, {"codec": codec, "cache_dir": tmp_path / "cache"}, dtype=torch.float32
        )
        with torch.no_grad():
            model(input_ids=IDS)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)
    model.memory_optimizer.close()
