"""Write the text decoder of a Qwen3-VL checkpoint as GGUF (architecture `qwen3` or `qwen3vl`), quantised.

Without an image, the three position indices of Qwen3-VL's M-RoPE are equal, so its decoder is a plain Qwen3, which
OpenVINO can read too. `qwen3vl` also takes the embeddings of images, from the tower that `write_mmproj.py` writes.
Matrices are Q8_0 or Q4_0 throughout (llama.cpp's own quantiser would keep the head of a Q4_0 file at six bits and
decode a little slower); norms stay fp32. Memory: one block of rows. The tokenizer is a stand-in, since models are fed
ids.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from safetensors import safe_open

ARCHITECTURES = ("qwen3", "qwen3vl")
PREFIX = "model.language_model."
TYPES = {
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "F16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),  # for `check_gguf.py`
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BLOCK_VALUES = 1 << 22
_FLUSH_BYTES = 256 << 20


def gguf_name(name: str) -> str | None:
    """Return the GGUF name of a checkpoint's tensor; `None` for one that is not of the text decoder."""
    if name == "lm_head.weight":
        return "output.weight"
    if not name.startswith(PREFIX):
        return None
    stem = name.removeprefix(PREFIX).removesuffix(".weight")
    if stem in ("embed_tokens", "norm"):
        return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[stem]
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.weight"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a GGUF file.

    Attributes:
        name: in the file.
        shape: rows first.
        kind: type in the file.
        parts: gives the bytes in their order.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    parts: Callable[[], Iterable[np.ndarray]]


class CheckpointTensors:
    """The tensors of a Hugging Face directory, read in parts."""

    def __init__(self, checkpoint: Path) -> None:
        self._places = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
        self._files = {file: safe_open(checkpoint / file, "pt") for file in set(self._places.values())}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def slice(self, name: str):
        """Return the view of a tensor from which parts are read."""
        return self._files[self._places[name]].get_slice(name)

    def entry(self, name: str, target: str, kind: GGMLQuantizationType) -> Entry:
        """Return a whole tensor as an entry of the file."""
        tensor = self.slice(name)
        return Entry(target, tuple(tensor.get_shape()), kind, lambda: _quantized_parts(tensor, kind))


def write_gguf(checkpoint: Path, out: Path, quantization: str, architecture: str = "qwen3") -> None:
    """Write `out` (atomically) from a Hugging Face directory.

    Args:
        quantization: one of `TYPES`.
        architecture: one of `ARCHITECTURES`.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = CheckpointTensors(checkpoint)
    matrix_kind, file_type = TYPES[quantization]
    entries = []
    for name in sorted(filter(gguf_name, tensors), key=_order):
        is_vector = len(tensors.slice(name).get_shape()) == 1
        kind = GGMLQuantizationType.F32 if is_vector else matrix_kind
        entries.append(tensors.entry(name, gguf_name(name), kind))

    def add_metadata(writer: GGUFWriter) -> None:
        _add_metadata(writer, config, file_type)
        if architecture == "qwen3vl":
            writer.add_rope_dimension_sections([*config["text_config"]["rope_parameters"]["mrope_section"], 0])
            writer.add_num_deepstack_layers(len(config["vision_config"]["deepstack_visual_indexes"]))

    write_file(out, architecture, add_metadata, entries)


def write_file(out: Path, architecture: str, add_metadata: Callable[[GGUFWriter], None], entries: list[Entry]) -> None:
    """Write a GGUF file atomically, one part of a tensor at a time."""
    partial = out.with_suffix(".partial")
    writer = GGUFWriter(str(partial), architecture)
    add_metadata(writer)
    for entry in entries:
        block, block_bytes = gguf.GGML_QUANT_SIZES[entry.kind]
        size = math.prod(entry.shape) // block * block_bytes
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    stream = writer.fout[0]
    writer.write_padding(stream, stream.tell())
    unflushed = 0
    for entry in entries:
        for part in entry.parts():
            stream.write(part.tobytes())
            unflushed += part.nbytes
            if unflushed > _FLUSH_BYTES:
                unflushed = 0
                _flush(stream)
        writer.write_padding(stream, stream.tell())
    _flush(stream)
    writer.state = gguf.gguf_writer.WriterState.WEIGHTS
    writer.close()
    os.replace(partial, out)


def quantized(values: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Return the bytes of whole rows in a type."""
    array = values.to(torch.float32).contiguous().numpy()
    return array if kind == GGMLQuantizationType.F32 else gguf.quantize(array, kind)


def _quantized_parts(tensor, kind: GGMLQuantizationType) -> Iterator[np.ndarray]:
    """Give a tensor's bytes in their order, a block of rows at a time."""
    shape = tuple(tensor.get_shape())
    rows = max(1, _BLOCK_VALUES // math.prod(shape[1:]))
    for first in range(0, shape[0], rows):
        yield quantized(tensor[first : first + rows], kind)


def _order(name: str) -> tuple[int, str]:
    """Order tensors as they are used, as llama.cpp's own converter does."""
    target = gguf_name(name)
    if target.startswith("blk."):
        return int(target.split(".")[1]) + 1, target
    return (0 if target.startswith("token_embd") else 10**6), target


def _add_metadata(writer: GGUFWriter, config: dict, file_type: LlamaFileType) -> None:
    text = config["text_config"]
    writer.add_name("Qwen3-VL text decoder")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(text["vocab_size"])
    # A byte-level vocabulary: 256 bytes, then words that no text contains.
    letters = list(_byte_letters())
    merges = [f"{letters[97]} {letters[98]}"]
    words = [*letters, merges[0].replace(" ", "")]
    words += [f"<{number}>" for number in range(len(words), text["vocab_size"])]
    # libmtmd puts the first two around an image.
    for word in ("vision_start", "vision_end", "image", "video"):
        words[config[f"{word}_token_id"]] = f"<|{word}|>" if word.startswith("vision") else f"<|{word}_pad|>"
    kinds = [TokenType.NORMAL] * 257 + [TokenType.CONTROL] * (text["vocab_size"] - 257)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(text["eos_token_id"])
    writer.add_pad_token_id(text["bos_token_id"])
    writer.add_add_bos_token(False)


def _byte_letters() -> Iterator[str]:
    """Give the printable letter that byte-level vocabularies use for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    for byte in range(256):
        yield chr(byte if byte in printable else next(moved))


def _flush(stream) -> None:
    stream.flush()
    os.fdatasync(stream.fileno())
    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=TYPES, default="Q8_0")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="qwen3")
    arguments = parser.parse_args()
    write_gguf(arguments.checkpoint, arguments.out, arguments.type, arguments.architecture)


if __name__ == "__main__":
    main()
