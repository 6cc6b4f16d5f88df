"""GGUF files of Qwen3-VL, written with the names and layouts of llama.cpp's conversion."""

from __future__ import annotations

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwen3_vl_memory_optimizations import CheckpointError, create_optimized_model
from qwen3_vl_memory_optimizations.model.checkpoint.formats import open_checkpoint, weights_of
from qwen3_vl_memory_optimizations.model.inputs.processor import load_processor
from qwen3_vl_memory_optimizations.storage import read_gguf_header

from ..model import tiny
from .quantized import UP, check_loaded

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
CONFIG = json.loads((tiny.DIRECTORY / "config.json").read_text())
SIDES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
TOKENS = {3: "<|vision_start|>", 4: "<|vision_end|>", 5: "<|image_pad|>", 6: "<|video_pad|>"}


def file_name(name, text_names, vision_names):
    """What llama.cpp calls a tensor: the tables of the gguf package, and what its conversion adds to them."""
    match = re.fullmatch(r"model\.visual\.deepstack_merger_list\.(\d+)\.(norm|linear_fc1|linear_fc2)\.(\w+)", name)
    if match:
        layer = CONFIG["vision_config"]["deepstack_visual_indexes"][int(match[1])]
        return f"v.deepstack.{layer}.{match[2].replace('linear_', '')}.{match[3]}"
    merger = {"norm": "v.post_ln", "linear_fc1": "mm.0", "linear_fc2": "mm.2"}
    match = re.fullmatch(r"model\.visual\.merger\.(\w+)\.(\w+)", name)
    if match:
        return f"{merger[match[1]]}.{match[2]}"
    if name.startswith("model.visual."):
        return vision_names.get_name(name.removeprefix("model."), (".weight", ".bias"))
    return text_names.get_name(name.replace("model.language_model.", "model."), (".weight", ".bias"))


def write(directory, kinds, *, split_qkv=False, tokens=TOKENS, arch="qwen3vl", model_name="tiny.gguf"):
    """Write the tiny checkpoint as a model and an mmproj file; return what its weights are.

    Args:
        kinds: a part of a name -> the type in the file; else F32.
    """
    directory.mkdir(exist_ok=True)
    text, vision = CONFIG["text_config"], CONFIG["vision_config"]
    model = gguf.GGUFWriter(directory / model_name, arch)
    model.add_block_count(text["num_hidden_layers"])
    model.add_embedding_length(text["hidden_size"])
    model.add_feed_forward_length(text["intermediate_size"])
    model.add_context_length(text["max_position_embeddings"])
    model.add_head_count(text["num_attention_heads"])
    model.add_head_count_kv(text["num_key_value_heads"])
    model.add_key_length(text["head_dim"])
    model.add_layer_norm_rms_eps(text["rms_norm_eps"])
    model.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
    model.add_rope_dimension_sections([*text["rope_parameters"]["mrope_section"], 0])
    model.add_token_list([tokens.get(number, f"word {number}") for number in range(text["vocab_size"])])
    model.add_eos_token_id(text["eos_token_id"])
    model.add_pad_token_id(text["pad_token_id"])
    tower = gguf.GGUFWriter(directory / "mmproj-tiny.gguf", "clip")
    tower.add_clip_projector_type("qwen3vl_merger")
    tower.add_vision_block_count(vision["depth"])
    tower.add_vision_embedding_length(vision["hidden_size"])
    tower.add_vision_feed_forward_length(vision["intermediate_size"])
    tower.add_vision_head_count(vision["num_heads"])
    tower.add_vision_projection_dim(vision["out_hidden_size"])
    tower.add_vision_patch_size(vision["patch_size"])
    tower.add_vision_spatial_merge_size(vision["spatial_merge_size"])
    levels = vision["deepstack_visual_indexes"]
    tower.add_vision_is_deepstack_layers([layer in levels for layer in range(vision["depth"])])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3VL, 8), gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 8)
    decoded = load_file(tiny.DIRECTORY / "model.safetensors")
    for name, values in list(decoded.items()):
        writer = tower if name.startswith("model.visual.") else model
        if name.endswith("patch_embed.proj.weight"):
            writer.add_tensor("v.patch_embd.weight", values[:, :, 0].numpy().copy())
            writer.add_tensor("v.patch_embd.weight.1", values[:, :, 1].numpy().copy())
            continue
        stored = file_name(name, *names)
        assert stored is not None, name
        kind = next((kind for part, kind in kinds.items() if part in name and values.ndim == 2), None)
        if kind is None and split_qkv and ".qkv." in name:
            for each, third in zip("qkv", values.chunk(3), strict=True):
                writer.add_tensor(stored.replace("attn_qkv", f"attn_{each}"), third.numpy().copy())
            continue
        data = values.numpy() if kind is None else gguf.quants.quantize(values.numpy(), kind)
        writer.add_tensor(stored, data, raw_dtype=kind)
        if kind is not None:
            decoded[name] = torch.from_numpy(gguf.quants.dequantize(data, kind))
            if kind == gguf.GGMLQuantizationType.F16:
                decoded[name] = decoded[name].half()
    for writer in (model, tower):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return decoded


KINDS = {
    "mlp.up": gguf.GGMLQuantizationType.Q4_0,
    "mlp.gate": gguf.GGMLQuantizationType.Q5_1,
    "o_proj": gguf.GGMLQuantizationType.BF16,
    "proj.weight": gguf.GGMLQuantizationType.Q8_0,
    "embed_tokens": gguf.GGMLQuantizationType.Q8_0,
    "visual.blocks.1.mlp": gguf.GGMLQuantizationType.F16,
}


def with_sides(directory):
    for name in SIDES:
        shutil.copy(tiny.DIRECTORY / name, directory)
    return directory


@pytest.mark.parametrize("given", ["directory", "file"])
def test_a_gguf_model_runs_as_transformers_does(given, tmp_path):
    directory = tmp_path / "model"
    decoded = write(directory, {name: kind for name, kind in KINDS.items() if kind.name != "BF16"})
    with_sides(directory)
    path = directory if given == "directory" else directory / "tiny.gguf"
    packed = check_loaded(path, decoded, tmp_path / "cache")
    assert packed.name.startswith("tiny-")
    assert load_processor(path).prepare("what?", [])["input_ids"].numel()


def test_every_type_means_what_the_package_says(tmp_path):
    directory = tmp_path / "model"
    decoded = write(directory, KINDS, split_qkv=True)
    with_sides(directory)
    weights = weights_of(open_checkpoint(directory))
    assert weights.keys() == decoded.keys()
    for name, expected in decoded.items():
        torch.testing.assert_close(weights[name].whole().float(), expected.float(), rtol=0, atol=0)
    assert weights["model.visual.blocks.1.mlp.linear_fc1.weight"].dtype == torch.float16


def test_without_config_json_the_configuration_comes_from_the_file(tmp_path):
    directory = tmp_path / "model"
    decoded = write(directory, {})
    built = open_checkpoint(directory).config
    for key in ("text_config", "vision_config"):
        for name, value in built[key].items():
            assert CONFIG[key].get(name, value) == value, name
    assert {key: built[key] for key in CONFIG if key.endswith("_token_id")} == {
        key: value for key, value in CONFIG.items() if key.endswith("_token_id")
    }
    check_loaded(directory, decoded, tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"put config\.json, tokenizer\.json.* of the original model beside"):
        load_processor(directory)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"arch": "qwen3"}, "a GGUF file of 'qwen3'"),
        ({"tokens": {}}, r"no <\|image_pad\|>; put config\.json of the original model"),
    ],
)
def test_what_a_file_does_not_say_is_named(options, said, tmp_path):
    write(tmp_path / "model", {}, **options)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path / "model")


def test_files_that_are_missing_or_too_many_are_named(tmp_path):
    directory = tmp_path / "model"
    write(directory, {})
    with pytest.raises(CheckpointError, match="contains only the vision tower"):
        open_checkpoint(directory / "mmproj-tiny.gguf")
    shutil.copy(directory / "tiny.gguf", directory / "other.gguf")
    with pytest.raises(CheckpointError, match=r"2 language models .*pass the path of one \.gguf file"):
        open_checkpoint(directory)
    assert open_checkpoint(directory / "other.gguf").name == "other"
    (directory / "mmproj-tiny.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"put the mmproj-\*\.gguf file"):
        open_checkpoint(directory / "tiny.gguf")
    (directory / "tiny-00001-of-00002.gguf").write_bytes((directory / "tiny.gguf").read_bytes())
    (directory / "mmproj.gguf").write_bytes((directory / "tiny.gguf").read_bytes())
    with pytest.raises(CheckpointError, match=r"tiny-00002-of-00002\.gguf: missing, one of 2 files"):
        open_checkpoint(directory / "tiny-00001-of-00002.gguf")


def test_without_the_gguf_package_the_error_names_it(tmp_path, monkeypatch):
    write(tmp_path / "model", KINDS)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        create_optimized_model(tmp_path / "model", {"codec": "none", "cache_dir": tmp_path / "cache"})


def test_damaged_files_are_errors_of_ours(tmp_path):
    write(tmp_path / "model", {"mlp.up": gguf.GGMLQuantizationType.Q4_0})
    path = tmp_path / "model" / "tiny.gguf"
    whole = path.read_bytes()
    header = read_gguf_header(path)
    start = header.tensors.data_start_bytes
    random = np.random.default_rng(0)
    for cut in [0, 3, 10, 100, *random.integers(24, start, 20).tolist(), len(whole) - 4096]:
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
            read_gguf_header(path)
    for _ in range(200):
        changed = bytearray(whole)
        changed[int(random.integers(4, start))] = int(random.integers(0, 256))
        path.write_bytes(changed)
        try:
            read_gguf_header(path)
        except CheckpointError:
            pass


def test_the_name_of_a_tensor_is_that_of_the_model(tmp_path):
    write(tmp_path / "model", KINDS)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.tensors["blk.1.ffn_up.weight"].dtype == "GGUF:Q4_0"
    assert weights_of(checkpoint)[f"{UP}.weight"].path.name == "tiny.gguf"
