"""Record what this package attaches to a model, so that it can be removed and the plain model is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import MemoryBudgetExceeded, format_bytes
from ..paging import ManagedTensor
from ..process import usable_memory
from .compat import text_config

_MISSING = object()
_TENSORS = ("_parameters", "_buffers", "_modules")
_WORKING_BYTES = 64 << 20


class Attachment:
    """The attributes and hooks added to models between construction and `complete`.

    Args:
        models: as built by transformers.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models = list(models)
        self._before = [(owner, *_state(owner)) for owner in self._owners()]
        self._attributes: list[tuple[Any, str, Any, Any]] = []
        self._hooks: list[tuple[dict[Any, Any], Any]] = []

    def _owners(self) -> list[Any]:
        """Return every object whose attributes are replaced: modules, and configurations that name an attention."""
        modules = [module for model in self._models for module in model.modules()]
        return modules + [text_config(model) for model in self._models]

    def complete(self) -> None:
        """Record what was added since construction."""
        for owner, attributes, hooks in self._before:
            now, hooks_now = _state(owner)
            for name, value in now.items():
                if attributes.get(name, _MISSING) is not value:
                    self._attributes.append((owner, name, attributes.get(name, _MISSING), value))
            for name, ids in hooks_now.items():
                added = ids - hooks.get(name, set())
                self._hooks += [(owner.__dict__[name], each) for each in added]
        self._before = []

    def require_memory(self) -> None:
        """Reject decoding weights that do not fit into memory, before anything is changed.

        Raises:
            MemoryBudgetExceeded: reports the bytes needed.
        """
        managed = {id(weight): weight for weight in self._managed()}.values()
        required = sum(weight.nbytes for weight in managed) + _WORKING_BYTES
        there = sum(page.n_bytes for weight in managed for page in weight.entry.pages if page.resident)
        available = usable_memory()[1] + there
        if required > available:
            raise MemoryBudgetExceeded(
                f"the plain model needs {format_bytes(required)}, and {format_bytes(available)} are free; save it with "
                "save_pretrained() instead, which decodes a few rows at a time",
                requested_bytes=required,
                available_bytes=available,
                budget_bytes=available,
                owner="release",
            )

    def _managed(self) -> list[ManagedTensor]:
        weights: list[Any] = [
            weight for model in self._models for module in model.modules() for weight in module._parameters.values()
        ]
        return [weight for weight in weights if isinstance(weight, ManagedTensor)]

    def undo(self) -> None:
        """Restore the models' decoded weights, forwards and methods. Hooks of others stay."""
        self._decode()
        for hooks, number in self._hooks:
            hooks.pop(number, None)
        for owner, name, old, new in reversed(self._attributes):
            if owner.__dict__.get(name, _MISSING) is not new:
                continue  # replaced since, by other code
            if old is _MISSING:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = old

    def _decode(self) -> None:
        """Replace managed weights by plain parameters, one by one; each managed one is freed."""
        plain: dict[int, nn.Parameter] = {}
        managed: dict[int, ManagedTensor] = {}  # held, so that no id is reused
        for model in self._models:
            for module in model.modules():
                parameters: dict[str, Any] = module._parameters
                for name, weight in parameters.items():
                    if isinstance(weight, ManagedTensor):
                        managed[id(weight)] = weight
                        if id(weight) not in plain:
                            plain[id(weight)] = nn.Parameter(_decoded(weight))
                        module._parameters[name] = plain[id(weight)]
                    elif weight is not None and weight.is_floating_point():
                        weight.requires_grad_(True)  # loading froze it


def _decoded(weight: ManagedTensor) -> torch.Tensor:
    values = torch.empty(weight.shape, dtype=weight.dtype)
    start = 0
    for part in weight.row_parts():
        values[start : start + len(part)] = part
        start += len(part)
    return values


def _state(owner: Any) -> tuple[dict[str, Any], dict[str, set[Any]]]:
    """Return the attributes of an owner, and the hook ids of each of its hook tables by name."""
    attributes, hooks = {}, {}
    for name, value in owner.__dict__.items():
        if "hooks" in name and isinstance(value, dict):
            hooks[name] = set(value)
        elif name not in _TENSORS:
            attributes[name] = value
    return attributes, hooks
