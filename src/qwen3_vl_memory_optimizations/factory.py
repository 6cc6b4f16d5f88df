"""Turn a checkpoint, a configuration or a model into one that runs within a budget (`create_optimized_model`)."""

from __future__ import annotations

import gc
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .compression import create_codec
from .config import MemoryConfig, jsonable
from .errors import CheckpointError, ConfigurationError, MemoryBudgetExceeded, format_bytes
from .model.attachment import Attachment
from .model.checkpoint.formats import needs_packing, open_checkpoint
from .model.checkpoint.import_files import ImportFiles
from .model.checkpoint.loading import WeightLoader
from .model.checkpoint.packing import Progress, find_packed
from .model.checkpoint.saving import attach_saving
from .model.checkpoint.skeleton import build_skeleton, compute_dtype, compute_dtype_of, skeleton_of
from .model.closes_on_exit import attach_closing, detach_closing
from .model.conversions import attach_conversions, is_offloaded
from .model.layers.decode_threads import FreeProcessors, attach_decode_threads
from .model.layers.decoder_layer import fuse_layers
from .model.layers.forward_memory import FIXED_RESERVE_BYTES, with_heap
from .model.layers.vision_block import step_vision_tower
from .model.reuse.identity import ModelIdentity
from .model.reuse.vision import attach_vision_reuse
from .model.run.assisted import ASSISTANT, attach_draft, require_draft
from .model.run.phases import attach_phases, attach_progress
from .model.run.response_times import attach_response_times
from .model.run.turns import Turns
from .model.sources.uses import note_use
from .optimizer import MemoryOptimizer
from .paging import PAGE_BYTES, BlockSpace
from .planning import pack_model
from .process import pause_collection, process_memory, release_library_pages, rss_bytes, tame_allocator, trim_heap
from .profiles import configure
from .storage import Checkpoint

_SETTINGS_KEY = "memory_optimization_config"
_LEAST_FRAMES_BYTES = 6 * PAGE_BYTES
_LIBRARIES_BYTES = 170 * 2**20
"""Memory that importing transformers' model classes and a tokenizer adds to a process with torch alone (measured)."""
_IMPORT_CACHE_BYTES = 128 * 2**20
"""Page cache of that import, charged to the control group until dropped (measured)."""
_WORTH_READING_BYTES = 256 * 2**20
_IMPORTING = "libraries to import"


def create_optimized_model(
    model_config: Any,
    memory_config: Mapping[str, Any] | MemoryConfig | None = None,
    *,
    assistant: Any = None,
    dtype: torch.dtype | None = None,
    model_class: Any = None,
    progress: Progress | None = None,
) -> Any:
    """Return a transformers model whose weights live in the memory hierarchy; use it exactly like the original.

    Args:
        model_config: a Hugging Face directory or hub id, a quantized checkpoint, an adapter or a GGUF file (see
            `docs/checkpoints.md`), a configuration such as `Qwen3VLConfig`, or a loaded model (whose weights are taken
            over; on the meta device they are initialized).
        memory_config: the keys of `MemoryConfig`, as a dict or an instance. Default: `memory_optimization_config` of
            the model's configuration, if present.
        assistant: a smaller model with the same vocabulary, in any form that `model_config` accepts, for speculative
            decoding in `generate`, within the same budget; `generate(..., assistant_model=None)` skips it.
        dtype: compute dtype. Default: fp32 for an fp32 checkpoint; otherwise bf16, or fp32 if that is at least twice
            as fast on this machine.
        model_class: the class to build from a checkpoint, derived from its transformers class.
        progress: called with a description, the bytes done and the total bytes while packing and loading.

    Returns:
        The model, with `.memory_optimizer` and, if one was given, `.assistant`. The end of a `with` block closes the
        optimizer; the model is unusable afterwards.

    Raises:
        ConfigurationError: an unknown key, a wrong type or an invalid size; an assistant with another vocabulary.
        MemoryBudgetExceeded: the budget is too small to run; nothing was loaded.
        CheckpointError: the checkpoint cannot be used.
    """
    config = configure(memory_config)
    peak_before_bytes = process_memory().peak_rss_bytes
    files = None if _is_imported() else ImportFiles(config.packed_dir)
    if files is not None:
        files.read_ahead()
    if isinstance(model_config, str | os.PathLike):
        model_config = open_checkpoint(model_config)
    carried = _carried_settings(model_config)
    if memory_config is None:
        config = configure(carried)
    source = _source_of(model_config, config, dtype, "model_config", model_class)
    draft = None if assistant is None else _source_of(assistant, config, source.dtype, "assistant")
    with ExitStack() as undo:
        # Importing transformers takes longer than reading the weights, so both happen at once.
        ready = all(each is None or each.is_packed for each in (source, draft))
        optimizer = _begin(source, config, progress, undo) if ready else None
        with pause_collection():
            source.build()
            if draft is not None:
                draft.build()
                require_draft(source.model, draft.model)
        for each in (source, draft):
            if each is not None:
                each.pack(config, progress)
        if optimizer is None:
            if config.ram_budget is not None:
                gc.collect()  # left by packing; imports leave nothing to collect
            _release_garbage(config)
            optimizer = undo.enter_context(MemoryOptimizer(memory_config=config))
        for each, name in ((source, ""), (draft, ASSISTANT)):
            if each is not None:
                loader = each.loader or WeightLoader(
                    optimizer.pager, each.dtype, progress, joins=config.fuses_modules(), model_name=name
                )
                each.load(loader, config)
        if files is not None:
            files.record()
            if config.ram_budget is not None:
                files.drop()
        model = _finish(source, draft, optimizer)
        optimizer.figures.peak_before_bytes = peak_before_bytes  # so that packing counts
        for each in (source, draft):
            if each is not None:
                note_use(config, each.given, each.checkpoint)
        undo.pop_all()
        return model


def _begin(source: _Source, config: MemoryConfig, progress: Progress | None, undo: ExitStack) -> MemoryOptimizer | None:
    """Start reading the weights of a packed checkpoint, if the budget has room for them besides the imports.

    Args:
        undo: receives the optimizer, to close it.
    """
    room = math.inf if config.ram_budget is None else config.ram_budget - rss_bytes()
    importing = 0 if _is_imported() else _LIBRARIES_BYTES + _IMPORT_CACHE_BYTES
    if room < importing + FIXED_RESERVE_BYTES + _WORTH_READING_BYTES:
        return None
    assert source.checkpoint is not None
    optimizer = undo.enter_context(MemoryOptimizer(memory_config=config))
    source.loader = WeightLoader(optimizer.pager, source.dtype, progress, joins=config.fuses_modules())
    source.order = source.loader.begin(source.checkpoint)
    if config.ram_budget is not None:
        optimizer.pager.reserve(_IMPORTING, importing)
        optimizer.reserve_activations(FIXED_RESERVE_BYTES)
    optimizer.pager.read_ahead(source.order, gently=importing > 0)  # the import reads hundreds of files
    return optimizer


def _is_imported() -> bool:
    """Return whether transformers' model classes are imported."""
    return "transformers.modeling_utils" in sys.modules


def _carried_settings(given: Any) -> Any:
    """Return the `memory_optimization_config` of a model argument, in a form that can be saved with it."""
    if isinstance(given, Checkpoint):
        return given.config.get(_SETTINGS_KEY)
    model_config = getattr(given, "config", given)
    settings = getattr(model_config, _SETTINGS_KEY, None)
    if isinstance(settings, Mapping | MemoryConfig):
        settings = jsonable(settings)
        setattr(model_config, _SETTINGS_KEY, settings)
    return settings


def _require_workable(config: MemoryConfig) -> None:
    """Reject an unknown codec, and a budget that cannot hold the process itself, before anything is loaded."""
    create_codec(config.unmeasured_codec())
    tame_allocator()
    least = rss_bytes() + (0 if _is_imported() else _LIBRARIES_BYTES) + FIXED_RESERVE_BYTES + _LEAST_FRAMES_BYTES
    if config.ram_budget is not None and config.ram_budget < least:
        raise MemoryBudgetExceeded(
            f"ram_budget of {format_bytes(config.ram_budget)} is too small: interpreter, torch, transformers and a "
            f"working set need at least {format_bytes(least)} here; raise the budget",
            requested_bytes=least,
            available_bytes=config.ram_budget,
            budget_bytes=config.ram_budget,
            owner="process",
        )


@dataclass(slots=True)
class _Source:
    """A model before loading, and the source of its weights.

    Attributes:
        dtype: compute dtype.
        model: a skeleton, once built, or (with neither `checkpoint` nor `draws`) a model in memory.
        checkpoint: holds the weights.
        given: the checkpoint that it is, or is the packed form of.
        model_class: the class to build from the checkpoint, if not its own.
        draws: initialize weights at random.
        loader: a loader that has already started.
        order: the weights it has started to read, in order.
    """

    dtype: torch.dtype
    model: Any = None
    checkpoint: Checkpoint | None = None
    given: Checkpoint | None = None
    model_class: Any = None
    draws: bool = False
    loader: WeightLoader | None = None
    order: list[str] = field(default_factory=list)

    @property
    def is_packed(self) -> bool:
        """Whether the weights can be loaded as stored, without encoding."""
        return self.checkpoint is not None and self.checkpoint.packed

    def build(self) -> None:
        """Build the model of a checkpoint, without its weights."""
        if self.checkpoint is not None:
            self.model = build_skeleton(self.checkpoint, self.dtype, self.model_class)

    def pack(self, config: MemoryConfig, progress: Progress | None) -> None:
        """Encode a checkpoint, if its weights need encoding and are not encoded yet."""
        if self.checkpoint is None or self.checkpoint.packed:
            return
        if config.weight_codec() != "none" or needs_packing(self.checkpoint):
            self.checkpoint = Checkpoint.open(pack_model(self.checkpoint, config, progress=progress))

    def load(self, loader: WeightLoader, config: MemoryConfig) -> None:
        """Load the weights into the model."""
        if self.checkpoint is None:
            loader.from_memory(self.model, config.unmeasured_codec(), initialize=self.draws)
        else:
            loader.from_checkpoint(self.model, self.checkpoint)
            _attach_generation_config(self.model, self.checkpoint.directory)


def _source_of(
    given: Any, config: MemoryConfig, dtype: torch.dtype | None, argument: str, model_class: Any = None
) -> _Source:
    """Validate a model argument, and that the budget can work."""
    if isinstance(given, str | os.PathLike):
        given = open_checkpoint(given)
    if isinstance(given, Checkpoint):
        _require_workable(config)
        dtype = compute_dtype_of(given.config, dtype, config)
        return _Source(dtype, checkpoint=_packed_already(given, config), given=given, model_class=model_class)
    if isinstance(given, nn.Module):
        if any(is_offloaded(module) for module in given.modules()):
            raise ConfigurationError(
                "the model is already offloaded by accelerate (it has _hf_hook); load it without device_map"
            )
        if hasattr(given, "memory_optimizer"):
            raise ConfigurationError("the model is already optimized; use it as it is, or release() it first")
        _require_workable(config)
        stored = str(getattr(given, "dtype", "")).removeprefix("torch.")
        return _Source(compute_dtype(stored, dtype, config), given)
    if hasattr(given, "model_type") and hasattr(given, "to_dict"):
        _require_workable(config)
        stored = str(getattr(given, "dtype", None) or "float32").removeprefix("torch.")
        dtype = compute_dtype(stored, dtype, config)
        return _Source(dtype, skeleton_of(given, dtype), draws=True)
    raise ConfigurationError(
        f"{argument}: expected a directory, a hub id, a transformers configuration or a loaded model, not "
        f"{type(given).__name__}"
    )


def _packed_already(checkpoint: Checkpoint, config: MemoryConfig) -> Checkpoint:
    """Return the packed form of a checkpoint, if requested and present; otherwise the checkpoint."""
    codec = config.weight_codec()
    if checkpoint.packed or (codec == "none" and not needs_packing(checkpoint)):
        return checkpoint
    packed = find_packed(checkpoint, codec, config)
    return checkpoint if packed is None else Checkpoint.open(packed)


def _attach_generation_config(model: Any, directory: Path) -> None:
    if (directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        path = directory / "generation_config.json"
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory)
        except Exception as error:  # transformers may raise anything on invalid content
            raise CheckpointError(
                f"{path}: cannot be used ({type(error).__name__}: {str(error)[:200]}); correct it, or remove it to use "
                "the defaults",
                path=path,
            ) from error


def _finish(source: _Source, draft: _Source | None, optimizer: MemoryOptimizer) -> Any:
    """Attach the optimizer, and hooks that reserve memory before each forward."""
    model = source.model
    _release_garbage(optimizer.config)
    limited = optimizer.config.ram_budget is not None
    if limited:
        optimizer.reserve_activations(FIXED_RESERVE_BYTES)
        optimizer.measure_process()
        optimizer.pager.reserve(_IMPORTING, 0)
    # These import transformers' caches, which come with its models.
    from .model.kv.store import KVStore
    from .model.reuse.prefix import PrefixReuse
    from .model.run.estimate import PromptEstimator, attach_estimator
    from .model.run.generation import Generation, attach_forward, cache_maker

    attachment = Attachment([model] if draft is None else [model, draft.model])
    processors, turn = FreeProcessors(), Turns()
    reuses = optimizer.config.reuses_prefixes()
    generations: list[Generation] = []
    identity = vision = known_prompts = None
    if optimizer.cache is not None:
        identity = ModelIdentity(model, optimizer.pager, optimizer.config, source.checkpoint)

        def reserve(n_bytes: int) -> None:
            held = optimizer.pager.ledger.held_bytes("activations")
            optimizer.reserve_activations(max(held, with_heap(n_bytes)))

        vision = attach_vision_reuse(model, optimizer.cache, identity, reserve)
    changes = (None,) if draft is None else attach_draft(model, draft.model)
    models = (model,) if draft is None else (model, draft.model)
    for each, change in zip(models, changes, strict=True):
        if optimizer.config.fuses_modules():
            fuse_layers(each)
            attach_decode_threads(each, processors)
        step_vision_tower(each)
        is_main = each is model
        make_cache = cache_maker(each, optimizer.config.cache_codec(), optimizer.pager, reuses=reuses and is_main)
        runner, budget = attach_forward(each, optimizer, turn, make_cache, lowers=is_main)
        reuse = None
        if reuses and is_main and make_cache is not None and identity is not None and optimizer.cache is not None:
            store = KVStore(
                BlockSpace(optimizer.pager), optimizer.cache.l3_cache, optimizer.config.most_resting_bytes()
            )
            optimizer.keep_sequences(store)
            reuse = known_prompts = PrefixReuse(model, store, identity, vision, make_cache)
        generations.append(
            Generation(
                each,
                turn=turn,
                session=optimizer.generation if is_main else nullcontext,
                times=optimizer.figures.responses if is_main else None,
                change=change,
                budget=budget if is_main else None,
                pieces=runner,
                make_cache=make_cache,
                reuse=reuse,
            )
        )
        each.eval()
        each.memory_optimizer = optimizer
    for loaded, prefix in ((source, ""), (draft, f"{ASSISTANT}/")):
        if loaded is not None and loaded.checkpoint is not None and loaded.checkpoint.packed:
            optimizer.figures.packed_dirs[prefix] = loaded.checkpoint.directory
    optimizer.pager.refit()
    optimizer.pager.read_ahead(source.order)
    for generation in generations:
        generation.attach()
    if vision is not None:
        vision.wanted = generations[0].is_running
    for each in models:
        attach_conversions(each, optimizer)
        attach_saving(each)
    attach_phases(model, optimizer.lifecycle.enter_phase)
    responses = optimizer.figures.responses
    estimator = PromptEstimator(model, optimizer.config, reuse=known_prompts, vision=vision, cache=optimizer.cache)
    stats = optimizer.pager.stats
    attach_estimator(model, estimator, generations[0].is_running, lambda: stats.stall_s)
    optimizer.estimator = estimator
    attach_progress(model, responses.progress)
    attach_response_times(model, responses)  # last, to measure after all other hooks
    attach_closing(model)
    if identity is not None:
        identity.begin()
    attachment.complete()
    optimizer.attachment = attachment
    return model


def release(model: Any) -> Any:
    """Remove what `create_optimized_model` attached to a model, and close its optimizer; return the plain model.

    Weights become in-memory parameters that require gradients. Forwards, methods, hooks and the training mode are
    restored. Hooks registered by other code stay. A draft is released with its model.

    Args:
        model: from `create_optimized_model`; changed in place.

    Raises:
        ConfigurationError: it is not an optimized model.
        MemoryBudgetExceeded: memory has no room for the decoded weights; nothing was changed.
    """
    optimizer = getattr(model, "memory_optimizer", None)
    attachment = getattr(optimizer, "attachment", None)
    if optimizer is None or attachment is None:
        raise ConfigurationError(
            f"{type(model).__name__}: not an optimized model; pass one from create_optimized_model"
        )
    attachment.require_memory()
    attachment.undo()
    detach_closing(model)
    optimizer.attachment = None
    optimizer.close()
    return model


@contextmanager
def optimized(
    model: nn.Module, memory_config: Mapping[str, Any] | MemoryConfig | None = None, **options: Any
) -> Iterator[Any]:
    """Optimize a loaded model within a `with` block; it is restored afterwards, even on an exception (see `release`).

    Args:
        model: a transformers model in memory; changed in place.
        memory_config, options: as for `create_optimized_model`.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model: expected a loaded model, not {type(model).__name__}")
    create_optimized_model(model, memory_config, **options)
    try:
        yield model
    finally:
        release(model)


def _release_garbage(config: MemoryConfig) -> None:
    """Return memory left by importing and loading to the system, because within a budget it can hold weights."""
    trim_heap()
    if config.ram_budget is not None:
        release_library_pages()
