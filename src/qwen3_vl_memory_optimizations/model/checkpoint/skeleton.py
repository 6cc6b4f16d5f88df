"""Build the transformers model without its weights, and decide which weights are managed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...compression import ROW_MULTIPLE, Codec, columns_of
from ...compression.kernels import fastest_dtype
from ...config import MemoryConfig
from ...errors import CheckpointError, CodecError
from ...paging import PAGE_BYTES
from ...pools import FRAME_BYTES, UNIT_BYTES
from ...storage import Checkpoint
from ..compat import causal_class, initialise, sees
from .compute_dtype import recall_bf16_cost
from .formats import config_of
from .tied_weights import untie_by_files

logger = logging.getLogger(__name__)

MANAGED_LEAST_BYTES = 16 * 1024
_VISION_MODELS = ("qwen3_vl", "qwen3_vl_moe")
_SUPPORTED = "Qwen3-VL and transformers' causal language models are supported"


@dataclass(frozen=True, slots=True)
class WeightSite:
    """A parameter and every module that holds it (tied weights have several).

    Attributes:
        name: its first name in the state dict, under which checkpoints store it.
        holders: (module, attribute) pairs.
        aliases: its other names; a checkpoint may use one of them.
        managed: a large matrix of a linear or embedding layer; the others stay ordinary tensors.
        vocabulary: an embedding, which is looked up row by row, or the head.
    """

    name: str
    holders: tuple[tuple[nn.Module, str], ...]
    shape: tuple[int, ...]
    managed: bool
    vocabulary: bool = False
    aliases: tuple[str, ...] = ()


def compute_dtype(stored: str, dtype: torch.dtype | None, memory_config: MemoryConfig) -> torch.dtype:
    """Return the compute dtype: the requested one; else fp32 for fp32 weights, or the fastest on this machine."""
    if dtype is None and stored in ("float32", "F32"):
        dtype = torch.float32
    if dtype is None or dtype == torch.bfloat16:
        recall_bf16_cost(memory_config)
    return fastest_dtype() if dtype is None else dtype


def compute_dtype_of(config: dict[str, Any], dtype: torch.dtype | None, memory_config: MemoryConfig) -> torch.dtype:
    """Return the compute dtype for a checkpoint with this `config.json` (see `compute_dtype`)."""
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return compute_dtype(stored, dtype, memory_config)


def build_skeleton(checkpoint: Checkpoint, compute_dtype: torch.dtype, model_class: Any = None) -> nn.Module:
    """Build the transformers model of a checkpoint on the meta device, with real computed buffers.

    Args:
        checkpoint: read for `config.json`, and to check whether tied weights are equal.
        compute_dtype: dtype of parameters and activations.
        model_class: a subclass of the checkpoint's class, to build instead of it.

    Raises:
        CheckpointError: this version of transformers has no text-generating model for the architecture, or
            `model_class` does not match it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    directory = checkpoint.directory
    changed = config_of(checkpoint)
    try:
        if changed is None:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
        else:  # with a quantization_config, transformers would build that quantizer's modules
            config = CONFIG_MAPPING[changed["model_type"]].from_dict(changed)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{directory}: transformers does not know the model type {checkpoint.config.get('model_type')!r}: {error}",
            path=directory,
        ) from error
    model = skeleton_of(config, compute_dtype, directory, model_class)
    untie_by_files(model, checkpoint)
    return model


def skeleton_of(
    config: Any, compute_dtype: torch.dtype, directory: Path | str = ".", model_class: Any = None
) -> nn.Module:
    """Build the model of a configuration on the meta device (see `build_skeleton`)."""
    named = _model_class(config, directory)
    model_class = model_class or named
    if not issubclass(model_class, named):
        raise CheckpointError(
            f"{directory}: a model of {named.__name__}; {model_class.__name__} is not derived from it", path=directory
        )
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=compute_dtype)
    materialize_buffers(model)
    model.eval()
    return model


def _model_class(config: Any, directory: Path | str) -> Any:
    import transformers

    if sees(config) and config.model_type not in _VISION_MODELS:
        architectures = ", ".join(getattr(config, "architectures", None) or ["none named"])
        raise CheckpointError(
            f"{directory}: model type {config.model_type!r} (architecture {architectures}) is another vision-language "
            f"model; {_SUPPORTED}. Use a Qwen3-VL checkpoint, or transformers for this one",
            path=directory,
        )
    for name in getattr(config, "architectures", None) or []:
        known = getattr(transformers, name, None)
        if known is not None and hasattr(known, "generate") and hasattr(known, "_from_config"):
            return known
    if not getattr(config, "architectures", None):
        if config.model_type == "qwen3_vl":
            return transformers.Qwen3VLForConditionalGeneration
        causal = causal_class(config)
        if causal is not None:
            return causal
    architectures = ", ".join(getattr(config, "architectures", None) or ["none named"])
    raise CheckpointError(
        f"{directory}: model type {config.model_type!r} (architecture {architectures}) does not generate text; "
        f"{_SUPPORTED}",
        path=directory,
    )


def materialize_buffers(model: nn.Module) -> None:
    """Compute the buffers that checkpoints do not store (rotary frequencies), left empty by the meta device."""
    for module in model.modules():
        computed = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not computed:
            continue
        for name in computed:
            module._buffers[name] = torch.empty_like(module.get_buffer(name), device="cpu")
        initialise(model, module)


def weight_sites(model: nn.Module, stored_itemsize: int = 2) -> list[WeightSite]:
    """Return the parameters in module order, which is the order of the first forward."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            key = id(parameter)
            names.setdefault(key, []).append(f"{prefix}.{attribute}" if prefix else attribute)
            parameters[key] = parameter
            holders.setdefault(key, []).append((module, attribute))
    sites = []
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    for key, (name, *aliases) in names.items():
        shape = tuple(parameters[key].shape)
        large = math.prod(shape) * stored_itemsize >= MANAGED_LEAST_BYTES
        managed = large and all(
            attribute == "weight" and isinstance(module, nn.Linear | nn.Embedding) for module, attribute in holders[key]
        )
        vocabulary = any(module is head or isinstance(module, nn.Embedding) for module, _ in holders[key])
        sites.append(WeightSite(name, tuple(holders[key]), shape, managed, vocabulary, tuple(aliases)))
    return sites


def put(site: WeightSite, tensor: torch.Tensor) -> None:
    """Assign a tensor to every holder of a parameter, so that tied weights stay one."""
    for module, attribute in site.holders:
        module._parameters[attribute] = tensor  # type: ignore[assignment]


def codec_for(
    site: WeightSite,
    dtype: torch.dtype,
    codec: Codec,
    create: Callable[[str], Codec],
    values: Callable[[], torch.Tensor],
) -> Codec:
    """Return the codec for a weight: `codec`, or the first of its fallbacks that supports the weight.

    Vocabulary matrices are the most sensitive: they never get a codec of very few bits.

    Args:
        site: a managed weight.
        dtype: its stored dtype.
        codec: the requested codec.
        create: creates a codec by name.
        values: returns the weight, for codecs that inspect it.
    """
    while True:
        if codec.supports(site.shape, dtype) and (codec.suits_vocabulary or not site.vocabulary):
            try:
                return codec.fit(values)
            except CodecError as error:
                logger.info("%s: %s; stored with %r", site.name, error, codec.fallback)
        codec = create(codec.fallback)


def rows_per_page(shape: tuple[int, ...], itemsize: int) -> int:
    """Return the rows of a matrix in a page of about `PAGE_BYTES`.

    Pages of whole frame units are cheapest to move; if the rows do not divide so, whole frames, else any size.
    """
    row_bytes = columns_of(shape) * itemsize
    n_pages = max(1, -(-shape[0] * row_bytes // PAGE_BYTES))
    rows = -(-shape[0] // n_pages)
    for granularity in (UNIT_BYTES, FRAME_BYTES, 1):
        multiple = math.lcm(granularity // math.gcd(granularity, row_bytes), ROW_MULTIPLE)
        if multiple * row_bytes <= PAGE_BYTES // 2 or granularity == 1:
            break
    return -(-rows // multiple) * multiple
