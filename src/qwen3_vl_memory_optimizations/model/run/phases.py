"""Report the phase of each forward: vision tower, prefill or decode, and its progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..compat import base_of, cache_of, text_decoder, vision_tower
from .pieces import forward_size
from .progress import PICTURES, ProgressTracker

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


def attach_progress(model: Any, tracker: ProgressTracker) -> None:
    """Follow the forwards of a model: each block of the vision tower, and each decoder layer of a prompt."""

    def before_model(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tracker.forward_begins(*forward_size(args, kwargs))

    model.register_forward_pre_hook(_passive(before_model), with_kwargs=True)
    _attach_to_tower(vision_tower(model), tracker)
    decoder = text_decoder(model) or base_of(model)
    layers = list(getattr(decoder, "layers", ()))
    if not layers:
        return

    def before_decoder(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, length, _ = forward_size(args, kwargs)
        cache = cache_of(kwargs)
        tracker.piece_begins(length, 0 if cache is None else int(cache.get_seq_length()), len(layers))

    decoder.register_forward_pre_hook(_passive(before_decoder), with_kwargs=True)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(_passive(lambda module, args, output, n=number: tracker.layer_ends(n)))


def _attach_to_tower(tower: Any, tracker: ProgressTracker) -> None:
    blocks = list(getattr(tower, "blocks", ()))
    if not blocks:
        return

    def before_tower(module: Any, args: Any) -> None:
        tracker.begin(PICTURES, "blocks", len(blocks))

    tower.register_forward_pre_hook(_passive(before_tower))
    for number, block in enumerate(blocks):
        block.register_forward_hook(_passive(lambda module, args, output, n=number: tracker.block_ends(n)))


def _passive(hook: Any) -> Any:
    """Mark a hook that leaves the computation unchanged, so that cached results stay valid (`ModelState`)."""
    hook.changes_nothing = True
    return hook
