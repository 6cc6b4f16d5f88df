"""Encode a model's weights while calibration inputs pass through it, each for the inputs that it gets.

All inputs pass through one layer after the other, in one forward. When they reach a linear layer, its weight is encoded
so that its outputs for them change least, and the outputs continue with the encoded weight: later layers make up for
what earlier ones lost (as in GPTQ, arXiv:2210.17323). No weight is held but the one at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...compression import Codec, Compensation, Encoded, LinearInput, Scratch
from ...errors import CheckpointError, CodecError
from .formats import LogicalTensor
from .packed_encodings import PackedEncodings
from .skeleton import WeightSite, put

Stored = Mapping[str, tuple[LogicalTensor, Codec]]


class CalibratedEncoding:
    """Encodes the weights of a skeleton whose codecs compensate errors.

    Args:
        model: a skeleton in fp32; it cannot be used afterwards.
        sites: its parameters.
        stored: their values in the source, and their codecs.
        read: returns the encoded form of a weight that was written before an interruption, or `None`.
        write: takes the name and encoded form of each weight.
        progress: called with the bytes of weights done, and of all.
        encodings: notes their errors.
    """

    def __init__(
        self,
        model: Any,
        sites: list[WeightSite],
        stored: Stored,
        *,
        read: Callable[[str], Encoded | None],
        write: Callable[[str, Encoded], None],
        progress: Callable[[int, int], None],
        encodings: PackedEncodings,
    ) -> None:
        self._model, self._stored = model, stored
        self._read, self._write, self._progress, self._encodings = read, write, progress, encodings
        self._last: tuple[torch.Tensor, LinearInput, Compensation | None] | None = None
        self._scratch = Scratch()
        self._done = 0
        self._total = sum(stored[site.name][0].n_bytes for site in sites if _is_encoded(site, stored))
        for site in sites:
            weight, _ = stored[site.name]
            if not site.managed:
                put(site, nn.Parameter(weight.whole().float(), requires_grad=False))
                continue
            for module, _ in site.holders:
                if isinstance(module, nn.Embedding):
                    module.forward = partial(self._look_up, site.name, module)  # type: ignore[method-assign]
                elif isinstance(module, nn.Linear):
                    module.forward = partial(self._linear, site.name, module)  # type: ignore[method-assign]

    def run(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Let the arguments of one forward pass through the model.

        Weights that they do not reach are not written, such as those of the vision tower without images.
        """
        with torch.inference_mode():
            self._model.base_model(**batch, use_cache=False)

    def _look_up(self, name: str, module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        weight, _ = self._stored[name]
        wanted, places = ids.reshape(-1).unique(return_inverse=True)  # ascending
        rows = torch.empty((len(wanted), module.embedding_dim), dtype=torch.float32)
        start = 0
        for chunk in weight.row_chunks():
            first, stop = torch.searchsorted(wanted, torch.tensor([start, start + len(chunk)])).tolist()
            rows[first:stop] = chunk[wanted[first:stop] - start].float()
            start += len(chunk)
        return rows[places].view(*ids.shape, -1)

    def _linear(self, name: str, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        weight, codec = self._stored[name]
        if self._last is None or self._last[0] is not x:  # q, k and v share one input
            self._last = (x, LinearInput(x), None)
        left = self._last[1]
        if codec.compensates:
            encoded = self._read(name)
            if encoded is not None:
                chunks = weight.row_chunks()  # its first is valid as long as it is held
                self._encodings.sample(name, codec, next(chunks), encoded)
            else:
                encoded = self._encode(name, weight, codec, left)
                self._write(name, encoded)
            self._done += weight.n_bytes
            self._progress(self._done, self._total)
            out = codec.linear(left, encoded, module.bias, self._scratch)
        else:
            parts = [F.linear(left.x2d, chunk.float()) for chunk in weight.row_chunks()]
            out = torch.cat(parts, dim=1)
            if module.bias is not None:
                out += module.bias
        return out.view(*x.shape[:-1], -1)

    def _encode(self, name: str, weight: LogicalTensor, codec: Codec, left: LinearInput) -> Encoded:
        assert self._last is not None
        try:
            compensation = self._last[2]
            if compensation is None:
                compensation = codec.compensation(left.x2d)
                self._last = (*self._last[:2], compensation)
            parts = [self._encodings.encode(name, codec, rows, compensation) for rows in weight.row_chunks()]
        except CodecError as error:
            raise CheckpointError(
                f"{weight.path}: {name}: {error}; the checkpoint is damaged: download it again", path=weight.path
            ) from error
        return {segment: torch.cat([part[segment] for part in parts]) for segment in parts[0]}


def _is_encoded(site: WeightSite, stored: Stored) -> bool:
    linear = any(isinstance(module, nn.Linear) for module, _ in site.holders)
    return site.managed and linear and not site.vocabulary and stored[site.name][1].compensates
