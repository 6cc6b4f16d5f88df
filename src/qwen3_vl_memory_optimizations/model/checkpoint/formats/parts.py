"""Identify which tensors of a safetensors checkpoint are parts of a quantized weight, and of which one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....storage import TensorExtent

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>weight_scale_inv|weight_scale|weight_zero_point|weight_packed|weight_shape|weight_g_idx"
    r"|weight_global_scale|weight_scale_2|weight_format|SCB"
    r"|weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+|_data|_scale|_shift)"
    r"|qweight|qzeros|scales|biases|g_idx|W_q|codebooks|codes|meta|weight_blocks|weight_scales)"
)
_MARKS = (
    "weight_scale_inv", "weight_scale", "weight_packed", "weight_global_scale", "weight_scale_2", "SCB", "qweight",
    "W_q", "codebooks", "weight_blocks", "weight_scales",
)  # fmt: skip
"""Parts that no plain module has. The other parts count only beside one of these."""

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONFIG_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Parts = Mapping[str, TensorExtent]
"""Part -> its location: `qweight`, `weight.absmax`, ...; `weight` if the module has one."""


def declared_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """Return the dtype of the model that a `config.json` declares, or `None`."""
    text = config.get("text_config")
    for table in (config, text if isinstance(text, Mapping) else {}):
        declared = str(table.get("dtype") or table.get("torch_dtype") or "").removeprefix("torch.")
        if declared in CONFIG_FLOATS:
            return CONFIG_FLOATS[declared]
    return None


@dataclass(frozen=True, slots=True)
class Settings:
    """The declaration of quantized weights in config.json.

    Attributes:
        quantization: `quantization_config`.
        dtype: of the model, in which weights are read; `None`: not declared.
    """

    quantization: Mapping[str, Any]
    dtype: torch.dtype | None

    @classmethod
    def of(cls, config: Mapping[str, Any], quantization: Mapping[str, Any]) -> Settings:
        """Return the settings of a `config.json`."""
        return cls(quantization, declared_dtype(config))

    def dtype_beside(self, scales: TensorExtent) -> torch.dtype:
        """Return the dtype to read a weight in: the model's, else that of its scales, else bf16."""
        return self.dtype or FLOATS.get(scales.dtype, torch.bfloat16)


class UnreadParts(Exception):
    """The parts of a weight do not match the format; the message names the part and the reason."""


def quantised_modules(tensors: Mapping[str, TensorExtent]) -> dict[str, dict[str, TensorExtent]]:
    """Return the modules with quantized weights, and their parts."""
    found: dict[str, dict[str, TensorExtent]] = {}
    for name, extent in tensors.items():
        match = _PART.fullmatch(name)
        if match:
            found.setdefault(match["module"], {})[match["part"]] = extent
    marked = {
        module: parts
        for module, parts in found.items()
        if any(part in _MARKS or part.startswith("weight.") for part in parts)
    }
    for module, parts in marked.items():
        if f"{module}.weight" in tensors:
            parts["weight"] = tensors[f"{module}.weight"]
    return marked


def require(parts: Parts, *names: str) -> tuple[TensorExtent, ...]:
    """Return parts by name.

    Raises:
        UnreadParts: one is missing.
    """
    missing = [name for name in names if name not in parts]
    if missing:
        raise UnreadParts(f"{missing[0]} is missing beside {', '.join(sorted(parts))}")
    return tuple(parts[name] for name in names)


def allow(parts: Parts, *names: str) -> None:
    """Reject parts that are not among `names`: ignoring a value would change the weight.

    Raises:
        UnreadParts: there is another part.
    """
    other = sorted(parts.keys() - set(names))
    if other:
        raise UnreadParts(f"{other[0]} is not a part of this format")


def matrix_shape(extent: TensorExtent) -> tuple[int, int]:
    """Return the shape of a part that must be a matrix.

    Raises:
        UnreadParts: it is not.
    """
    if len(extent.shape) != 2 or 0 in extent.shape:
        raise UnreadParts(f"{extent.name} has shape {list(extent.shape)}, not a matrix")
    return extent.shape[0], extent.shape[1]
