"""`create_optimized_model`: from a checkpoint, a configuration or a model to one that runs within a budget."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .compression.kernels import fastest_dtype
from .config import MemoryConfig, jsonable
from .errors import CheckpointError, ConfigurationError, MemoryBudgetExceeded, format_bytes
from .model.activations import FIXED_RESERVE_BYTES, estimate_activation_bytes, forward_size
from .model.loading import WeightLoader
from .model.packing import Progress, pack_checkpoint
from .model.skeleton import build_skeleton, skeleton_of
from .optimizer import MemoryOptimizer
from .paging import PAGE_BYTES
from .process import release_library_pages, rss_bytes, tame_allocator, trim_heap
from .storage import Checkpoint

_SETTINGS_KEY = "memory_optimization_config"
_LEAST_FRAMES_BYTES = 6 * PAGE_BYTES
_LIBRARIES_BYTES = 170 * 2**20
"""What importing transformers' model classes and a tokenizer adds to a process that has only torch (measured)."""


def create_optimized_model(
    model_config: Any,
    memory_config: Mapping[str, Any] | MemoryConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    model_class: Any = None,
    progress: Progress | None = None,
) -> Any:
    """Return a transformers model whose weights live in the memory hierarchy; it is used exactly like the original.

    Args:
        model_config: a Hugging Face directory or hub id, a configuration such as `Qwen3VLConfig`, or a loaded model
            (whose weights are taken over; on the meta device they are drawn).
        memory_config: the keys of `MemoryConfig`, as a dict or an instance. Default: `memory_optimization_config` of
            the model's configuration, where it has one.
        dtype: dtype of the computation. Default: fp32 for a checkpoint in fp32, else the faster of bf16 and fp32 on
            this machine.
        model_class: what to build of a checkpoint, where it is not the class of transformers but one derived from it.
        progress: called with a description, the bytes done and the bytes in all while packing and loading.

    Returns:
        The model, with `.memory_optimizer`.

    Raises:
        ConfigurationError: an unknown key, a wrong type or an impossible size.
        MemoryBudgetExceeded: the budget cannot work; nothing was loaded.
        CheckpointError: the checkpoint cannot be used.
    """
    config = MemoryConfig.from_mapping(memory_config)
    if isinstance(model_config, str | os.PathLike):
        model_config = local_directory(model_config)
    carried = _carried_settings(model_config)
    if memory_config is None:
        config = MemoryConfig.from_mapping(carried)
    if isinstance(model_config, str | os.PathLike):
        return _from_checkpoint(local_directory(model_config), config, dtype, progress, model_class)
    if isinstance(model_config, nn.Module):
        return _from_model(model_config, config, dtype)
    if hasattr(model_config, "model_type") and hasattr(model_config, "to_dict"):
        return _from_config(model_config, config, dtype)
    raise ConfigurationError(
        "model_config: expected a directory, a hub id, a transformers configuration or a loaded model, not "
        f"{type(model_config).__name__}"
    )


def _carried_settings(given: Any) -> Any:
    """Return `memory_optimization_config` of what was given for a model, in a form that can be saved with it."""
    if isinstance(given, Path):
        return Checkpoint.open(given).config.get(_SETTINGS_KEY)
    model_config = getattr(given, "config", given)
    settings = getattr(model_config, _SETTINGS_KEY, None)
    if isinstance(settings, Mapping | MemoryConfig):
        settings = jsonable(settings)
        setattr(model_config, _SETTINGS_KEY, settings)
    return settings


def local_directory(name: str | os.PathLike[str]) -> Path:
    """Return the directory of a checkpoint, fetching it from the hub where `name` is an id and not a path."""
    path = Path(name).expanduser()
    text = os.fspath(name)
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{text}: neither a directory here nor a model that the hub gives ({type(error).__name__}); "
            "download it and give its directory",
            path=path,
        ) from error


def _require_workable(config: MemoryConfig) -> None:
    """Refuse a budget that cannot hold the process itself, before anything is loaded."""
    tame_allocator()
    loaded = "transformers.modeling_utils" in sys.modules
    least = rss_bytes() + (0 if loaded else _LIBRARIES_BYTES) + FIXED_RESERVE_BYTES + _LEAST_FRAMES_BYTES
    if config.ram_budget is not None and config.ram_budget < least:
        raise MemoryBudgetExceeded(
            f"ram_budget of {format_bytes(config.ram_budget)} cannot work: interpreter, torch, transformers and a "
            f"working set take at least {format_bytes(least)} here",
            requested_bytes=least,
            available_bytes=config.ram_budget,
            budget_bytes=config.ram_budget,
            owner="process",
        )


def _compute_dtype(stored: str, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    return torch.float32 if stored in ("float32", "F32") else fastest_dtype()


def _from_checkpoint(
    directory: Path, config: MemoryConfig, dtype: torch.dtype | None, progress: Progress | None, model_class: Any
) -> Any:
    checkpoint = Checkpoint.open(directory)
    _require_workable(config)
    stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16")
    compute_dtype = _compute_dtype(stored, dtype)
    codec = config.weight_codec()
    model = build_skeleton(checkpoint.directory, checkpoint.config, compute_dtype, model_class)
    if codec != "none" and not checkpoint.packed:
        checkpoint = Checkpoint.open(pack_checkpoint(directory, codec=codec, config=config, progress=progress))
    _release_garbage(config)
    optimizer = MemoryOptimizer(memory_config=config)
    try:
        WeightLoader(optimizer.pager, compute_dtype, progress).from_checkpoint(model, checkpoint)
        _attach_generation_config(model, checkpoint.directory)
        return _finish(model, optimizer, compute_dtype)
    except BaseException:
        optimizer.close()
        raise


def _from_model(model: nn.Module, config: MemoryConfig, dtype: torch.dtype | None) -> Any:
    if hasattr(model, "_hf_hook") or any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ConfigurationError(
            "the model is already offloaded by accelerate (it has _hf_hook); load it without device_map"
        )
    if hasattr(model, "memory_optimizer"):
        raise ConfigurationError("the model is optimized already")
    _require_workable(config)
    compute_dtype = _compute_dtype(str(getattr(model, "dtype", "")).removeprefix("torch."), dtype)
    optimizer = MemoryOptimizer(memory_config=config)
    try:
        WeightLoader(optimizer.pager, compute_dtype).from_memory(model, config.weight_codec(), initialize=False)
        return _finish(model, optimizer, compute_dtype)
    except BaseException:
        optimizer.close()
        raise


def _from_config(model_config: Any, config: MemoryConfig, dtype: torch.dtype | None) -> Any:
    _require_workable(config)
    compute_dtype = _compute_dtype(str(getattr(model_config, "dtype", None) or "float32").removeprefix("torch."), dtype)
    model = skeleton_of(model_config, compute_dtype)
    _release_garbage(config)
    optimizer = MemoryOptimizer(memory_config=config)
    try:
        WeightLoader(optimizer.pager, compute_dtype).from_memory(model, config.weight_codec(), initialize=True)
        return _finish(model, optimizer, compute_dtype)
    except BaseException:
        optimizer.close()
        raise


def _attach_generation_config(model: Any, directory: Path) -> None:
    if (directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(directory)


def _finish(model: Any, optimizer: MemoryOptimizer, compute_dtype: torch.dtype) -> Any:
    """Attach the optimizer, and the hooks that reserve memory for each forward before it runs."""
    _release_garbage(optimizer.config)
    if optimizer.config.ram_budget is not None:
        optimizer.reserve_activations(FIXED_RESERVE_BYTES)
        _reserve_before_forwards(model, optimizer, compute_dtype.itemsize)
    optimizer.pager.refit()
    model.eval()
    model.memory_optimizer = optimizer
    return model


def _reserve_before_forwards(model: Any, optimizer: MemoryOptimizer, itemsize: int) -> None:
    def before_model(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        size = forward_size(module, args, kwargs)
        optimizer.reserve_activations(estimate_activation_bytes(module.config, itemsize=itemsize, **size))

    def before_vision(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # `generate` runs the vision tower ahead of the forward of the model; a forward runs it inside its own.
        patches = int((args[0] if args else kwargs["hidden_states"]).shape[0])
        size = {"tokens": 0, "logit_rows": 0, "cached_tokens": 0, "patches": patches}
        needed = estimate_activation_bytes(model.config, itemsize=itemsize, **size)
        optimizer.reserve_activations(max(needed, optimizer.pager.ledger.held_bytes("activations")))

    model.register_forward_pre_hook(before_model, with_kwargs=True)
    vision = getattr(getattr(model, "model", None), "visual", None)
    if vision is not None:
        vision.register_forward_pre_hook(before_vision, with_kwargs=True)


def _release_garbage(config: MemoryConfig) -> None:
    """Give back what importing and loading left behind: with a budget for the process each megabyte is weights."""
    gc.collect()
    trim_heap()
    if config.ram_budget is not None:
        release_library_pages()
