"""A draft for assisted generation: `generate` uses it unasked, wherever transformers can.

Drafts only propose tokens, the model decides: with greedy search the answer is the model's own.
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
from ..compat import CACHE_NAMES, cache_of

logger = logging.getLogger(__name__)

ASSISTANT = "assistant"

_OTHER_KINDS = (
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "custom_generate",
)
_OTHER_CACHES = ("cache_implementation", *CACHE_NAMES)


def require_draft(model: Any, draft: Any) -> None:
    """Refuse a draft whose tokens are not the model's; warn of one that cannot be faster.

    Raises:
        ConfigurationError: the vocabularies differ in size, or the draft is the model.
    """
    if draft is model:
        raise ConfigurationError("assistant: the model cannot be its own draft; give a smaller one")
    theirs, ours = (other.config.get_text_config().vocab_size for other in (draft, model))
    if theirs != ours:
        raise ConfigurationError(
            f"assistant: its vocabulary has {theirs} tokens, that of the model {ours}; they must be the same"
        )
    size, model_size = (sum(parameter.numel() for parameter in other.parameters()) for other in (draft, model))
    if size >= model_size:
        logger.warning(
            "the assistant has %d parameters, the model %d: a draft that is not smaller makes it slower",
            size,
            model_size,
        )


def attach_draft(model: Any, draft: Any) -> None:
    """Make `generate` of the model use a draft where the caller names none; `assistant_model=None` turns it off."""
    # Not as a submodule: parameters, state dict and `named_modules` of the model stay what they are.
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
                logger.warning("generate: assistant_model is not used: %s", obstacle)
            chosen = None
        call.arguments["assistant_model"] = chosen
        return plain(*call.args, **call.kwargs)

    model.generate = generate


def _obstacle(model: Any, arguments: Mapping[str, Any]) -> str | None:
    """Return why transformers cannot let a draft help with a call, or `None` if it can."""

    def setting(name: str) -> Any:
        sources = (arguments.get("generation_config"), model.generation_config)
        values = [arguments.get(name), *(getattr(source, name, None) for source in sources)]
        return next((value for value in values if value is not None), None)

    ids = arguments.get("input_ids", arguments.get("inputs"))
    if arguments.get("inputs_embeds") is not None:
        return "inputs_embeds say nothing to another model"
    if isinstance(ids, torch.Tensor) and ids.shape[0] > 1:
        return f"a batch of {ids.shape[0]} (only one prompt at a time)"
    for name in ("num_beams", "num_return_sequences"):
        if (setting(name) or 1) > 1:
            return f"{name}={setting(name)} (only 1)"
    for name in _OTHER_KINDS:
        if setting(name):
            return f"{name} is another kind of generation"
    if setting("use_cache") is False or any(setting(name) is not None for name in _OTHER_CACHES):
        return "it needs the cache that generate makes by default"
    if setting("prefill_chunk_size"):
        return "it cannot take the prompt in chunks"
    return "the model cannot take tokens back" if getattr(model, "_is_stateful", False) else None


def _take_the_kwargs_of(model: Any, draft: Any) -> None:
    """Let `generate` of a draft take what transformers hands on from the model, whose inputs may be others.

    Encoded images have the width of the model. A draft of another width, or without vision, guesses from the text.
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
            if placeholders:  # the model would look for the pictures of the ones it is handed
                from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

                given = kwargs.get("logits_processor") or []
                kwargs["logits_processor"] = LogitsProcessorList([*given, SuppressTokensLogitsProcessor(placeholders)])
        return plain(*args, **kwargs)

    draft.generate = generate


def _see_images(draft: Any) -> None:
    """Have a draft use the images that the model encoded: transformers takes no forward of a draft for its prefill."""
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
