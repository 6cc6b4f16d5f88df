"""FP16, SVD and sparse as the codec of a model: where a weight suits them, and where they give it on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_vl_memory_optimizations import CodecError, create_optimized_model
from qwen3_vl_memory_optimizations.model.checkpoint import skeleton
from qwen3_vl_memory_optimizations.model.checkpoint.packing import CODECS_KEY
from qwen3_vl_memory_optimizations.storage import Checkpoint

from . import tiny

LAYERS = "model.language_model.layers."


@pytest.fixture(scope="module")
def suited(tmp_path_factory):
    """A copy of the tiny checkpoint with weights of low rank (up), of few values (down), and embeddings of both."""
    directory = tmp_path_factory.mktemp("suited") / "model"
    shutil.copytree(tiny.DIRECTORY, directory)
    tensors = load_file(directory / "model.safetensors")
    torch.manual_seed(0)
    for name, values in tensors.items():
        if "up_proj" in name:
            tensors[name] = (torch.randn(len(values), 3) @ torch.randn(3, values.shape[1]) * 0.02).contiguous()
        if "down_proj" in name or "embed_tokens" in name:
            tensors[name] = torch.where(torch.rand(values.shape) < 0.1, values, 0.0).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def original(suited):
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(suited, dtype=torch.float32).eval()


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


def codecs_of(model):
    return {name: entry.codec.name for name, entry in model.memory_optimizer.pager.entries.items()}


@torch.no_grad()
@pytest.mark.parametrize(("codec", "most_error"), [("fp16", 2e-3), ("sparse", 1e-5), ("svd", 0.05)])
def test_a_model_runs_within_a_budget(suited, original, tmp_path, monkeypatch, codec, most_error):
    monkeypatch.setattr(skeleton, "PAGE_BYTES", 16_384)
    model = create_optimized_model(suited, {"codec": codec, "cache_dir": tmp_path, "tensor_budget": "3MB"})
    codecs = codecs_of(model)
    if codec == "fp16":
        assert set(codecs.values()) == {"fp16"}
    elif codec == "svd":
        assert {name for name, used in codecs.items() if used == "svd"} >= {f"{LAYERS}0.mlp.up_proj.weight"}
        assert codecs[f"{LAYERS}0.self_attn.q_proj.weight"] == "int8"
    else:
        assert codecs[f"{LAYERS}0.mlp.down_proj.weight"] == "sparse"
        assert codecs["model.language_model.embed_tokens.weight"] == "sparse"
        assert codecs[f"{LAYERS}0.self_attn.q_proj.weight"] == "none"
    for case in ("image", "left-padded batch"):
        inputs = tiny.cases()[case]
        for _ in range(2):
            assert relative_error(model(**inputs).logits, original(**inputs).logits) < most_error, case
    inputs = tiny.cases()["image"]
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    if codec != "svd":
        assert torch.equal(ids, original.generate(**inputs, max_new_tokens=4, do_sample=False))
    model.memory_optimizer.close()


def test_what_a_codec_needs_is_kept_in_the_packed_checkpoint(suited, tmp_path):
    model = create_optimized_model(suited, {"codec": "svd", "cache_dir": tmp_path})
    entry = model.memory_optimizer.pager.entries[f"{LAYERS}0.mlp.up_proj.weight"]
    assert entry.codec.rank == 3
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    with pytest.raises(CodecError, match="encodes only the tensor"):
        weight.zero_()
    model.memory_optimizer.close()
    (packed,) = (path for path in (tmp_path / "packed").iterdir() if path.is_dir())
    codecs = json.loads(Checkpoint.open(packed).metadata[CODECS_KEY])
    assert codecs[f"{LAYERS}0.mlp.up_proj.weight"] == "svd:3"
    assert load_file(packed / "model.safetensors")[f"{LAYERS}0.mlp.up_proj.weight.right"].shape == (3, 128)


@torch.no_grad()
@pytest.mark.parametrize("codec", ["fp16", "sparse", "svd"])
def test_a_loaded_model_is_taken_over(suited, original, tmp_path, codec):
    from transformers import Qwen3VLForConditionalGeneration

    loaded = Qwen3VLForConditionalGeneration.from_pretrained(suited, dtype=torch.float32).eval()
    model = create_optimized_model(loaded, {"codec": codec, "cache_dir": tmp_path, "tensor_budget": "3MB"})
    assert codec in codecs_of(model).values()
    inputs = tiny.cases()["image"]
    assert relative_error(model(**inputs).logits, original(**inputs).logits) < 0.05
    model.memory_optimizer.close()
