"""Write the vision tower of a Qwen3-VL checkpoint as the `mmproj` file of llama.cpp.

Names, metadata and types are those of llama.cpp's own conversion: vectors and position embeddings stay fp32, a matrix
whose rows do not divide into blocks is F16. `write_gguf.py --architecture qwen3vl` writes the text decoder to go with
it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, VisionProjectorType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.peers.write_gguf import TYPES, CheckpointTensors, Entry, quantized, write_file  # noqa: E402

PREFIX = "model.visual."
TOWER_TYPES = TYPES | {"BF16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16)}
_PATCHES = f"{PREFIX}patch_embed.proj.weight"
_WHOLE = {
    "patch_embed.proj.bias": "v.patch_embd.bias",
    "pos_embed.weight": "v.position_embd.weight",
}
_MERGER_NAMES = {"norm": "v.post_ln", "linear_fc1": "mm.0", "linear_fc2": "mm.2"}
_DEEPSTACK_NAMES = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}
_BLOCK_NAMES = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
}


def mmproj_name(name: str, deepstack: list[int]) -> str:
    """Return the name in the file of one of the tower's tensors, except that of the patches, which is split.

    Args:
        name: in the checkpoint.
        deepstack: blocks whose outputs go to the text decoder; the file numbers their mergers by block.
    """
    stem = name.removeprefix(PREFIX)
    if stem in _WHOLE:
        return _WHOLE[stem]
    stem, _, kind = stem.rpartition(".")
    first, rest = stem.split(".", 1)
    if first == "merger":
        return f"{_MERGER_NAMES[rest]}.{kind}"
    number, part = rest.split(".", 1)
    if first == "deepstack_merger_list":
        return f"v.deepstack.{deepstack[int(number)]}.{_DEEPSTACK_NAMES[part]}.{kind}"
    return f"v.blk.{number}.{_BLOCK_NAMES[part]}.{kind}"


def write_mmproj(checkpoint: Path, out: Path, quantization: str) -> None:
    """Write `out` (atomically) from a Hugging Face directory; `quantization` is one of `TOWER_TYPES`."""
    config = json.loads((checkpoint / "config.json").read_text())
    preprocessor = json.loads((checkpoint / "preprocessor_config.json").read_text())
    kind, file_type = TOWER_TYPES[quantization]
    entries = list(_entries(CheckpointTensors(checkpoint), config["vision_config"], kind))
    write_file(out, "clip", lambda writer: _add_metadata(writer, config, preprocessor, file_type), entries)


def _entries(tensors: CheckpointTensors, vision: dict, kind: GGMLQuantizationType) -> Iterator[Entry]:
    deepstack = vision["deepstack_visual_indexes"]
    for name in sorted(name for name in tensors if name.startswith(PREFIX)):
        if name == _PATCHES:
            yield from _patch_entries(tensors, kind)
            continue
        target, shape = mmproj_name(name, deepstack), tensors.slice(name).get_shape()
        yield tensors.entry(name, target, _kind_of(target, tuple(shape), kind))


def _patch_entries(tensors: CheckpointTensors, kind: GGMLQuantizationType) -> Iterator[Entry]:
    """Give one convolution for each of the two frames."""
    values = tensors.slice(_PATCHES)[:]
    stored = kind if kind == GGMLQuantizationType.F16 else GGMLQuantizationType.F32
    for frame, suffix in enumerate(("", ".1")):
        part = values[:, :, frame]
        data = quantized(part, stored)
        yield Entry(f"v.patch_embd.weight{suffix}", tuple(part.shape), stored, lambda data=data: [data])


def _kind_of(target: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) == 1 or target.startswith("v.position_embd"):
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _add_metadata(writer: GGUFWriter, config: dict, preprocessor: dict, file_type: LlamaFileType) -> None:
    vision, text = config["vision_config"], config["text_config"]
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name("Qwen3-VL vision tower")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(VisionProjectorType.QWEN3VL)
    writer.add_vision_projection_dim(text["hidden_size"])
    writer.add_vision_image_size(math.isqrt(vision["num_position_embeddings"]) * vision["patch_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_spatial_merge_size(vision["spatial_merge_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision["depth"])
    writer.add_vision_head_count(vision["num_heads"])
    writer.add_vision_attention_layernorm_eps(text["rms_norm_eps"])
    writer.add_vision_image_mean(preprocessor["image_mean"])
    writer.add_vision_image_std(preprocessor["image_std"])
    writer.add_vision_use_gelu(True)
    deepstack = vision["deepstack_visual_indexes"]
    writer.add_vision_is_deepstack_layers([block in deepstack for block in range(vision["depth"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=TOWER_TYPES, default="F16")
    arguments = parser.parse_args()
    write_mmproj(arguments.checkpoint, arguments.out, arguments.type)


if __name__ == "__main__":
    main()
