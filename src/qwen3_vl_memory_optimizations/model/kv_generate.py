"""Has `generate` of a model keep keys and values in a `ManagedKVCache` where the caller asks for no other cache."""

from __future__ import annotations

import functools
from typing import Any

from ..paging import Pager

_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before


def attach_kv_cache(model: Any, codec: str, pager: Pager | None) -> bool:
    """Make `generate` use a `ManagedKVCache`; a cache that is passed and a `cache_implementation` win.

    Args:
        model: attends with `sdpa`, with the same full attention in all layers; any other is left as it is.
        codec: of the blocks.
        pager: counts and moves them.

    Returns:
        Whether the model is one that can.
    """
    from transformers import DynamicCache

    from .kv_attention import ATTENTION, register_attention
    from .kv_cache import ManagedKVCache

    config = model.config.get_text_config(decoder=True)
    if not hasattr(model, "_prepare_cache_for_generation") or not _has_full_attention(config):
        return False
    register_attention()
    config._attn_implementation_internal = ATTENTION  # the setter checks nothing else, and would tell other parts
    plain = model._prepare_cache_for_generation

    @functools.wraps(plain)
    def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        given = any(model_kwargs.get(name) is not None for name in _NAMES)
        result = plain(generation_config, model_kwargs, *args, **kwargs)
        if not given and generation_config.cache_implementation is None:
            for name in _NAMES:
                if type(model_kwargs.get(name)) is DynamicCache:
                    model_kwargs[name] = ManagedKVCache(config, codec=codec, pager=pager)
        return result

    model._prepare_cache_for_generation = prepare
    return True


def _has_full_attention(config: Any) -> bool:
    """Whether every layer attends to all tokens before, by the kernel that ours stands in for."""
    types = getattr(config, "layer_types", None) or []
    windows = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return (
        getattr(config, "_attn_implementation", None) == "sdpa"
        and all(kind == "full_attention" for kind in types)
        and not (windows and not types)
        and getattr(config, "num_kv_shared_layers", None) in (None, 0)
        and not getattr(config, "is_encoder_decoder", False)
    )
