"""Attach a draft model for speculative decoding, so that `generate` uses it by default wherever transformers can.

The draft only proposes tokens; the model decides. With greedy search the answer is the model's own.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import ConfigurationError
from ..compat import CACHE_NAMES, OTHER_DECODING, cache_of

logger = logging.getLogger(__name__)

ASSISTANT = "assistant"

ChangeArguments = Callable[[dict[str, Any]], dict[str, Any]]
"""Returns the arguments that a `generate` runs with, given those of the call."""

_OTHER_CACHES = ("cache_implementation", *CACHE_NAMES)


def require_draft(model: Any, draft: Any) -> None:
    """Reject a draft whose vocabulary differs from the model's, and warn about one that cannot be faster.

    Raises:
        ConfigurationError: the vocabulary sizes differ, or the draft is the model itself.
    """
    if draft is model:
        raise ConfigurationError("assistant: the model cannot be its own draft; pass a smaller one")
    theirs, ours = (other.config.get_text_config().vocab_size for other in (draft, model))
    if theirs != ours:
        raise ConfigurationError(
            f"assistant: its vocabulary has {theirs} tokens and the model's has {ours}; pass a draft with the same one"
        )
    size, model_size = (sum(parameter.numel() for parameter in other.parameters()) for other in (draft, model))
    if size >= model_size:
        logger.warning(
            "the assistant has %d parameters, the model %d: a draft that is not smaller slows generation down",
            size,
            model_size,
        )


def attach_draft(model: Any, draft: Any) -> tuple[ChangeArguments, ChangeArguments]:
    """Give a model a draft.

    Returns:
        How the arguments of the model's `generate` change, and those of the draft's: see `_with_draft` and `_as_draft`.
    """
    # Not a submodule, so the model's parameters, state dict and `named_modules` stay unchanged.
    model.__dict__["assistant"] = draft
    _see_images(draft)
    return _with_draft(model, draft), _as_draft(model, draft)


def _with_draft(model: Any, draft: Any) -> ChangeArguments:
    """Use a draft unless the call names one; `assistant_model=None` turns it off."""
    takes_a_draft = "assistant_model" in inspect.signature(model.generate).parameters

    def change(arguments: dict[str, Any]) -> dict[str, Any]:
        if not takes_a_draft:
            return arguments
        chosen = arguments.get("assistant_model", draft)
        obstacle = None if chosen is None else _obstacle(model, arguments)
        if obstacle is not None:
            if "assistant_model" in arguments:
                logger.warning("generate: assistant_model is ignored: %s", obstacle)
            chosen = None
        return {**arguments, "assistant_model": chosen}

    return change


def _obstacle(model: Any, arguments: Mapping[str, Any]) -> str | None:
    """Return why transformers cannot use a draft for a call, or `None` if it can."""

    def setting(name: str) -> Any:
        sources = (arguments.get("generation_config"), model.generation_config)
        values = [arguments.get(name), *(getattr(source, name, None) for source in sources)]
        return next((value for value in values if value is not None), None)

    ids = arguments.get("input_ids", arguments.get("inputs"))
    if arguments.get("inputs_embeds") is not None:
        return "a draft cannot read inputs_embeds"
    if isinstance(ids, torch.Tensor) and ids.shape[0] > 1:
        return f"a batch of {ids.shape[0]} (only one prompt at a time is supported)"
    for name in ("num_beams", "num_return_sequences"):
        if (setting(name) or 1) > 1:
            return f"{name}={setting(name)} (only 1 is supported)"
    for name in OTHER_DECODING:
        if setting(name):
            return f"{name} selects another kind of generation"
    if setting("use_cache") is False or any(setting(name) is not None for name in _OTHER_CACHES):
        return "it needs the default cache of generate"
    if setting("prefill_chunk_size"):
        return "it cannot process the prompt in chunks"
    return "the model cannot roll tokens back" if getattr(model, "_is_stateful", False) else None


def _as_draft(model: Any, draft: Any) -> ChangeArguments:
    """Drop the arguments that transformers forwards from the model and that its draft cannot take.

    Encoded images have the model's width. A draft of another width, or without vision, predicts from the text alone.
    """
    foreign = _parameters(model) - _parameters(draft)
    if _vision_width(draft) != _vision_width(model):
        foreign.add("mm_encoder_outputs")
    flat_positions = "mm_token_type_ids" in foreign
    names = ("image_token_id", "video_token_id")
    placeholders = [getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None]

    def change(arguments: dict[str, Any]) -> dict[str, Any]:
        if not getattr(arguments.get("generation_config"), "is_assistant", False):
            return arguments
        changed = {name: value for name, value in arguments.items() if name not in foreign}
        positions = changed.get("position_ids")
        if flat_positions and positions is not None and positions.dim() == 3:
            changed["position_ids"] = positions[0]  # the row that counts tokens
        if placeholders:  # the model would look up images for drafted placeholders
            from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

            given = changed.get("logits_processor") or []
            changed["logits_processor"] = LogitsProcessorList([*given, SuppressTokensLogitsProcessor(placeholders)])
        return changed

    return change


def _see_images(draft: Any) -> None:
    """Make a draft use the images that the model encoded; transformers bypasses the draft's `forward` during its
    prefill.
    """
    plain = draft.prepare_inputs_for_generation

    @functools.wraps(plain)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        inputs = plain(*args, **kwargs)
        images, cache = kwargs.get("mm_encoder_outputs"), cache_of(inputs)
        if images and (cache is None or cache.get_seq_length() == 0):
            inputs["mm_encoder_outputs"] = images
        return inputs

    draft.prepare_inputs_for_generation = prepare


def _parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _vision_width(model: Any) -> int | None:
    vision = getattr(model.config, "vision_config", None)
    return getattr(vision, "out_hidden_size", None)
