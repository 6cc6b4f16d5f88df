"""`EncodingLog`: what was encoded, into how much, how fast, and with what error where that was sampled."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .base import Codec
from .kv import KVBlock, KVCodec
from .selection import relative_error

_SAMPLED_BLOCKS = 64
_SAMPLED_HEADS = 2
_SAMPLED_ROWS = 64


@dataclass(slots=True)
class EncodingCounters:
    """What was encoded of one kind of tensor since the start.

    Attributes:
        encodes: how often.
        original_bytes, encoded_bytes: before and after.
        seconds: spent on encoding.
        sampled_bytes: original bytes of those whose error is known.
        error_bytes: relative error times original bytes, summed over those.
    """

    encodes: int = 0
    original_bytes: int = 0
    encoded_bytes: int = 0
    seconds: float = 0.0
    sampled_bytes: int = 0
    error_bytes: float = 0.0

    @property
    def relative_error(self) -> float | None:
        """The mean error by bytes; `None` where none is known."""
        return self.error_bytes / self.sampled_bytes if self.sampled_bytes else None


class EncodingLog:
    """Counts by kind of tensor; any thread may note.

    Attributes:
        weight_errors: relative error by the id of a weight, where it is known.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kinds: dict[str, EncodingCounters] = {}
        self.weight_errors: dict[str, float] = {}

    def note(
        self,
        kind: str,
        *,
        original_bytes: int,
        encoded_bytes: int,
        seconds: float = 0.0,
        relative_error: float | None = None,
    ) -> None:
        """Note that something was encoded.

        Args:
            kind: of the tensor.
            original_bytes, encoded_bytes: before and after.
            seconds: that it took; 0.0: another process did it.
            relative_error: where it is known.
        """
        with self._lock:
            row = self._kinds.setdefault(kind, EncodingCounters())
            row.encodes += 1
            row.original_bytes += original_bytes
            row.encoded_bytes += encoded_bytes
            row.seconds += seconds
            if relative_error is not None:
                row.sampled_bytes += original_bytes
                row.error_bytes += relative_error * original_bytes

    def encode_block(self, kind: str, codec: KVCodec, keys: torch.Tensor, values: torch.Tensor, block: KVBlock) -> None:
        """Encode keys and values `[n, tokens, head_dim]` into a block, and note it.

        The error is measured on two heads of the first block and of one in 64.

        Raises:
            CodecError: values that this codec cannot represent.
        """
        start_s = time.perf_counter()
        codec.encode(keys, values, block)
        seconds = time.perf_counter() - start_s
        error = 0.0 if codec.lossless else None
        if error is None and self._is_sampled(kind):
            decoded = torch.empty_like(keys), torch.empty_like(values)
            codec.decode(block, *decoded)
            exact = torch.cat([keys[:_SAMPLED_HEADS], values[:_SAMPLED_HEADS]])
            error = relative_error(exact, torch.cat([part[:_SAMPLED_HEADS] for part in decoded]))
        n_bytes = sum(segment.nbytes for segment in block.segments.values())
        self.note(
            kind,
            original_bytes=keys.nbytes + values.nbytes,
            encoded_bytes=n_bytes,
            seconds=seconds,
            relative_error=error,
        )

    def _is_sampled(self, kind: str) -> bool:
        with self._lock:
            row = self._kinds.get(kind)
            return row is None or row.encodes % _SAMPLED_BLOCKS == 0

    def sample_weight(
        self, weight_id: str, codec: Codec, weight: torch.Tensor, encoded: Mapping[str, torch.Tensor]
    ) -> None:
        """Note the error of a weight `[rows, columns]` that was encoded, as measured on its first rows."""
        if codec.lossless:
            return
        block = codec.row_block(tuple(weight.shape))
        rows = min(len(weight), -(-_SAMPLED_ROWS // block) * block)
        shared = {segment.name for segment in codec.segments(tuple(weight.shape), weight.dtype) if segment.shared}
        part = {name: segment if name in shared else segment[:rows] for name, segment in encoded.items()}
        exact = weight[:rows].reshape(rows, -1)
        self.weight_errors[weight_id] = relative_error(exact, codec.decode(part, torch.empty_like(exact)))

    def rows(self) -> dict[str, EncodingCounters]:
        """Return the counters by kind, as they are now."""
        with self._lock:
            return {kind: replace(row) for kind, row in self._kinds.items()}
