"""Read many small tensors of a checkpoint with few requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import xxhash

from ...errors import CorruptDataError
from ...storage import DISK_BLOCK_BYTES, AlignedBuffer, DirectFile, TensorExtent
from .formats import TORCH_DTYPES

_MOST_GAP_BYTES = 32 << 10
_MOST_SPAN_BYTES = 1 << 20


def read_small_tensors(
    extents: Iterable[TensorExtent], file_of: Callable[[TensorExtent], DirectFile]
) -> dict[str, torch.Tensor]:
    """Return tensors by name, read whole and verified; adjacent ones share a request.

    Args:
        extents: their locations.
        file_of: returns the open file of an extent.

    Raises:
        CorruptDataError: a checksum does not match.
        StorageError: a file cannot be read.
    """
    tensors: dict[str, torch.Tensor] = {}
    for group in _neighbours(sorted(extents, key=lambda extent: (str(extent.path), extent.offset_bytes))):
        start = group[0].offset_bytes // DISK_BLOCK_BYTES * DISK_BLOCK_BYTES
        n_bytes = group[-1].offset_bytes + group[-1].n_bytes - start
        with AlignedBuffer(n_bytes) as buffer:
            file_of(group[0]).read_into(buffer.address, start, n_bytes)
            for extent in group:
                tensors[extent.name] = _checked_copy(buffer, extent, extent.offset_bytes - start)
    return tensors


def _neighbours(extents: list[TensorExtent]) -> Iterator[list[TensorExtent]]:
    """Yield runs of extents that are close together in one file."""
    group: list[TensorExtent] = []
    for extent in extents:
        if group:
            end = group[-1].offset_bytes + group[-1].n_bytes
            span = extent.offset_bytes + extent.n_bytes - group[0].offset_bytes
            near = extent.path == group[0].path and extent.offset_bytes - end <= _MOST_GAP_BYTES
            if not near or span > _MOST_SPAN_BYTES:
                yield group
                group = []
        group.append(extent)
    if group:
        yield group


def _checked_copy(buffer: AlignedBuffer, extent: TensorExtent, start: int) -> torch.Tensor:
    # A separate copy: a view would keep the whole buffer alive.
    data = bytearray(buffer.view[start : start + extent.n_bytes])
    page_bytes = extent.page_bytes or max(extent.n_bytes, 1)
    view = memoryview(data)
    for index, expected in enumerate(extent.checksums or ()):
        if xxhash.xxh3_64_intdigest(view[index * page_bytes : (index + 1) * page_bytes]) != expected:
            raise CorruptDataError(
                f"{extent.path}: {extent.name}: the checksum of page {index} does not match; the file is damaged; "
                "delete its directory to pack again",
                path=extent.path,
            )
    dtype = TORCH_DTYPES[extent.dtype]
    if not data:
        return torch.empty(extent.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(extent.shape)
