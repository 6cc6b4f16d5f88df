"""Run `save_pretrained` within the budget: weights are decoded some rows at a time, directly into the files."""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import InsufficientDiskSpaceError, format_bytes
from ...paging import ManagedTensor
from ...storage import write_header
from ..compat import tied_names
from .packing import SAFETENSORS_DTYPES

_PATTERN, _INDEX = "model{suffix}.safetensors", "model.safetensors.index.json"
_FILE_BYTES = "50GB"
"""The largest file, as in transformers."""
_FOR_TRANSFORMERS = ("state_dict", "push_to_hub", "variant", "distributed_checkpoint")
"""Arguments for which transformers writes the weights itself, with one file's weights in memory at once."""


def attach_saving(model: Any) -> None:
    """Replace `save_pretrained` of a model by one that holds only a few rows of decoded weights at a time."""
    plain = getattr(model, "save_pretrained", None)
    if plain is None:
        return
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        by_transformers = any(given.get(name) for name in _FOR_TRANSFORMERS) or not given.get("is_main_process", True)
        if by_transformers or getattr(model, "_hf_peft_config_loaded", False):
            plain(*args, **kwargs)
            return
        state = _weights(model, keeps_names=not given.get("save_original_format", True))
        directory = Path(given["save_directory"])
        _require_space(directory, state)
        plain(*args, **{**kwargs, "state_dict": {}})  # everything except the weights
        if directory.is_dir():
            _write(directory, state, given.get("max_shard_size", _FILE_BYTES))

    model.save_pretrained = save_pretrained


def _weights(model: Any, *, keeps_names: bool) -> dict[str, torch.Tensor]:
    """Return the tensors to save, by their names in the file; tied weights once."""
    from transformers.core_model_loading import revert_weight_conversion

    state = dict(model.state_dict())
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    tied = tied_names(model)
    saved: set[int] = set()
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False), key=lambda each: each[0] in tied):
        if id(parameter) in saved:
            state.pop(name, None)
        saved.add(id(parameter))
    return state if keeps_names else dict(revert_weight_conversion(model, state))


def _require_space(directory: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Reject a save that the disk cannot hold, before touching a file."""
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    required = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    replaced = sum(file.stat().st_size for file in directory.glob("model*.safetensors")) if directory.is_dir() else 0
    available = shutil.disk_usage(there).free + replaced
    if required > available:
        raise InsufficientDiskSpaceError(
            f"{directory}: the weights need {format_bytes(required)}, and {format_bytes(available)} are free there; "
            "free disk space, or save elsewhere",
            path=directory,
            required_bytes=required,
            available_bytes=available,
        )


def _write(directory: Path, state: dict[str, torch.Tensor], file_bytes: int | str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers.utils import logging

    sizes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}
    plan = split_torch_state_dict_into_shards(sizes, filename_pattern=_PATTERN, max_shard_size=file_bytes)
    for old in directory.glob("model*.safetensors"):
        if old.name not in plan.filename_to_tensors:
            old.unlink()  # left by an earlier save
    if not plan.is_sharded:
        (directory / _INDEX).unlink(missing_ok=True)
    total = sum(meta.numel() * meta.element_size() for meta in sizes.values())
    with logging.tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights") as progress:
        for file, names in plan.filename_to_tensors.items():
            partial = directory / f"{file}.partial"
            try:
                with open(partial, "wb") as out:
                    out.write(write_header({name: _described(sizes[name]) for name in names}, {"format": "pt"}))
                    for name in names:
                        for part in _parts(state[name]):
                            out.write(_bytes(part))
                            progress.update(part.numel() * part.element_size())
                os.replace(partial, directory / file)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _described(meta: torch.Tensor) -> tuple[str, tuple[int, ...], int]:
    return SAFETENSORS_DTYPES[meta.dtype], tuple(meta.shape), meta.numel() * meta.element_size()


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a tensor some rows at a time, in its dtype; each part is valid until the next is requested."""
    if isinstance(tensor, ManagedTensor):
        yield from tensor.row_parts()
    else:
        yield tensor.detach()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
