"""`EncodingLog`: sizes, speeds and sampled errors of everything that was encoded."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch

from .base import Codec
from .kv import KVBlock, KVCodec
from .selection import relative_error

_SAMPLED_BLOCKS = 64
_SAMPLED_HEADS = 2
_SAMPLED_ROWS = 64


@dataclass(slots=True)
class EncodingCounters:
    """Counters of one kind of tensor since the start.

    Attributes:
        encodes: number of encodings.
        original_bytes, encoded_bytes: sizes before and after.
        timed_bytes, encode_s: original bytes of the timed encodings, and their time.
        decoded_bytes, decode_s: bytes decoded from samples, and the time.
        sampled_bytes: original bytes with a known error.
        error_bytes: sum over those of relative error times original bytes.
    """

    encodes: int = 0
    original_bytes: int = 0
    encoded_bytes: int = 0
    timed_bytes: int = 0
    encode_s: float = 0.0
    decoded_bytes: int = 0
    decode_s: float = 0.0
    sampled_bytes: int = 0
    error_bytes: float = 0.0

    @property
    def relative_error(self) -> float | None:
        """Mean relative error weighted by bytes; `None` if none is known."""
        return self.error_bytes / self.sampled_bytes if self.sampled_bytes else None

    @property
    def encode_bytes_per_s(self) -> float | None:
        """Original bytes encoded per second; `None` if nothing was timed."""
        return self.timed_bytes / self.encode_s if self.encode_s else None

    @property
    def decode_bytes_per_s(self) -> float | None:
        """Bytes decoded per second by one call of the codec's `decode`; `None` if nothing was timed."""
        return self.decoded_bytes / self.decode_s if self.decode_s else None

    def add(self, other: EncodingCounters) -> None:
        """Add the counts of another instance."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(frozen=True, slots=True)
class DecodedSample:
    """Time and error of decoding the first rows of an encoded weight."""

    relative_error: float
    decoded_bytes: int
    seconds: float

    @classmethod
    def of(cls, codec: Codec, weight: torch.Tensor, encoded: Mapping[str, torch.Tensor]) -> DecodedSample:
        """Decode the first rows of a weight `[rows, ...]`, or of a chunk."""
        rows = min(len(weight), _SAMPLED_ROWS)
        shared = {segment.name for segment in codec.segments(tuple(weight.shape), weight.dtype) if segment.shared}
        part = {name: segment if name in shared else segment[:rows] for name, segment in encoded.items()}
        exact = weight[:rows].reshape(rows, -1)
        out = torch.empty_like(exact)
        start_s = time.perf_counter()
        decoded = codec.decode(part, out)
        seconds = time.perf_counter() - start_s
        return cls(relative_error(exact, decoded), exact.nbytes, seconds)


class EncodingLog:
    """Counts by kind of tensor; thread-safe.

    Attributes:
        weight_errors: weight id -> relative error, if known.
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
        encode_s: float = 0.0,
        decode_s: float = 0.0,
        relative_error: float | None = None,
    ) -> None:
        """Record an encoding.

        Args:
            kind: kind of the tensor.
            original_bytes, encoded_bytes: sizes before and after.
            encode_s: encoding time; 0.0: not timed.
            decode_s: time to decode all of it; 0.0: not timed.
            relative_error: the error, if known.
        """
        counted = EncodingCounters(encodes=1, original_bytes=original_bytes, encoded_bytes=encoded_bytes)
        if encode_s:
            counted.timed_bytes, counted.encode_s = original_bytes, encode_s
        if decode_s:
            counted.decoded_bytes, counted.decode_s = original_bytes, decode_s
        if relative_error is not None:
            counted.sampled_bytes, counted.error_bytes = original_bytes, relative_error * original_bytes
        self.add(kind, counted)

    def add(self, kind: str, counted: EncodingCounters) -> None:
        """Add counters from elsewhere to a kind."""
        with self._lock:
            self._kinds.setdefault(kind, EncodingCounters()).add(counted)

    def encode_block(self, kind: str, codec: KVCodec, keys: torch.Tensor, values: torch.Tensor, block: KVBlock) -> None:
        """Encode keys and values `[n, tokens, head_dim]` into a block, and record it.

        The first block and one in 64 are decoded, to measure the time and the error of two heads.

        Raises:
            CodecError: values that this codec cannot represent.
        """
        start_s = time.perf_counter()
        codec.encode(keys, values, block)
        encode_s = time.perf_counter() - start_s
        error, decode_s = 0.0 if codec.lossless else None, 0.0
        if error is None and self._is_sampled(kind):
            decoded = torch.empty_like(keys), torch.empty_like(values)
            start_s = time.perf_counter()
            codec.decode(block, *decoded)
            decode_s = time.perf_counter() - start_s
            exact = torch.cat([keys[:_SAMPLED_HEADS], values[:_SAMPLED_HEADS]])
            error = relative_error(exact, torch.cat([part[:_SAMPLED_HEADS] for part in decoded]))
        n_bytes = sum(segment.nbytes for segment in block.segments.values())
        self.note(
            kind,
            original_bytes=keys.nbytes + values.nbytes,
            encoded_bytes=n_bytes,
            encode_s=encode_s,
            decode_s=decode_s,
            relative_error=error,
        )

    def _is_sampled(self, kind: str) -> bool:
        with self._lock:
            row = self._kinds.get(kind)
            return row is None or row.encodes % _SAMPLED_BLOCKS == 0

    def encode_weight(self, weight_id: str, codec: Codec, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode a weight `[rows, ...]`, and record it with the error of its first rows.

        Raises:
            CodecError: values that this codec cannot represent.
        """
        start_s = time.perf_counter()
        encoded = codec.encode(weight)
        encode_s = time.perf_counter() - start_s
        if not codec.lossless:
            sample = DecodedSample.of(codec, weight, encoded)
            self.weight_errors[weight_id] = sample.relative_error
            counted = EncodingCounters(
                encodes=1,
                timed_bytes=weight.nbytes,
                encode_s=encode_s,
                decoded_bytes=sample.decoded_bytes,
                decode_s=sample.seconds,
            )
            self.add("weights", counted)
        return encoded

    def rows(self) -> dict[str, EncodingCounters]:
        """Return a snapshot of the counters by kind."""
        with self._lock:
            return {kind: replace(row) for kind, row in self._kinds.items()}
