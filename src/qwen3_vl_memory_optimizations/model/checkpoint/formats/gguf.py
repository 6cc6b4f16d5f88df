"""Read llama.cpp's GGUF files of Qwen3-VL: the language model in one, the vision tower in another."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from ....errors import CheckpointError
from ....storage import CONFIG_FILE, GGUF_PREFIX, Checkpoint, SafetensorsHeader, TensorExtent, read_gguf_header
from .gguf_config import built_config
from .parts import Settings
from .tensors import Files, LogicalTensor, PlainTensor, Rows, StackedTensor

SUFFIX = ".gguf"
_ARCHITECTURE, _PROJECTOR = "qwen3vl", "qwen3vl_merger"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")

_TEXT, _VISION = "model.language_model.", "model.visual."
_WHOLE = {
    "token_embd.weight": f"{_TEXT}embed_tokens.weight",
    "output_norm.weight": f"{_TEXT}norm.weight",
    "output.weight": "lm_head.weight",
    "v.patch_embd.bias": f"{_VISION}patch_embed.proj.bias",
    "v.position_embd.weight": f"{_VISION}pos_embed.weight",
}
_PATCHES = ("v.patch_embd.weight", "v.patch_embd.weight.1")
_PREFIXES = {"v.post_ln": "merger.norm", "mm.0": "merger.linear_fc1", "mm.2": "merger.linear_fc2"}
_TEXT_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_VISION_LAYER = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
    "ffn_up": "mlp.linear_fc1",
    "ffn_down": "mlp.linear_fc2",
}
_DEEPSTACK = {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}
_SPLIT = re.compile(r"v\.blk\.(\d+)\.attn_([qkv])\.(weight|bias)")


class GGUFCheckpoint(Checkpoint):
    """A checkpoint of GGUF files. Created by `open_gguf`; `tensors` uses the names in the files."""

    def __init__(self, model: Path, config_text: bytes, headers: list[SafetensorsHeader]) -> None:
        tensors = {name: extent for header in headers for name, extent in header.tensors.items()}
        super().__init__(model.parent, config_text, headers, tensors)
        self.model = model

    @property
    def name(self) -> str:
        """The name of the language model's file."""
        match = _SHARD.fullmatch(self.model.name)
        return match["stem"] if match else self.model.stem

    def weights(self) -> dict[str, LogicalTensor]:
        """Return the weights by the model's names.

        Raises:
            CheckpointError: a tensor does not belong to this model.
        """
        dtype = Settings.of(self.config, {}).dtype or torch.bfloat16
        found = {name: _logical(extent, dtype) for name, extent in self.tensors.items()}
        weights: dict[str, LogicalTensor] = {}
        if all(name in found for name in _PATCHES):
            name = f"{_VISION}patch_embed.proj.weight"
            weights[name] = StackedTensor(name, [found.pop(part) for part in _PATCHES], 2, new=True)
        weights |= _fused(found)
        levels = sorted({int(name.split(".")[2]) for name in found if name.startswith("v.deepstack.")})
        given = (self.config.get("vision_config") or {}).get("deepstack_visual_indexes")
        if isinstance(given, list) and sorted(given) == levels:
            levels = given
        for name, tensor in found.items():
            tensor.name = _model_name(name, levels, tensor.path)
            weights[tensor.name] = tensor
        return weights


def open_gguf(path: Path) -> GGUFCheckpoint:
    """Open a language model's GGUF file and the `mmproj` file beside it, or a directory with both.

    Raises:
        CheckpointError: a file is missing or damaged, the choice is ambiguous, or the model is not supported.
    """
    directory = path if path.is_dir() else path.parent
    present = sorted(directory.glob(f"*{SUFFIX}"))
    shown = ", ".join(each.name for each in present)
    towers = [each for each in present if "mmproj" in each.name.lower()]
    if path in towers:
        raise CheckpointError(f"{path}: contains only the vision tower; pass the language model's file", path=path)
    if path.is_dir():
        models = _first_shards([each for each in present if each not in towers])
        if len(models) != 1:
            raise CheckpointError(
                f"{path}: {len(models)} language models ({shown}); pass the path of one .gguf file", path=path
            )
        path = models[0]
    if not towers:
        raise CheckpointError(
            f"{path}: the vision tower is missing; put the mmproj-*.gguf file of the same model into {directory}",
            path=path,
        )
    tower = max(towers, key=lambda each: each.stat().st_size)  # the most precise one
    model = [read_gguf_header(each) for each in _shards(path)]
    vision = read_gguf_header(tower)
    settings = model[0].settings
    if settings.get("general.architecture") != _ARCHITECTURE:
        raise CheckpointError(
            f"{path}: a GGUF file of {settings.get('general.architecture')!r}; the only supported GGUF architecture is "
            f"{_ARCHITECTURE!r} (Qwen3-VL); pass a safetensors checkpoint of this model",
            path=path,
        )
    projector = vision.settings.get("clip.vision.projector_type") or vision.settings.get("clip.projector_type")
    if projector != _PROJECTOR:
        raise CheckpointError(
            f"{tower}: a vision tower of {projector!r}, not of {_PROJECTOR!r} (Qwen3-VL); replace it with the mmproj "
            "file of the same model",
            path=tower,
        )
    headers = [each.tensors for each in [*model, vision]]
    try:
        config_text = (directory / CONFIG_FILE).read_bytes()
    except FileNotFoundError:
        config_text = json.dumps(built_config(path, settings, vision.settings, headers)).encode()
    return GGUFCheckpoint(path, config_text, headers)


def _first_shards(models: list[Path]) -> list[Path]:
    return [each for each in models if not _SHARD.fullmatch(each.name) or "-00001-of-" in each.name]


def _shards(path: Path) -> list[Path]:
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    shards = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}{SUFFIX}") for number in range(1, count + 1)]
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{shard}: missing, one of {count} files; download it too", path=shard)
    return shards


def _model_name(name: str, levels: list[int], path: Path) -> str:
    """Return the model's name for a tensor."""
    if name in _WHOLE:
        return _WHOLE[name]
    stem, _, kind = name.rpartition(".")
    if stem in _PREFIXES:
        return f"{_VISION}{_PREFIXES[stem]}.{kind}"
    fields = stem.split(".")
    if len(fields) == 3 and fields[0] == "blk" and fields[2] in _TEXT_LAYER:
        return f"{_TEXT}layers.{fields[1]}.{_TEXT_LAYER[fields[2]]}.{kind}"
    if len(fields) == 4 and fields[:2] == ["v", "blk"] and fields[3] in _VISION_LAYER:
        return f"{_VISION}blocks.{fields[2]}.{_VISION_LAYER[fields[3]]}.{kind}"
    if len(fields) == 4 and fields[:2] == ["v", "deepstack"] and fields[3] in _DEEPSTACK:
        return f"{_VISION}deepstack_merger_list.{levels.index(int(fields[2]))}.{_DEEPSTACK[fields[3]]}.{kind}"
    raise CheckpointError(
        f"{path}: the tensor {name!r} does not belong to Qwen3-VL; use a file written by llama.cpp's conversion",
        path=path,
    )


def _fused(found: dict[str, LogicalTensor]) -> dict[str, LogicalTensor]:
    """Remove the vision tower's separate q, k and v tensors, and return them fused as in the model."""
    apart: dict[tuple[str, str], dict[str, LogicalTensor]] = {}
    for name in list(found):
        match = _SPLIT.fullmatch(name)
        if match:
            apart.setdefault((match[1], match[3]), {})[match[2]] = found.pop(name)
    fused: dict[str, LogicalTensor] = {}
    for (layer, kind), parts in apart.items():
        name = f"{_VISION}blocks.{layer}.attn.qkv.{kind}"
        if len(parts) == 3:
            fused[name] = StackedTensor(name, [parts[each] for each in "qkv"], 0, new=False)
    return fused


def _logical(extent: TensorExtent, dtype: torch.dtype) -> LogicalTensor:
    if not extent.dtype.startswith(GGUF_PREFIX):
        return PlainTensor(extent)
    if len(extent.shape) < 2:
        raise CheckpointError(
            f"{extent.path}: {extent.name!r} is quantized but not a matrix; use a file from llama.cpp's conversion",
            path=extent.path,
        )
    return BlockMatrix(extent, dtype)


class BlockMatrix(LogicalTensor):
    """A tensor in a GGUF block format; each row consists of whole blocks."""

    def __init__(self, extent: TensorExtent, dtype: torch.dtype) -> None:
        super().__init__(extent.name, extent.path, extent.shape, dtype)
        self._extent = extent

    def reader(self, files: Files) -> Rows:
        """Return a function that decodes rows in fp32."""
        gguf = import_gguf(self.path)
        type_name = self._extent.dtype.removeprefix(GGUF_PREFIX)
        kind = getattr(gguf.GGMLQuantizationType, type_name, None)
        row_bytes = self._extent.n_bytes // self.shape[0]

        def read(start: int, stop: int) -> torch.Tensor:
            data = files.data(self._extent, start * row_bytes, stop * row_bytes).view(stop - start, row_bytes)
            try:
                values = gguf.quants.dequantize(data.numpy(), kind)
            except (NotImplementedError, AttributeError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{self.path}: {self.name}: the installed gguf package cannot decode {type_name}; update it: "
                    "pip install --upgrade gguf",
                    path=self.path,
                ) from error
            return torch.from_numpy(values).view(stop - start, *self.shape[1:])

        return read


def import_gguf(path: Path) -> Any:
    """Return the `gguf` package.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading quantized GGUF files needs the gguf package; run: pip install gguf", path=path
        ) from error
    return gguf
