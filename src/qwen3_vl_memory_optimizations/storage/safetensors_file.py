"""Headers of safetensors files: the position of each tensor. All contents are validated."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .checksums import page_count

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element, by the safetensors type name."""

FORMAT_KEY = "qwen3vl_mem_format"
FORMAT_VERSION = "1"
PAGE_BYTES_KEY = "page_bytes"
CHECKSUMS_KEY = "checksums"
PADDING_PREFIX = "__pad_"
"""Metadata keys of a packed file (written by `packed.py`), and the prefix of its padding tensors."""

LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 64
_REMEDY = "the file is damaged or incomplete: download it again"


@dataclasses.dataclass(frozen=True, slots=True)
class TensorExtent:
    """Position of one tensor.

    Attributes:
        path: the file.
        name: the name of the tensor.
        dtype: the element type as spelled by safetensors: `F32`, `BF16`, `I8`, ...
        shape: the shape.
        offset_bytes: start of the data, from the start of the file.
        n_bytes: the size of the data.
        checksums: xxh3-64 of each page; `None` in a file that this library did not write.
        page_bytes: the size of a page; the last may be shorter; 0: the whole tensor is one page.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    n_bytes: int
    checksums: tuple[int, ...] | None = None
    page_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """Contents of one file's header.

    Attributes:
        path: the file.
        data_start_bytes: offset where the header ends and the data starts.
        tensors: the tensors by name, in file order.
        metadata: the texts in the header.
    """

    path: Path
    data_start_bytes: int
    tensors: dict[str, TensorExtent]
    metadata: dict[str, str]


def read_header(path: str | Path) -> SafetensorsHeader:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file cannot be read or is truncated, or its header contradicts itself or the file.
    """
    path = Path(path)
    raw, data_start, data_bytes = _read_raw(path)
    try:
        fields = json.loads(raw.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}); {_REMEDY}", path=path) from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; {_REMEDY}", path=path)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a map of texts; {_REMEDY}", path=path)
    extents = [_extent(path, name, fields[name], data_start, data_bytes) for name in fields]
    extents.sort(key=lambda extent: (extent.offset_bytes, extent.n_bytes))
    for before, after in zip(extents, extents[1:], strict=False):
        if before.offset_bytes + before.n_bytes > after.offset_bytes:
            raise CheckpointError(
                f"{path}: {before.name!r} ends at byte {before.offset_bytes + before.n_bytes}, after the "
                f"start of {after.name!r} at {after.offset_bytes}; {_REMEDY}",
                path=path,
            )
    if FORMAT_KEY in metadata:
        extents = _with_checksums(path, extents, metadata)
    return SafetensorsHeader(path, data_start, {extent.name: extent for extent in extents}, metadata)


def write_header(tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a safetensors file with consecutive tensors.

    Args:
        tensors: name -> dtype as named by the format, shape, bytes; in file order.
        metadata: texts to store.
    """
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, n_bytes) in tensors.items():
        start, end = end, end + n_bytes
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file or directory of a checkpoint that cannot be opened or read."""
    remedy = "ask for read permission" if isinstance(error, PermissionError) else "download the checkpoint again"
    return CheckpointError(f"{path}: cannot be read: {error.strerror}; {remedy}", path=path)


def _read_raw(path: Path) -> tuple[bytes, int, int]:
    """Return the header text, the start of the data, and the size of the data."""
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            data_start = LENGTH_BYTES + length
            if len(prefix) < LENGTH_BYTES or data_start > file_bytes or length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: the header should have {length} bytes; the file has {file_bytes} bytes, and a "
                    f"header may have {_MAX_HEADER_BYTES}; {_REMEDY}",
                    path=path,
                )
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    return raw, data_start, file_bytes - data_start


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("the same name twice")
    return fields


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _extent(path: Path, name: str, field: Any, data_start: int, data_bytes: int) -> TensorExtent:
    field = field if isinstance(field, dict) else {}
    dtype, shape, span = field.get("dtype"), field.get("shape"), field.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or not isinstance(shape, list)
        or not isinstance(span, list)
        or len(span) != 2
        or len(shape) > _MAX_RANK
        or not all(map(_is_size, shape + span))
    ):
        raise CheckpointError(
            f"{path}: the entry of {name!r} has no usable dtype, shape or offsets; {_REMEDY}", path=path
        )
    if dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{path}: {name!r} has the type {dtype!r}; supported types: {', '.join(DTYPE_BITS)}. "
            "Convert the checkpoint to one of them",
            path=path,
        )
    begin, end = span
    if not begin <= end <= data_bytes:
        raise CheckpointError(
            f"{path}: {name!r} is at bytes {begin} to {end} of the data, but the file has {data_bytes} bytes "
            f"of data; {_REMEDY}",
            path=path,
        )
    n_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if n_bits != 8 * (end - begin):
        raise CheckpointError(
            f"{path}: {name!r} has {end - begin} bytes, but {shape} of {dtype} needs {-(-n_bits // 8)}; {_REMEDY}",
            path=path,
        )
    return TensorExtent(path, name, dtype, tuple(shape), data_start + begin, end - begin)


def _with_checksums(path: Path, extents: list[TensorExtent], metadata: dict[str, str]) -> list[TensorExtent]:
    remedy = "delete the packed checkpoint to have it packed again"
    if metadata[FORMAT_KEY] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: packed in format {metadata[FORMAT_KEY]!r}, but this version reads {FORMAT_VERSION!r}; {remedy}",
            path=path,
        )
    try:
        page_bytes = json.loads(metadata[PAGE_BYTES_KEY])
        checksums = json.loads(metadata[CHECKSUMS_KEY])
        checked = []
        for extent in extents:
            if not extent.name.startswith(PADDING_PREFIX):
                sums = tuple(int(text, 16) for text in checksums[extent.name])
                size = page_bytes[extent.name]
                if not _is_size(size) or len(sums) != page_count(extent.n_bytes, size):
                    raise ValueError(f"{extent.name!r}: {len(sums)} checksums for {size!r}-byte pages")
                extent = dataclasses.replace(extent, checksums=sums, page_bytes=size)
            checked.append(extent)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the checksums cannot be read ({error!r}); {remedy}", path=path) from error
    return checked
