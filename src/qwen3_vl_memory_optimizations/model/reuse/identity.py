"""`ModelIdentity`: what results of a model depend on besides its inputs, as a digest that is part of cache keys."""

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
    """What the results of a model, or of a part of it, belong to.

    Attributes:
        digest: of all that they depend on besides inputs.
        persists: another process can come to the same digest, and to the same results.
    """

    digest: str
    persists: bool


class ModelIdentity:
    """Tells one model from another, and from itself after it was changed.

    A model is compared with itself as it was when it was made. With other code nothing is known of its results; with
    other values they are its own, in this process; where all is the same they are those of its checkpoint.

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
            text_of(model.config),
            __version__,
            *(importlib.metadata.version(name) for name in ("torch", "transformers")),
            torch.backends.cpu.get_cpu_capability(),
        )
        self._model, self._pager = model, pager
        self._first: dict[int, ModelState] = {}
        self._trusted = False

    def begin(self) -> None:
        """Note the model as it is: all that this package attaches to it is there, and nobody else had it yet."""
        parts = (self._model, getattr(getattr(self._model, "model", None), "visual", None))
        self._first = {id(part): ModelState(part, self._pager) for part in parts if part is not None}
        self._trusted = self._source is not None and self._first[id(self._model)].is_trusted()

    def of(self, part: torch.nn.Module, *settings: Any) -> Identity | None:
        """Return the identity of a part of the model.

        Args:
            part: the model or its vision tower, whose results are kept.
            settings: what else they depend on, as JSON.

        Returns:
            `None` where results cannot be told apart, and must not be kept: the code of the part is not what it was,
            hooks were added, somebody holds views of weights and may write to them, or gradients are asked for.
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
