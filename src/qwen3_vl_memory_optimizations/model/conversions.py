"""Support whole-model operations of torch, transformers and accelerate, or reject them before anything changes.

A model with managed weights is tied to its optimizer: it cannot be copied, pickled, offloaded by other code, or given
weights of another shape. Each of these would fail halfway, leaving a partly changed model, or a model that looks right
but answers from another model's weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import ConfigurationError
from ..paging import ManagedTensor
from .compat import base_of, text_decoder, vision_tower

_SMALL = "small weights"


def attach_conversions(model: Any, optimizer: Any) -> None:
    """Make a model convert its managed weights with the others, and reject what they do not support.

    Args:
        model: a transformers model with its weights in place.
        optimizer: owns the weights.
    """
    parts = (model, base_of(model), vision_tower(model), text_decoder(model))
    for part in dict.fromkeys(part for part in parts if isinstance(part, nn.Module)):
        part._apply = functools.partial(_apply, part, optimizer)  # type: ignore[method-assign]
        part.requires_grad_ = functools.partial(_requires_grad, part)  # type: ignore[method-assign]
    model.__getstate__ = _refuse_to_copy
    model._hf_hook = _NotOffloaded()
    model.load_state_dict = _by_copying(model.load_state_dict)
    if hasattr(model, "resize_token_embeddings"):
        model.resize_token_embeddings = _of_the_same_size(model, model.resize_token_embeddings)


def is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate put hooks on a module that load its weights from elsewhere."""
    return not isinstance(getattr(module, "_hf_hook", _NotOffloaded()), _NotOffloaded)


def _apply(
    part: nn.Module, optimizer: Any, convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> Any:
    """Replace `nn.Module._apply`, through which `to`, `half`, `float`, `cuda` and others convert all tensors of a
    model.
    """
    plain = type(part)._apply
    modules = list(part.modules()) if recurse else [part]
    held: list[tuple[nn.Module, str, Any]] = [
        (module, name, weight)
        for module in modules
        for name, weight in module._parameters.items()
        if isinstance(weight, ManagedTensor)
    ]
    if not held:
        return plain(part, convert, recurse)
    before = held[0][2].dtype
    probe = convert(torch.empty(0, dtype=before))
    if probe.device.type != "cpu":
        raise ConfigurationError(
            f"managed weights live in CPU memory and on the SSD and cannot move to {str(probe.device)!r}; "
            "load the model with transformers to use that device"
        )
    small = {id(each): each for module in modules for each in module._parameters.values() if each is not None}
    others = sum(each.nbytes for each in small.values() if not isinstance(each, ManagedTensor))
    growth = others * (probe.dtype.itemsize - before.itemsize) // before.itemsize
    if growth:
        optimizer.pager.debit(_SMALL, growth)
    for module, name, _ in held:
        module._parameters[name] = None
    try:
        plain(part, convert, recurse)
    finally:
        for module, name, weight in held:
            module._parameters[name] = weight
    for weight in {id(weight): weight for _, _, weight in held}.values():
        if weight.dtype != probe.dtype:
            weight.convert_(probe.dtype)
    return part


def _requires_grad(part: nn.Module, requires_grad: bool = True) -> nn.Module:
    if requires_grad:
        raise ConfigurationError(
            "managed weights are frozen and get no gradients; train an adapter (LoRA) or individual small parameters, "
            "or load the model with transformers"
        )
    return type(part).requires_grad_(part, False)


def _refuse_to_copy() -> NoReturn:
    raise ConfigurationError(
        "a model with managed weights can be neither copied nor pickled: one optimizer owns its weights; save it with "
        "save_pretrained(), or load it a second time"
    )


class _NotOffloaded:
    """Occupies accelerate's hook attribute, and rejects the first hook that accelerate sets."""

    def detach_hook(self, module: nn.Module) -> NoReturn:
        """Reject a hook before accelerate sets it."""
        raise ConfigurationError(
            "managed weights cannot be offloaded by accelerate: they are already paged from the SSD; set ram_budget "
            "instead"
        )


def _by_copying(plain: Any) -> Any:
    @functools.wraps(plain)
    def load_state_dict(state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if assign:
            raise ConfigurationError(
                "load_state_dict(assign=True): managed weights cannot be replaced by other tensors; omit assign to "
                "copy the values"
            )
        return plain(state_dict, strict)

    return load_state_dict


def _of_the_same_size(model: Any, plain: Any) -> Any:
    @functools.wraps(plain)
    def resize_token_embeddings(
        new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        embeddings = model.get_input_embeddings()
        now = wanted = embeddings.weight.shape[0]
        if new_num_tokens is not None:
            wanted = new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != now and isinstance(embeddings.weight, ManagedTensor):
            raise ConfigurationError(
                f"the vocabulary of managed weights has {now} tokens and cannot be resized to {wanted}; resize the "
                "model with transformers, save it with save_pretrained(), and load the result"
            )
        return plain(new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    return resize_token_embeddings
