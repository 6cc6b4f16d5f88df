"""Isolate what depends on the transformers version: argument names, module paths and private methods."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import nn

CACHE_NAMES = ("cache", "past_key_values")
"""The argument for keys and values: since transformers 5.24, and before."""
MAKE_CACHE_METHOD = "_prepare_cache_for_generation"
"""The method of `generate` that creates the cache and adds it to the model's arguments."""
PREFILL_METHOD = "_prefill"
"""The method of `generate` that runs the prompt; not in every version."""
OTHER_DECODING = (
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "custom_generate",
)
"""Arguments of `generate` that choose another way of decoding than one token per pass."""
_CAPTURING = "transformers.utils.output_capturing"
INIT_METHOD = "_init_weights"
"""The method that initializes the weights and computed buffers of one module."""

DECODER_LAYER, VISION_MLP, VISION_ATTENTION = "Qwen3VLTextDecoderLayer", "Qwen3VLVisionMLP", "Qwen3VLVisionAttention"
PATCH_EMBEDDING = "Qwen3VLVisionPatchEmbed"
"""Classes of Qwen3-VL whose forward this package replaces."""


def is_original(module: nn.Module, name: str) -> bool:
    """Return whether a module is of this class of transformers, and not of a subclass or a copy elsewhere."""
    kind = type(module)
    return kind.__name__ == name and kind.__module__.split(".")[0] == "transformers"


def watches(hook: Any) -> bool:
    """Return whether a hook of a forward sees or changes what passes through the module.

    Hooks that the package marks with `changes_nothing` do not, and transformers' own (for `output_hidden_states`) only
    while a forward collects something; once installed they stay.
    """
    if getattr(hook, "changes_nothing", False):
        return False
    if getattr(hook, "__module__", "") != _CAPTURING:
        return True
    return bool(sys.modules[_CAPTURING]._active_collector.get())


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a forward, or `None`."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def cache_name(accepted: Container[str]) -> str:
    """Return the name of the cache among the arguments that a function accepts."""
    return next((name for name in CACHE_NAMES if name in accepted), CACHE_NAMES[0])


def base_of(model: Any) -> Any:
    """Return the inner model, without the head, or `None`."""
    return getattr(model, "model", None)


def vision_tower(model: Any) -> Any:
    """Return the vision tower of a whole model, or `None`."""
    return getattr(base_of(model), "visual", None)


def text_decoder(model: Any) -> Any:
    """Return the text decoder of a whole vision-language model, or `None`."""
    return getattr(base_of(model), "language_model", None)


def deepstack_levels(tower: Any) -> int | None:
    """Return the number of decoder layers that receive features of a tower; `None`: not a Qwen3-VL tower."""
    indexes = getattr(tower, "deepstack_visual_indexes", None)
    return None if indexes is None else len(indexes)


def picture_features(pooled: tuple[torch.Tensor, ...], deepstack: list[tuple[torch.Tensor, ...]]) -> Any:
    """Return features as the vision tower does: `[tokens, hidden]` per image or video, and the same per DeepStack
    level.
    """
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=deepstack)


def rotate_vision_heads() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return the function that rotates queries and keys of the vision tower."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

    return apply_rotary_pos_emb_vision


def attention_function(name: str | None) -> Callable[..., Any]:
    """Return the attention that a decoder layer of Qwen3-VL calls under a name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.qwen3_vl.modeling_qwen3_vl import eager_attention_forward

    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)


def registered_attention(name: str | None) -> Any:
    """Return the function registered as an attention, or `None`: each model has its own under such a name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get(name) if name in ALL_ATTENTION_FUNCTIONS else None


def sees(config: Any) -> bool:
    """Return whether a configuration is one of a vision-language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and causal_class(config) is None


def causal_class(config: Any) -> Any:
    """Return the class of the causal language model with a configuration, or `None`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None


def text_config(model: Any) -> Any:
    """Return the configuration of the text decoder, or of the whole model if it is its own decoder."""
    return model.config.get_text_config(decoder=True)


def use_attention(config: Any, name: str) -> None:
    """Make the layers of one part use a registered attention; the public setter would change other parts too."""
    config._attn_implementation_internal = name


def attention_name(config: Any) -> str | None:
    """Return the name of the attention that the layers of a part call."""
    return getattr(config, "_attn_implementation", None)


def initialise(model: Any, module: nn.Module) -> None:
    """Initialize the weights and computed buffers of one module as transformers would."""
    getattr(model, INIT_METHOD)(module)


def tied_names(model: Any) -> Any:
    """Return the names of parameters that a configuration ties to others, as a dict if transformers provides one."""
    return getattr(model, "all_tied_weights_keys", None) or {}
