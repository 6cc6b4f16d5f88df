"""Decide from the files, as transformers does, which weights tied by the configuration are really one."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import closing

import torch
from torch import nn

from ...storage import Checkpoint
from ..compat import tied_names
from .formats import LogicalTensor, weights_of

logger = logging.getLogger(__name__)


def untie_by_files(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Separate tied parameters for which a checkpoint stores different values.

    For example a head that was trained, or merged with an adapter, beside an embedding that was not.

    Args:
        model: on the meta device.
        checkpoint: tensors are read if it stores several: up to the first difference, or whole.

    Returns:
        The names that were untied.
    """
    first: dict[int, str] = {}
    untied = []
    weights = weights_of(checkpoint)
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            kept = first.setdefault(id(parameter), name)
            if kept != name and not _are_equal(weights.get(kept), weights.get(name)):
                module._parameters[attribute] = nn.Parameter(torch.empty_like(parameter), requires_grad=False)
                untied.append(name)
    keys = tied_names(model)
    for name in untied:
        logger.warning(
            "%s: %s differs from the weight that config.json ties it to; using both as stored",
            checkpoint.directory,
            name,
        )
        if isinstance(keys, dict):
            keys.pop(name, None)
    return untied


def _are_equal(first: LogicalTensor | None, second: LogicalTensor | None) -> bool:
    """Return whether two tensors of a checkpoint are equal; a missing tensor equals the other."""
    if first is None or second is None:
        return True
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with closing(_bytes_of(first)) as mine, closing(_bytes_of(second)) as other:
        # Same shape and dtype, but chunk sizes may differ.
        ours, theirs = b"", b""
        while True:
            ours, theirs = ours or next(mine, b""), theirs or next(other, b"")
            n_bytes = min(len(ours), len(theirs))
            if ours[:n_bytes] != theirs[:n_bytes]:
                return False
            if not n_bytes:
                return True
            ours, theirs = ours[n_bytes:], theirs[n_bytes:]


def _bytes_of(tensor: LogicalTensor) -> Generator[bytes, None, None]:
    for chunk in tensor.row_chunks():
        if chunk.numel():
            yield chunk.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
