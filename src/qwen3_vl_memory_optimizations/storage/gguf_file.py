"""Headers of GGUF files: settings, and the position of each tensor. All contents are validated."""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError
from .safetensors_file import SafetensorsHeader, TensorExtent, unreadable

GGUF_PREFIX = "GGUF:"
"""Prefix of the dtype of extents in block formats: `GGUF:Q4_K`. Plain dtypes are spelled as in safetensors."""

_PLAIN = {0: ("F32", 4), 1: ("F16", 2), 30: ("BF16", 2), 24: ("I8", 1), 26: ("I32", 4), 27: ("I64", 8), 28: ("F64", 8)}
BLOCK_TYPES = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Type number -> its name, the values per block, and the bytes per block."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_RANK = 8
_MAX_NAME_BYTES = 1 << 16
_REMEDY = "the file is damaged or incomplete: download it again"
_KEPT_ARRAYS = ("tokenizer.ggml.tokens",)
_MOST_KEPT = 4096
"""Longer arrays are skipped: a tokenizer's merges take more memory than everything else here."""


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Contents of one GGUF file's header.

    Attributes:
        settings: the key-value pairs; long arrays are omitted, except for the vocabulary's tokens.
        tensors: the tensors by their names in the file. Shapes are `[rows, columns]`, as in torch.
    """

    settings: dict[str, Any]
    tensors: SafetensorsHeader


def read_gguf_header(path: str | Path) -> GGUFHeader:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: the file cannot be read, is truncated, has another version or byte order, or has tensors of
            an unknown type.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _Reader(path, file, os.fstat(file.fileno()).st_size).header()
    except OSError as error:
        raise unreadable(path, error) from error
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError, RecursionError) as error:
        message = f"{path}: the GGUF header cannot be read ({type(error).__name__}: {error}); {_REMEDY}"
        raise CheckpointError(message, path=path) from error


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self._path, self._file, self._file_bytes = path, file, file_bytes

    def header(self) -> GGUFHeader:
        if self._file.read(4) != b"GGUF":
            raise self._error("not a GGUF file")
        version, n_tensors, n_settings = self._unpack("IQQ")
        if version not in _VERSIONS:
            raise self._error(f"GGUF version {version}; versions 2 and 3, little-endian, are supported")
        settings: dict[str, Any] = {}
        for _ in range(n_settings):
            key = self._string()
            settings[key] = self._value(self._unpack("I")[0], key)
        entries = [self._entry() for _ in range(n_tensors)]
        alignment = int(settings.get("general.alignment", 32))
        if alignment <= 0:
            raise self._error(f"an alignment of {alignment} bytes")
        start = -(-self._file.tell() // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in entries:
            extent = self._extent(name, shape, kind, start + offset)
            if name in tensors:
                raise self._error(f"{name!r} appears twice")
            tensors[name] = extent
        return GGUFHeader(settings, SafetensorsHeader(self._path, start, tensors, {}))

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {what}; {_REMEDY}", path=self._path)

    def _take(self, n_bytes: int) -> bytes:
        data = self._file.read(n_bytes) if n_bytes <= self._file_bytes else b""
        if len(data) < n_bytes:
            raise self._error(f"the header continues past the end of the file at {self._file_bytes} bytes")
        return data

    def _unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))

    def _string(self) -> str:
        return self._take(self._unpack("Q")[0]).decode()

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(_SCALARS[kind])[0]
        item, count = self._unpack("IQ")
        keep = count <= _MOST_KEPT or key in _KEPT_ARRAYS
        if item in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[item]}")
            if keep:
                return list(struct.unpack(f"<{count}{_SCALARS[item]}", self._take(count * size)))
            self._file.seek(count * size, os.SEEK_CUR)
            return None
        kept = []
        for _ in range(count):
            value = self._value(item, "") if item == _ARRAY else self._take(self._unpack("Q")[0])
            if keep:
                kept.append(value.decode(errors="replace") if isinstance(value, bytes) else value)
        return kept if keep else None

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (rank,) = self._unpack("I")
        if rank > _MAX_RANK or len(name) > _MAX_NAME_BYTES:
            raise self._error(f"{name[:80]!r} has {rank} dimensions")
        sizes = self._unpack(f"{rank}Q")
        kind, offset = self._unpack("IQ")
        return name, tuple(reversed(sizes)), kind, offset

    def _extent(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorExtent:
        if kind in _PLAIN:
            dtype, itemsize = _PLAIN[kind]
            n_bytes = math.prod(shape) * itemsize
        elif kind in BLOCK_TYPES:
            type_name, block, block_bytes = BLOCK_TYPES[kind]
            if not shape or shape[-1] % block:
                raise self._error(f"{name!r} has shape {list(shape)}, but {type_name} has blocks of {block} columns")
            dtype, n_bytes = f"{GGUF_PREFIX}{type_name}", math.prod(shape) // block * block_bytes
        else:
            known = ", ".join([*(name for name, _ in _PLAIN.values()), *(name for name, *_ in BLOCK_TYPES.values())])
            raise CheckpointError(
                f"{self._path}: {name!r} has the GGUF type {kind}, not supported; supported: {known}", path=self._path
            )
        if offset + n_bytes > self._file_bytes:
            raise self._error(
                f"{name!r} is at bytes {offset} to {offset + n_bytes}, but the file has {self._file_bytes} bytes"
            )
        return TensorExtent(self._path, name, dtype, shape, offset, n_bytes)
