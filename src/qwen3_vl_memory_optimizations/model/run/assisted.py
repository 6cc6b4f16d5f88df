"""Attach a draft model for speculative decoding, so that `generate` uses it by default wherever transformers can.

The draft only proposes tokens; the model decides. With greedy search the answer is the model's own.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...errors import ConfigurationError
from ..compat import CACHE_NAMES, OTHER_DECODING, cache_of

logger = logging.getLogger(__name__)

ASSISTANT = "assistant"

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


def attach_draft(model: Any, draft: Any) -> None:
    """Make `generate` use a draft unless the call names one; `assistant_model=None` turns it off."""
    # Not a submodule, so the model's parameters, state dict and `named_modules` stay unchanged.
    model.__dict__["assistant"] = draft
    _take_the_kwargs_of(model, draft)
    plain = model.generate
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def generate(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind_partial(*args, **kwargs)
        arguments = {**call.arguments, **call.arguments.get("kwargs", {})}
        chosen = arguments.get("assistant_model", draft)
        obstacle = None if chosen is None else _obstacle(model, arguments)
        if obstacle is not None:
            if "assistant_model" in arguments:
                logger.warning("generate: assistant_model is ignored: %s", obstacle)
            chosen = None
        call.arguments["assistant_model"] = chosen
        return plain(*call.args, **call.kwargs)

    model.generate = generate


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


def _take_the_kwargs_of(model: Any, draft: Any) -> None:
    """Let `generate` of a draft accept the keyword arguments that transformers forwards from the model.

    Encoded images have the model's width. A draft of another width, or without vision, predicts from the text alone.
    """
    _see_images(draft)
    plain = draft.generate
    foreign = _parameters(model) - _parameters(draft)
    if _vision_width(draft) != _vision_width(model):
        foreign.add("mm_encoder_outputs")
    flat_positions = "mm_token_type_ids" in foreign
    names = ("image_token_id", "video_token_id")
    placeholders = [getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None]

    @functools.wraps(plain)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if getattr(kwargs.get("generation_config"), "is_assistant", False):
            kwargs = {name: value for name, value in kwargs.items() if name not in foreign}
            positions = kwargs.get("position_ids")
            if flat_positions and positions is not None and positions.dim() == 3:
                kwargs["position_ids"] = positions[0]  # the row that counts tokens
            if placeholders:  # the model would look up images for drafted placeholders
                from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

                given = kwargs.get("logits_processor") or []
                kwargs["logits_processor"] = LogitsProcessorList([*given, SuppressTokensLogitsProcessor(placeholders)])
        return plain(*args, **kwargs)

    draft.generate = generate


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
