"""Detect the quantization that a checkpoint declares; unsupported formats are rejected by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ....errors import CheckpointError
from ....storage import CONFIG_FILE, Checkpoint
from .columnwise import awq_matrix, gptq_matrix
from .four_bit import four_bit_matrix
from .parts import Parts, Settings, UnreadParts, quantised_modules
from .rowwise import compressed_matrix, eight_bit_matrix, fp8_matrix
from .tensors import LogicalTensor, PlainTensor

READ = (
    "FP8, compressed-tensors (INT8, INT4, FP8), bitsandbytes (8-bit, NF4, FP4), GPTQ (2, 3, 4, 8 bits), AWQ (GEMM) "
    "and GGUF"
)
_REMEDY = f"use the original model in 16 bits, or one in a supported format: {READ}"
_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys that declare it in config.json; the last one is MLX's."""
_COMPRESSED = ("dense", "naive-quantized", "int-quantized", "float-quantized", "pack-quantized", "mixed-precision")

Format = Callable[[str, Parts, Settings], LogicalTensor]


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `config.json` without its quantization."""
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    for key, value in plain.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            plain[key] = {name: each for name, each in value.items() if name not in _KEYS}
    return plain


def safetensors_weights(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Return the weights of a checkpoint of safetensors files, by the model's names.

    A module is quantized if its parts are present; config.json defines their meaning.

    Raises:
        CheckpointError: they are quantized in an unsupported format, or one that config.json does not declare.
    """
    path = checkpoint.directory / CONFIG_FILE
    quantization = _declared(checkpoint.config, path)
    modules = quantised_modules(checkpoint.tensors)
    if quantization is None and modules:
        module, parts = next(iter(modules.items()))
        raise CheckpointError(
            f"{path}: has no quantization_config, but {len(modules)} modules are quantized, among them {module} (with "
            f"{', '.join(sorted(parts))}); take config.json from the source of the weights",
            path=path,
        )
    weights: dict[str, LogicalTensor] = {}
    if quantization is not None:
        matrix = _format(quantization, path)
        settings = Settings.of(checkpoint.config, quantization)
        for module, parts in modules.items():
            weights[f"{module}.weight"] = _matrix(matrix, module, parts, settings, quantization)
    taken = {extent.name for parts in modules.values() for extent in parts.values()}
    weights |= {name: PlainTensor(extent) for name, extent in checkpoint.tensors.items() if name not in taken}
    return weights


def _matrix(
    matrix: Format, module: str, parts: Parts, settings: Settings, quantization: Mapping[str, Any]
) -> LogicalTensor:
    try:
        return matrix(f"{module}.weight", parts, settings)
    except UnreadParts as error:
        path = next(iter(parts.values())).path
        raise CheckpointError(
            f"{path}: {module}: cannot be read as {_method(quantization)}: {error}; {_REMEDY}", path=path
        ) from error


def _declared(config: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    text = config.get("text_config")
    for table in (config, text if isinstance(text, Mapping) else {}):
        for key in _KEYS:
            if table.get(key):
                if not isinstance(table[key], Mapping):
                    raise CheckpointError(f"{path}: {key} is {table[key]!r}, not a JSON object; {_REMEDY}", path=path)
                if key == "compression_config":
                    return {"quant_method": "compressed-tensors", **table[key]}
                return {"quant_method": "mlx", **table[key]} if key == "quantization" else table[key]
    return None


def _method(quantization: Mapping[str, Any]) -> str:
    """Return the name of a method, in lower case; some tools write none."""
    method = quantization.get("quant_method")
    if not method:
        if "config_groups" in quantization:
            return "compressed-tensors"
        if "load_in_4bit" in quantization or "load_in_8bit" in quantization:
            return "bitsandbytes"
        return "mlx" if {"group_size", "bits"} <= quantization.keys() else "no quant_method"
    return str(method).lower()


def _format(quantization: Mapping[str, Any], path: Path) -> Format:
    """Return the function that reads weights of the declared method.

    Raises:
        CheckpointError: the method is not supported.
    """
    method = _method(quantization)
    if method in ("fp8", "fbgemm_fp8"):
        return fp8_matrix
    if method == "compressed-tensors":
        _require(quantization, path, "format", _COMPRESSED, default="dense")
        sparsity = quantization.get("sparsity_config") or {}
        _require(sparsity, path, "format", ("dense",), default="dense", what="compressed-tensors with sparsity")
        if (quantization.get("transform_config") or {}).get("config_groups"):
            raise _refusal(path, "compressed-tensors with transform_config (rotated weights)")
        return compressed_matrix
    if method == "bitsandbytes":
        return _bitsandbytes_matrix
    if method == "gptq":
        _require(quantization, path, "checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
        return gptq_matrix
    if method == "awq":
        key = next((key for key in ("version", "checkpoint_format", "format") if key in quantization), "version")
        _require(quantization, path, key, ("gemm",), default="gemm")
        if quantization.get("bits", quantization.get("w_bit", 4)) != 4:
            raise _refusal(path, f"awq with {quantization.get('bits', quantization.get('w_bit'))} bits")
        return awq_matrix
    raise _refusal(path, method)


def _bitsandbytes_matrix(name: str, parts: Parts, settings: Settings) -> LogicalTensor:
    return (eight_bit_matrix if "SCB" in parts else four_bit_matrix)(name, parts, settings)


def _require(
    table: Mapping[str, Any], path: Path, key: str, known: tuple[str, ...], *, default: str, what: str = ""
) -> None:
    value = str(table.get(key) or default).lower()
    if value not in known:
        raise _refusal(path, f"{what or _method(table)}, {key} {value!r}")


def _refusal(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: the weights are quantized with {what}, which is not read; {_REMEDY}", path=path)
