"""Provide Qwen3-VL and its two parts as subclasses of the transformers classes, with managed weights (section 4.3).

Nothing is computed here. The classes are built without weights, on the meta device; `factory` or
`model.checkpoint.loading` add managed weights. Built inside `torch.device("meta")`, as the factory builds the skeleton
of a checkpoint, they stay without.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLTextModel, Qwen3VLVisionModel

from .config import MemoryConfig
from .errors import ConfigurationError
from .factory import create_optimized_model
from .model.checkpoint.loading import WeightLoader
from .model.checkpoint.skeleton import compute_dtype
from .model.closes_on_exit import ClosesOnExit
from .model.layers.forward_memory import text_bytes, vision_bytes, whole_prompt_bytes, with_heap
from .model.run.pieces import forward_size
from .optimizer import MemoryOptimizer
from .paging import ManagedTensor

_numbers = itertools.count()


class OptimizedVisionEncoder(Qwen3VLVisionModel):
    """The vision tower of Qwen3-VL with managed weights: `encoder(pixel_values, grid_thw)`.

    A separately built tower initializes its weights as transformers does; `load_state_dict` replaces them.

    Args:
        config: a `Qwen3VLConfig`, or its `vision_config`.
        memory_optimizer: owns the weights, and must outlive them.

    Raises:
        ConfigurationError: `memory_optimizer` is not a `MemoryOptimizer`.
        MemoryBudgetExceeded: its budget cannot hold the weights.
    """

    memory_optimizer: MemoryOptimizer

    def __init__(self, config: Any, memory_optimizer: MemoryOptimizer | None) -> None:
        whole = config if hasattr(config, "vision_config") else Qwen3VLConfig(vision_config=config)
        config = whole.vision_config
        with _on_meta(config, config.dtype or whole.dtype, getattr(memory_optimizer, "config", None)) as fills:
            super().__init__(config)

        def activation_bytes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
            patches = int((args[0] if args else kwargs["hidden_states"]).shape[0])
            return with_heap(vision_bytes(whole, patches=patches, itemsize=self.dtype.itemsize))

        if fills:
            _fill(self, memory_optimizer, activation_bytes)


class OptimizedTextDecoder(Qwen3VLTextModel):
    """The text decoder of Qwen3-VL with managed weights: `decoder(input_ids, attention_mask=...)`.

    A separately built decoder initializes its weights as transformers does; `load_state_dict` replaces them.

    Args:
        config: a `Qwen3VLConfig`, or its `text_config`.
        memory_optimizer: owns the weights, and must outlive them.

    Raises:
        ConfigurationError: `memory_optimizer` is not a `MemoryOptimizer`.
        MemoryBudgetExceeded: its budget cannot hold the weights.
    """

    memory_optimizer: MemoryOptimizer

    def __init__(self, config: Any, memory_optimizer: MemoryOptimizer | None) -> None:
        whole, config = config, getattr(config, "text_config", config)
        with _on_meta(config, config.dtype or whole.dtype, getattr(memory_optimizer, "config", None)) as fills:
            super().__init__(config)

        def activation_bytes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
            batch, length, past = forward_size(args, kwargs)
            size = {"tokens": batch * length, "cached_tokens": batch * past, "itemsize": self.dtype.itemsize}
            return with_heap(text_bytes(config, logit_rows=0, **size) + whole_prompt_bytes(config, **size))

        if fills:
            _fill(self, memory_optimizer, activation_bytes)


class OptimizedVisionLanguageModel(ClosesOnExit, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with managed weights, used like the transformers class from which it derives.

    The constructor initializes weights as transformers does, one module at a time; `from_pretrained` loads those of a
    checkpoint. The end of a `with` block closes the optimizer.

    Args:
        config: a `Qwen3VLConfig`. Its `memory_optimization_config` (the keys of `MemoryConfig`, as a dict or an
            instance) applies; without it the defaults do.

    Raises:
        ConfigurationError: an unknown key, a wrong type or an invalid size.
        MemoryBudgetExceeded: the budget is too small to run.
    """

    def __init__(self, config: Any) -> None:
        if not isinstance(config, Qwen3VLConfig):
            raise ConfigurationError(f"config: expected a Qwen3VLConfig, got {type(config).__name__}")
        with _on_meta(config, config.dtype, getattr(config, "memory_optimization_config", None)) as fills:
            super().__init__(config)
            self.model.visual = OptimizedVisionEncoder(config, None)
            self.model.language_model = OptimizedTextDecoder(config, None)
            self.tie_weights()
        self.loss_type = "ForConditionalGeneration"  # transformers derives it from the class name
        if fills:
            create_optimized_model(self)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        memory_config: Mapping[str, Any] | MemoryConfig | None = None,
        **kwargs: Any,
    ) -> OptimizedVisionLanguageModel:
        """Return the model of a Qwen3-VL checkpoint.

        Args:
            pretrained_model_name_or_path: a Hugging Face directory or hub id.
            memory_config: as for `create_optimized_model`; default: `memory_optimization_config` in `config.json`.
            kwargs: the other arguments of `create_optimized_model`.

        Raises:
            CheckpointError: the checkpoint cannot be used, or is not a Qwen3-VL checkpoint.
            ConfigurationError: an unknown key, a wrong type or an invalid size.
            MemoryBudgetExceeded: the budget is too small to run; nothing was loaded.
        """
        model: OptimizedVisionLanguageModel = create_optimized_model(
            pretrained_model_name_or_path, memory_config, model_class=cls, **kwargs
        )
        return model

    @property
    def memory_optimizer(self) -> MemoryOptimizer:
        """The owner of the weights."""
        return self.encoder.memory_optimizer

    @memory_optimizer.setter
    def memory_optimizer(self, optimizer: MemoryOptimizer) -> None:
        self.encoder.memory_optimizer = self.decoder.memory_optimizer = optimizer

    @property
    def encoder(self) -> OptimizedVisionEncoder:
        """The vision tower in use, `model.visual`."""
        return self.model.visual

    @property
    def decoder(self) -> OptimizedTextDecoder:
        """The text decoder in use, `model.language_model`."""
        return self.model.language_model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save decoded weights and configuration, as a checkpoint of the transformers class."""
        super().save_pretrained(save_directory, **kwargs)
        self.config.architectures = [Qwen3VLForConditionalGeneration.__name__]
        self.config.save_pretrained(save_directory)


@contextmanager
def _on_meta(
    config: Any, stored: torch.dtype | None, memory_config: Mapping[str, Any] | MemoryConfig | None
) -> Iterator[bool]:
    """Build without weights, in the compute dtype, and set that dtype in the configuration.

    Yields whether weights must be added afterwards; false while an outer skeleton is being built.
    """
    if torch.get_default_device().type == "meta":
        yield False
        return
    settings = MemoryConfig.from_mapping(memory_config)
    dtype = compute_dtype(str(stored or torch.float32).removeprefix("torch."), None, settings)
    for each in (config, *(getattr(config, name) for name in config.sub_configs)):
        each.dtype = dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield True
    finally:
        torch.set_default_dtype(before)


def _fill(
    part: Any, optimizer: MemoryOptimizer | None, activation_bytes: Callable[[tuple[Any, ...], dict[str, Any]], int]
) -> None:
    """Initialize the weights of a separately built part, and reserve memory before each of its forwards."""
    if not isinstance(optimizer, MemoryOptimizer):
        raise ConfigurationError(f"memory_optimizer: expected a MemoryOptimizer, got {type(optimizer).__name__}")
    pager = optimizer.pager
    loader = WeightLoader(pager, part.dtype, model_name=f"{type(part).__name__}-{next(_numbers)}")
    loader.from_memory(part, optimizer.config.unmeasured_codec(), initialize=True)
    for weight in part.parameters():
        if isinstance(weight, ManagedTensor):
            weakref.finalize(weight, pager.free_later, weight.tensor_id)
    if optimizer.config.ram_budget is not None:
        part.register_forward_pre_hook(
            lambda module, args, kwargs: optimizer.reserve_activations(activation_bytes(args, kwargs)),
            with_kwargs=True,
        )
    pager.refit()
    part.eval()
    part.memory_optimizer = optimizer
