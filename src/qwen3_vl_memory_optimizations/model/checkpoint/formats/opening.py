"""Open a checkpoint in any supported form: its weights and the files beside them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ....errors import CheckpointError
from ....storage import CONFIG_FILE, Checkpoint
from ...sources.hub import local_path
from .adapter import ADAPTER_CONFIG, AdapterCheckpoint, base_directory, open_adapter, read_adapter_config
from .gguf import SUFFIX, GGUFCheckpoint, open_gguf
from .schemes import plain_config, safetensors_weights
from .tensors import LogicalTensor, PlainTensor

_SIDE_FILE_MOST_BYTES = 64 << 20
_WEIGHT_FILE = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)(\.index\.json)?$")
_PREPARING = re.compile(
    r"(tokenizer.*|special_tokens_map|added_tokens|vocab|merges|(video_)?preprocessor_config|processor_config"
    r"|chat_template)\.(json|txt|jinja|model)"
)
_TOKENIZER = "tokenizer_config.json"
_NEEDED = ("config.json", "tokenizer.json", _TOKENIZER, "preprocessor_config.json")


def open_checkpoint(path: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    """Open a checkpoint directory, an adapter directory, a directory of GGUF files, or a `.gguf` file.

    An id of the hub stands for its directory in the hub cache (see `local_path`). An already opened checkpoint is
    returned unchanged.

    Raises:
        CheckpointError: it is none of these, or in an unsupported format.
    """
    if isinstance(path, Checkpoint):
        return path
    path = local_path(path)
    if path.suffix == SUFFIX and path.is_file():
        checkpoint: Checkpoint = open_gguf(path)
    elif _is_adapter(path):
        settings = read_adapter_config(path)
        base = base_directory(path, settings)
        if _is_adapter(base):
            raise CheckpointError(f"{base}: an adapter on an adapter; merge this one with peft first", path=base)
        checkpoint = open_adapter(path, open_checkpoint(base), settings)
    elif path.is_dir() and not _has_safetensors(path) and any(path.glob(f"*{SUFFIX}")):
        checkpoint = open_gguf(path)
    else:
        checkpoint = Checkpoint.open(path)
    weights_of(checkpoint)  # rejects unsupported formats
    return checkpoint


def weights_of(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Return the weights of a checkpoint by the model's names, without reading values.

    For a packed checkpoint, return its tensors as stored.

    Raises:
        CheckpointError: they are stored in an unsupported format.
    """
    if isinstance(checkpoint, AdapterCheckpoint):
        return checkpoint.weights(weights_of(checkpoint.base))
    if isinstance(checkpoint, GGUFCheckpoint):
        return checkpoint.weights()
    if checkpoint.packed:
        return {name: PlainTensor(extent) for name, extent in checkpoint.tensors.items()}
    return safetensors_weights(checkpoint)


def needs_packing(checkpoint: Checkpoint) -> bool:
    """Return whether weights cannot be paged from their files: they are quantized, or merged as they are read."""
    if checkpoint.packed:
        return False
    if isinstance(checkpoint, AdapterCheckpoint | GGUFCheckpoint):
        return True
    return any(not isinstance(weight, PlainTensor) for weight in weights_of(checkpoint).values())


def config_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the `config.json` of the model once packed; `None`: the directory's file, unchanged."""
    config = plain_config(checkpoint.config)
    if type(checkpoint) is Checkpoint and config == checkpoint.config:
        return None
    return config


def side_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the small files that are not weights: configuration, tokenizer, processors.

    An adapter's own files take precedence over those of its base.
    """
    if isinstance(checkpoint, AdapterCheckpoint):
        files = {path.name: path for path in side_files(checkpoint.base)}
        own = (path for path in sorted(checkpoint.directory.iterdir()) if path.is_file())
        files |= {path.name: path for path in own if _PREPARING.fullmatch(path.name)}
        return list(files.values())
    return [
        path
        for path in sorted(checkpoint.directory.iterdir())
        if path.is_file() and not _WEIGHT_FILE.match(path.name) and os.path.getsize(path) <= _SIDE_FILE_MOST_BYTES
    ]


def files_directory(path: str | Path) -> Path:
    """Return the directory of a model's tokenizer and processors, for any path that `open_checkpoint` accepts.

    Raises:
        CheckpointError: the files are not beside a GGUF file, or an adapter's base is not on this machine.
    """
    path = local_path(path)
    if _is_adapter(path):
        with_own = (path / _TOKENIZER).is_file() and (path / CONFIG_FILE).is_file()
        return path if with_own else files_directory(base_directory(path, read_adapter_config(path)))
    directory = path.parent if path.suffix == SUFFIX and path.is_file() else path
    if directory.is_dir() and not _has_safetensors(directory) and any(directory.glob(f"*{SUFFIX}")):
        missing = [name for name in _NEEDED if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{directory}: the tokenizer is not read from GGUF files; put {', '.join(missing)} of the original "
                "model beside them",
                path=directory,
            )
    return directory


def _is_adapter(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file() and not _has_safetensors(path)


def _has_safetensors(directory: Path) -> bool:
    return any((directory / f"model.safetensors{end}").is_file() for end in ("", ".index.json"))
