"""Report the phase of each forward: vision tower, prefill or decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..compat import cache_of, vision_tower

_FEW_TOKENS = 16
"""Up to this many new tokens after cached ones are speculated tokens of an answer, not a prompt."""


def attach_phases(model: Any, enter_phase: Callable[[str], None]) -> None:
    """Report the phases of all forwards of a model.

    Args:
        model: a transformers model.
        enter_phase: called with `vision`, `prefill` or `decode` before the phase is computed.
    """

    def before_model(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs["inputs_embeds"] if given is None else given
        cache = cache_of(kwargs)
        goes_on = cache is not None and cache.get_seq_length() > 0
        enter_phase("decode" if goes_on and given.shape[1] <= _FEW_TOKENS else "prefill")

    def before_vision(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        enter_phase("vision")

    model.register_forward_pre_hook(before_model, with_kwargs=True)
    vision = vision_tower(model)
    if isinstance(vision, torch.nn.Module):
        vision.register_forward_pre_hook(before_vision, with_kwargs=True)
