"""`CacheItem`: one or more tensors with a small note; and the encoded form that levels store."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..compression import create_codec
from ..compression.manager import (
    CompressedTensor,
    INT8QuantizationCompressor,
    SparseCompressionCompressor,
    TensorCompressor,
    decompress,
)
from ..errors import CodecError, ConfigurationError

ALIGNMENT_BYTES = 64
LOSSLESS = "lossless"
CODECS = (LOSSLESS, "int8")
TOLERANCE = 0.02
"""Maximum relative error accepted by a level with a lossy codec; other tensors are stored unchanged."""
_WORTH_CODING_BYTES = 1 << 16
_SAMPLE = 4096
_MOSTLY_ZERO = 0.6
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


@dataclass(frozen=True)
class CacheItem:
    """The value cached under one key.

    Attributes:
        tensors: by name, of any shape and dtype.
        meta: a small JSON note.
    """

    tensors: Mapping[str, torch.Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class EncodedItem:
    """An item as bytes.

    Attributes:
        description: names, shapes, dtypes, codecs and the note; JSON.
        parts: the segments of all tensors in order, each a flat uint8 tensor.
    """

    description: dict[str, Any]
    parts: list[torch.Tensor]

    @property
    def n_bytes(self) -> int:
        """Size of the parts in bytes."""
        return sum(part.nbytes for part in self.parts)

    def owned(self) -> EncodedItem:
        """Return a copy in separate memory."""
        return EncodedItem(self.description, [part.clone() for part in self.parts])

    def pieces(self) -> list[memoryview]:
        """Return the parts as one payload in which each starts at a multiple of `ALIGNMENT_BYTES`."""
        found: list[memoryview] = []
        for part in self.parts:
            found.append(part.cpu().numpy().data.cast("B") if part.numel() else memoryview(b""))
            found.append(memoryview(bytes(-part.numel() % ALIGNMENT_BYTES)))
        return found


def encode(item: CacheItem, codec: str = LOSSLESS) -> EncodedItem:
    """Return the form that a level stores; its parts may share memory with the tensors.

    Args:
        item: the item to store.
        codec: `lossless`: unchanged, or only the nonzero values of mostly zero tensors; `int8`: one scale per row, half
            the bytes of 16-bit values, for tensors that lose less than 2 %.

    Raises:
        ConfigurationError: a tensor has an unsupported dtype.
    """
    rows, parts = [], []
    for name, tensor in item.tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise ConfigurationError(f"cache: tensors of dtype {dtype} are not supported")
        compressed = _compressed(tensor.detach(), codec)
        segments = {"data": tensor.detach()} if compressed is None else compressed.encoded
        for segment in segments.values():
            parts.append(segment.contiguous().reshape(-1).view(torch.uint8))
        rows.append(
            {
                "name": name,
                "dtype": dtype,
                "shape": list(tensor.shape),
                "codec": "none" if compressed is None else compressed.codec.stored_name,
                "segments": [
                    [key, str(segment.dtype).removeprefix("torch."), list(segment.shape)]
                    for key, segment in segments.items()
                ],
            }
        )
    return EncodedItem({"tensors": rows, "meta": dict(item.meta)}, parts)


def decode(encoded: EncodedItem, *, copy: bool) -> CacheItem:
    """Return the item.

    Args:
        encoded: a result of `encode`.
        copy: return separate memory; otherwise tensors may share memory with `encoded`.
    """
    parts = iter(encoded.parts)
    tensors: dict[str, torch.Tensor] = {}
    for row in encoded.description["tensors"]:
        segments = {key: next(parts).view(_DTYPES[dtype]).view(tuple(shape)) for key, dtype, shape in row["segments"]}
        shape, dtype = tuple(row["shape"]), _DTYPES[row["dtype"]]
        if row["codec"] == "none":
            tensors[row["name"]] = segments["data"].clone() if copy else segments["data"]
        else:
            codec = create_codec(row["codec"])
            tensors[row["name"]] = decompress(CompressedTensor(codec, shape, dtype, segments, 0.0))
    return CacheItem(tensors, encoded.description["meta"])


def split_payload(description: dict[str, Any], payload: memoryview) -> EncodedItem:
    """Return the encoded item from the payload that joins its `pieces`.

    Raises:
        ValueError: the payload's length does not match the description.
    """
    whole = torch.frombuffer(payload, dtype=torch.uint8) if len(payload) else torch.empty(0, dtype=torch.uint8)
    parts, start = [], 0
    for row in description["tensors"]:
        for _, dtype, shape in row["segments"]:
            n_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
            parts.append(whole[start : start + n_bytes])
            start += n_bytes + -n_bytes % ALIGNMENT_BYTES
    if start != len(payload):
        raise ValueError(f"the payload has {len(payload)} bytes, but its description says {start}")
    return EncodedItem(description, parts)


def _compressed(tensor: torch.Tensor, codec: str) -> CompressedTensor | None:
    """Return a tensor in a smaller form, or `None` if it is stored unchanged."""
    if not tensor.is_floating_point() or tensor.nbytes < _WORTH_CODING_BYTES or tensor.is_cuda:
        return None
    candidates: Sequence[TensorCompressor] = ()
    flat = tensor.reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)]
    if float((sample == 0).float().mean()) > _MOSTLY_ZERO:
        candidates = (SparseCompressionCompressor(),)
    elif codec == "int8":
        candidates = (INT8QuantizationCompressor(TOLERANCE),)
    for compressor in candidates:
        try:
            compressed = compressor.compress(tensor)
        except CodecError:
            continue
        if compressed.n_bytes < tensor.nbytes:
            return compressed
    return None
