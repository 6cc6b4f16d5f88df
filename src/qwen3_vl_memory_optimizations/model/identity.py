"""`ModelIdentity`: what results of a model depend on besides its inputs, as a digest that is part of cache keys."""

from __future__ import annotations

import importlib.metadata
import uuid
from typing import Any

import torch

from ..cache import digest
from ..config import MemoryConfig
from ..paging import ManagedTensor, Pager, TensorEntry
from ..storage import Checkpoint
from .packing import CODECS_KEY

_SOURCE_KEY = "qwen3vl_mem.source"


class ModelIdentity:
    """Tells one model from another, and from itself after its weights were changed.

    Args:
        model: with its weights loaded.
        pager: owns the large ones.
        config: how they are stored and computed with.
        checkpoint: where they came from; `None`: from memory, so that nothing tells them from others but this process.
    """

    def __init__(self, model: Any, pager: Pager, config: MemoryConfig, checkpoint: Checkpoint | None) -> None:
        self._process = uuid.uuid4().hex
        self._source = None
        if checkpoint is not None:
            # With codec `auto` a plan can be edited: the same source, other codecs.
            codecs = checkpoint.metadata.get(CODECS_KEY, "")
            self._source = digest(checkpoint.metadata.get(_SOURCE_KEY) or checkpoint.fingerprint(), codecs)
        self._settings = (
            config.weight_codec(),
            config.fuses_modules(),
            str(model.dtype),
            *(importlib.metadata.version(name) for name in ("torch", "transformers")),
            torch.backends.cpu.get_cpu_capability(),
        )
        self._pager = pager
        parts = (model, getattr(getattr(model, "model", None), "visual", None))
        self._first_writes = {id(part): self._writes(part) for part in parts if part is not None}

    def of(self, part: torch.nn.Module, *settings: Any) -> str | None:
        """Return the digest of a part of the model.

        Args:
            part: the model or its vision tower, whose results are kept.
            settings: what else they depend on, as JSON.

        Returns:
            `None` where results cannot be told apart, and must not be kept: somebody holds views of weights and may
            write to them, hooks change what modules return, or gradients are asked for.
        """
        if part.training or any(map(_may_change, part.modules())):
            return None
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in part.parameters()):
            return None
        if any(entry is not None and entry.aliased for entry in map(self._entry, part.parameters())):
            return None
        writes = self._writes(part) - self._first_writes[id(part)]
        source = self._source if self.persists(part) else [self._process, writes]
        return digest(source, *self._settings, *settings)

    def persists(self, part: torch.nn.Module) -> bool:
        """Return whether another process can come to the same digest: the weights are those of a checkpoint."""
        return self._source is not None and self._writes(part) == self._first_writes[id(part)]

    def _writes(self, part: torch.nn.Module) -> int:
        """Return how often the weights of a part were written to, those before this model was loaded included."""
        return sum(
            entry.writes if entry is not None else 0 if parameter.is_inference() else parameter._version
            for parameter in part.parameters()
            for entry in [self._entry(parameter)]
        )

    def _entry(self, parameter: torch.Tensor) -> TensorEntry | None:
        if not isinstance(parameter, ManagedTensor):
            return None
        return self._pager.entries.get(parameter.tensor_id)


def _may_change(module: torch.nn.Module) -> bool:
    """Whether a module has a hook that may return something else; those of this library say that they do not."""
    return any(not getattr(hook, "changes_nothing", False) for hook in module._forward_hooks.values())
