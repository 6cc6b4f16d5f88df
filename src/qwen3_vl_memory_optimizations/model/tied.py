"""Which of the weights that a configuration ties are one weight: the files decide, as in transformers."""

from __future__ import annotations

import logging

import torch
from torch import nn

from ..storage import Checkpoint, DirectFile, TensorExtent

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 8 << 20


def untie_by_files(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Give tied parameters of which a checkpoint holds several with other values weights of their own.

    A head that was trained, or merged with an adapter, beside an embedding that was not.

    Args:
        model: on the meta device.
        checkpoint: is read where it holds several: up to the first difference, or whole.

    Returns:
        The names that were untied.
    """
    first: dict[int, str] = {}
    untied = []
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            kept = first.setdefault(id(parameter), name)
            if kept != name and not _are_equal(checkpoint.tensors.get(kept), checkpoint.tensors.get(name)):
                module._parameters[attribute] = nn.Parameter(torch.empty_like(parameter), requires_grad=False)
                untied.append(name)
    keys = getattr(model, "all_tied_weights_keys", None)
    for name in untied:
        logger.warning(
            "%s: %s differs from the weight that config.json ties it to; both are used as they are in the files",
            checkpoint.directory,
            name,
        )
        if isinstance(keys, dict):
            keys.pop(name, None)
    return untied


def _are_equal(first: TensorExtent | None, second: TensorExtent | None) -> bool:
    """Whether two tensors of a checkpoint are the same; one that is not there is as the other."""
    if first is None or second is None:
        return True
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with DirectFile(first.path) as mine, DirectFile(second.path) as other:
        for start in range(0, first.n_bytes, _CHUNK_BYTES):
            n_bytes = min(_CHUNK_BYTES, first.n_bytes - start)
            if mine.read_bytes(first.offset_bytes + start, n_bytes) != other.read_bytes(
                second.offset_bytes + start, n_bytes
            ):
                return False
    return True
