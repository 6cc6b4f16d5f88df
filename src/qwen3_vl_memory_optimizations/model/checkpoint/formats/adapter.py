"""Read PEFT LoRA adapters, merged into their base as weights are read."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ....errors import CheckpointError
from ....storage import Checkpoint, SafetensorsHeader, TensorExtent, read_header
from ...sources.hub import hub_name, local_path
from .tensors import Files, LogicalTensor, PlainTensor, Rows

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.(?:default\.)?weight")
_EMBEDDING_FACTOR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<factor>[AB])(?:\.default)?")
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "LoRA with its own biases",
    "fan_in_fan_out": "LoRA of transposed weights (fan_in_fan_out)",
    "layer_replication": "LoRA with replicated layers",
    "trainable_token_indices": "LoRA with trained tokens",
    "target_parameters": "LoRA of parameters outside linear layers (target_parameters)",
    "alora_invocation_tokens": "activated LoRA",
}
_REMEDY = "merge it with peft (merge_and_unload), save the result, and pass its directory"


class AdapterCheckpoint(Checkpoint):
    """A base and an adapter. Created by `open_adapter`.

    Attributes:
        base: the checkpoint the adapter was trained on.
        settings: `adapter_config.json`.
    """

    def __init__(self, directory: Path, base: Checkpoint, settings: dict[str, Any], header: SafetensorsHeader) -> None:
        tensors = {**base.tensors, **{f"{ADAPTER_FILE}:{name}": each for name, each in header.tensors.items()}}
        said = {**base.config, "_adapter": settings}  # both are part of the fingerprint
        super().__init__(directory, json.dumps(said).encode(), [*base.headers, header], tensors)
        self.config = base.config
        self.base, self.settings, self._header = base, settings, header

    def weights(self, base: Mapping[str, LogicalTensor]) -> dict[str, LogicalTensor]:
        """Return the weights of the base with the adapter merged.

        Args:
            base: the weights of the base.

        Raises:
            CheckpointError: a tensor of the adapter has no counterpart in the base, or does not fit.
        """
        weights = dict(base)
        pairs: dict[tuple[str, bool], dict[str, TensorExtent]] = {}
        for stored, extent in self._header.tensors.items():
            name = stored.removeprefix(_PREFIX).replace(".base_layer.", ".")
            match = _FACTOR.fullmatch(name) or _EMBEDDING_FACTOR.fullmatch(name)
            if match:
                pairs.setdefault((match["module"], "lora_embedding" in name), {})[match["factor"]] = extent
            elif name in base or name == _HEAD:
                weights[name] = PlainTensor(extent, name)  # trained whole (modules_to_save)
            else:
                raise self._error(f"the tensor {stored!r} matches nothing in the base {self.base.directory}")
        for (module, embedding), factors in pairs.items():
            name = f"{module}.weight"
            adapted = weights.get(name)
            if adapted is None and name == _HEAD:  # tied in the base: only the head is adapted
                adapted = next((weight for key, weight in base.items() if key.endswith(_EMBEDDING)), None)
            if adapted is None:
                raise self._error(f"{module} is adapted, but the base {self.base.directory} has no {name}")
            if set(factors) != {"A", "B"}:
                raise self._error(f"{module} has only one of lora_A and lora_B")
            weights[name] = MergedMatrix(name, adapted, factors["A"], factors["B"], self._scale(module), embedding)
        self._keep_head(weights, base)
        return weights

    def _keep_head(self, weights: dict[str, LogicalTensor], base: Mapping[str, LogicalTensor]) -> None:
        """Keep the base's values for a tied head when only the embedding changed, as peft does."""
        name = next((name for name in base if name.endswith(_EMBEDDING)), None)
        tied = bool(self.settings.get("ensure_weight_tying"))
        if name is not None and weights[name] is not base[name] and _HEAD not in weights and not tied:
            weights[_HEAD] = copy.copy(base[name])
            weights[_HEAD].name = _HEAD

    def _scale(self, module: str) -> float:
        rank = _of_module(self.settings.get("rank_pattern"), module, self.settings.get("r", 8))
        alpha = _of_module(self.settings.get("alpha_pattern"), module, self.settings.get("lora_alpha", 8))
        if not rank or rank < 0:
            raise self._error(f"the rank of {module} is {rank!r}")
        return float(alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank))

    def _error(self, what: str) -> CheckpointError:
        remedy = "set base_model_name_or_path to the directory of the model it was trained on"
        return CheckpointError(f"{self.directory / ADAPTER_CONFIG}: {what}; {remedy}", path=self.directory)


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Return `adapter_config.json`.

    Raises:
        CheckpointError: it cannot be read, or describes an unsupported adapter.
    """
    path = directory / ADAPTER_CONFIG
    try:
        settings = json.loads(path.read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); download the adapter again", path=path) from error
    method = str(settings.get("peft_type") or "none named")
    if method.upper() != "LORA":
        raise _refusal(path, f"a PEFT adapter of type {method}")
    for key, what in _REFUSED.items():
        if settings.get(key):
            raise _refusal(path, what)
    if settings.get("bias", "none") != "none":
        raise _refusal(path, f"LoRA with trained biases (bias {settings['bias']!r})")
    return settings


def base_directory(directory: Path, settings: Mapping[str, Any]) -> Path:
    """Return the path of an adapter's base.

    Raises:
        CheckpointError: it is not on this machine.
    """
    path = directory / ADAPTER_CONFIG
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{path}: base_model_name_or_path is missing; set it to the directory of the model the adapter was "
            "trained on",
            path=path,
        )
    for base in (Path(name), directory / name):
        if base.exists() and base.resolve() != directory.resolve():
            return base
    reason = ""
    if hub_name(name) is not None:
        try:
            return local_path(name)
        except CheckpointError as error:
            reason = f" ({error})"
    raise CheckpointError(
        f"{path}: the base {name!r} of this adapter is not on this machine{reason}; download it, or set "
        "base_model_name_or_path to its directory",
        path=path,
    )


def open_adapter(directory: Path, base: Checkpoint, settings: dict[str, Any]) -> AdapterCheckpoint:
    """Return the checkpoint of an adapter on its base.

    Raises:
        CheckpointError: the weights are missing or pickled, or the base is packed.
    """
    path = directory / ADAPTER_FILE
    if not path.is_file():
        found = f"the weights are in {_PICKLED}, which is not read because loading it can run code"
        what = found if (directory / _PICKLED).is_file() else f"there is no {ADAPTER_FILE}"
        raise CheckpointError(f"{directory}: {what}; load the adapter with peft and save it again", path=directory)
    if base.packed:
        raise CheckpointError(
            f"{directory / ADAPTER_CONFIG}: the base {base.directory} is a packed checkpoint; set "
            "base_model_name_or_path to the directory it was packed from",
            path=directory,
        )
    return AdapterCheckpoint(directory, base, settings, read_header(path))


class MergedMatrix(LogicalTensor):
    """A weight `W + scale * B A`, in the dtype of `W`.

    Args:
        name: of the weight.
        base: `W`, `[out, in]`.
        a: `[rank, in]`; for an embedding `[rank, rows]`.
        b: `[out, rank]`; for an embedding `[columns, rank]`.
        scale: of the product.
        embedding: rows are those of a vocabulary, and the product is transposed.
    """

    def __init__(
        self, name: str, base: LogicalTensor, a: TensorExtent, b: TensorExtent, scale: float, embedding: bool
    ) -> None:
        super().__init__(name, a.path, base.shape, base.dtype)
        left, right = (b.shape, a.shape) if not embedding else (a.shape[::-1], b.shape[::-1])
        if len(a.shape) != 2 or len(b.shape) != 2 or left[1] != right[0] or (left[0], right[1]) != base.shape:
            raise CheckpointError(
                f"{a.path}: the factors of {name}, {list(a.shape)} and {list(b.shape)}, do not form a matrix of "
                f"{list(base.shape)}; the adapter belongs to another model",
                path=a.path,
            )
        self._base, self._a, self._b, self._scale, self._embedding = base, a, b, scale, embedding
        self.held_bytes = base.held_bytes + 4 * (math.prod(a.shape) + math.prod(b.shape))

    def reader(self, files: Files) -> Rows:
        """Return a function that merges rows in fp32; it holds both factors."""
        read = self._base.reader(files)
        a, b = files.whole(self._a).to(torch.float32), files.whole(self._b).to(torch.float32)
        left, right = (a.T, b.T) if self._embedding else (b, a)
        left = left * self._scale
        return lambda start, stop: torch.addmm(read(start, stop).to(torch.float32), left[start:stop], right)


def _of_module(pattern: Any, module: str, otherwise: Any) -> Any:
    """Return the setting of a module: that of the first pattern that its name ends with, else the common one."""
    for key, value in (pattern if isinstance(pattern, Mapping) else {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return otherwise


def _refusal(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what} is not supported, only LoRA is; {_REMEDY}", path=path)
