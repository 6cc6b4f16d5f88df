"""Identify the model by a digest of all that its results depend on besides inputs; part of cache keys."""

from __future__ import annotations

import importlib.metadata
import uuid
from dataclasses import dataclass
from typing import Any

import torch

from ..._version import __version__
from ...cache import digest
from ...config import MemoryConfig
from ...paging import Pager
from ...storage import Checkpoint
from ..checkpoint.packing import CODECS_KEY
from .model_state import ModelState, text_of

_SOURCE_KEY = "qwen3vl_mem.source"


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity that results of a model, or of a part of it, belong to.

    Attributes:
        digest: of everything they depend on besides inputs.
        persists: another process can derive the same digest, with the same results.
    """

    digest: str
    persists: bool


class ModelIdentity:
    """Distinguishes models from each other, and from their own state before a change.

    The model is compared with its initial state. If its code changed, its results cannot be identified. If only values
    changed, results are valid within this process. If nothing changed, they belong to the checkpoint.

    Args:
        model: with its weights loaded.
        pager: owns the large weights.
        config: how they are stored and computed with.
        checkpoint: source of the weights; `None`: from memory, so the identity is valid in this process only.
    """

    def __init__(self, model: Any, pager: Pager, config: MemoryConfig, checkpoint: Checkpoint | None) -> None:
        self._process = uuid.uuid4().hex
        self._source = None
        if checkpoint is not None:
            # With codec `auto` a plan can be edited: same source, other codecs.
            codecs = checkpoint.metadata.get(CODECS_KEY, "")
            self._source = digest(checkpoint.metadata.get(_SOURCE_KEY) or checkpoint.fingerprint(), codecs)
        self._settings = (
            config.weight_codec(),
            config.fuses_modules(),
            str(model.dtype),
            text_of(model.config),
            __version__,
            *(importlib.metadata.version(name) for name in ("torch", "transformers")),
            torch.backends.cpu.get_cpu_capability(),
        )
        self._model, self._pager = model, pager
        self._first: dict[int, ModelState] = {}
        self._trusted = False

    def begin(self) -> None:
        """Record the initial model: everything of this package is attached, and no caller has it yet."""
        parts = (self._model, getattr(getattr(self._model, "model", None), "visual", None))
        self._first = {id(part): ModelState(part, self._pager) for part in parts if part is not None}
        self._trusted = self._source is not None and self._first[id(self._model)].is_trusted()

    def of(self, part: torch.nn.Module, *settings: Any) -> Identity | None:
        """Return the identity of a part of the model.

        Args:
            part: the model or its vision tower, whose results are kept.
            settings: other dependencies, as JSON.

        Returns:
            `None` if results cannot be identified and must not be kept: the part's code changed, hooks were added, a
            caller holds views of weights and may write to them, or gradients are required.
        """
        first = self._first.get(id(part))
        if first is None or any(module.training for module in part.modules()):
            return None
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in part.parameters()):
            return None
        now = ModelState(part, self._pager, first)
        if not now.known or not now.same_code(first):
            return None
        persists = self._trusted and now.values == first.values
        source = self._source if persists else [self._process, now.values]
        return Identity(digest(source, *self._settings, *settings), persists)
