"""`Page` and `TensorEntry`: the Pager's records of a managed tensor."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from ...compression import Codec
from ...pools import FRAME_BYTES
from ...storage import DirectFile

PAGE_BYTES = 4 * 2**20
_REMEMBERED_RANGES = 64


class PageState(Enum):
    """Where the bytes of a page are. `SWAPPED`: on the SSD only, in a checkpoint or in the swap file."""

    RESIDENT = "resident"
    WRITING = "writing"
    SWAPPED = "swapped"
    LOADING = "loading"
    FREED = "freed"


IN_MEMORY = (PageState.RESIDENT, PageState.LOADING, PageState.WRITING)
"""The states in which a page has frames."""

TRANSITIONS = {
    (PageState.SWAPPED, PageState.LOADING),
    (PageState.SWAPPED, PageState.RESIDENT),
    (PageState.SWAPPED, PageState.FREED),
    (PageState.LOADING, PageState.RESIDENT),
    (PageState.LOADING, PageState.SWAPPED),
    (PageState.RESIDENT, PageState.WRITING),
    (PageState.RESIDENT, PageState.SWAPPED),
    (PageState.RESIDENT, PageState.FREED),
    (PageState.WRITING, PageState.SWAPPED),
    (PageState.WRITING, PageState.RESIDENT),
}


@dataclass(frozen=True, slots=True)
class FileSource:
    """Source of clean pages: the paged segment starts at `offset_bytes` of `file`."""

    file: DirectFile
    offset_bytes: int
    checksums: tuple[int, ...] | None = None


@dataclass(slots=True, eq=False)
class Page:
    """A range of a tensor that moves as a unit, in one SSD request.

    Attributes:
        start_bytes, stop_bytes: its range in the paged segment.
        frames_start, frames_stop: addresses of the page frames that move with it. A frame shared by two pages
            (segments read in place need not start on a frame boundary) belongs to neither and stays.
        pins: number of pins; a pinned page is not moved.
        awaited: number of threads waiting for it; once loaded, it stays until they continue.
        kept: part of the resident subset; other pages are dropped right after use.
        dirty: neither its source nor its swap extent, if any, holds its contents.
        aliased: views were handed out and may have written to it.
        unused: loaded, and not accessed since.
        untouched_bytes: while it is being read: memory its frames have not yet taken from the system.
    """

    entry: TensorEntry
    index: int
    start_bytes: int
    stop_bytes: int
    frames_start: int
    frames_stop: int
    state: PageState = PageState.SWAPPED
    pins: int = 0
    awaited: int = 0
    dirty: bool = False
    aliased: bool = False
    kept: bool = True
    unused: bool = False
    prefetched: bool = False
    verified: bool = False
    untouched_bytes: int = 0
    swap_offset: int | None = None
    last_access: int = 0
    error: Exception | None = None
    ticket: object = None

    @property
    def resident(self) -> bool:
        """Return whether its bytes are in memory and complete."""
        return self.state is PageState.RESIDENT

    @property
    def n_bytes(self) -> int:
        """Size of the frames that move with the page."""
        return self.frames_stop - self.frames_start


class TensorEntry:
    """The record of one managed tensor: codec, address, pages, segments.

    Args:
        tensor_id: unique within one Pager; the part before a `/`, if any, names the model (see `model_of`).
        kind: `weights`, `kv_cache`, `vision_features`, `text_embeddings` or `general`.
        shape, dtype: logical shape and dtype, as seen by the model.
        codec: how `segments` encode it.
        address: address of the paged segment, in reserved address space.
        paged: dtype and shape of the paged segment.
        resident: the other segments, by name; those named in the attribute `shared` apply to all rows.
        rows_per_page: rows per page (weights), or `None`: pages of `page_bytes` regardless of rows.
        original_bytes: size before encoding, such as in the checkpoint; `None`: the logical size.

    Attributes:
        logical_bytes: size as seen by the model.
        largest_page_bytes: size of its largest page, which must fit for the tensor to be used.
        writes: number of reported writes; writes through views are not counted.
    """

    def __init__(
        self,
        tensor_id: str,
        kind: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        codec: Codec,
        address: int,
        paged_dtype: torch.dtype,
        paged_shape: tuple[int, ...],
        resident: dict[str, torch.Tensor],
        *,
        rows_per_page: int | None,
        page_bytes: int,
        source: FileSource | None = None,
        original_bytes: int | None = None,
    ) -> None:
        self.tensor_id, self.kind, self.shape, self.dtype, self.codec = tensor_id, kind, shape, dtype, codec
        self.address, self.source, self.rows_per_page = address, source, rows_per_page
        rows, columns = paged_shape
        self.n_bytes = rows * columns * paged_dtype.itemsize
        self.rows = rows
        self.logical_bytes = math.prod(shape) * dtype.itemsize
        self.original_bytes = self.logical_bytes if original_bytes is None else original_bytes
        step = (rows_per_page * columns * paged_dtype.itemsize) if rows_per_page else page_bytes
        self.pages = self._cut(step)
        self.largest_page_bytes = max((page.n_bytes for page in self.pages), default=0)
        self.missing = len(self.pages)
        self.writes = 0
        self.freed = False
        self.on_released: Callable[[], None] | None = None
        self.joined: JoinedEntries | None = None
        data = alias_memory(address, self.n_bytes).view(paged_dtype).view(rows, columns)
        segments = codec.segments(shape, dtype)
        self._segments = {segments[0].name: data, **resident}  # the paged segment first
        self.shared = frozenset(segment.name for segment in segments if segment.shared)
        self._ranges: dict[tuple[int, int], dict[str, torch.Tensor]] = {(0, rows): self._segments}

    def _cut(self, step: int) -> list[Page]:
        pages = []
        base, end = self.address, self.address + self.n_bytes
        for index, start in enumerate(range(0, self.n_bytes, max(step, 1))):
            stop = min(start + step, self.n_bytes)
            low, high = base + start, base + stop
            frames_start = low // FRAME_BYTES * FRAME_BYTES if start == 0 else -(-low // FRAME_BYTES) * FRAME_BYTES
            frames_stop = -(-high // FRAME_BYTES) * FRAME_BYTES if high == end else high // FRAME_BYTES * FRAME_BYTES
            pages.append(Page(self, index, start, stop, frames_start, max(frames_start, frames_stop)))
        return pages

    @property
    def frames_bytes(self) -> int:
        """Size of all its frames, including those between pages."""
        start, end = self.address, self.address + self.n_bytes
        return -(-end // FRAME_BYTES) * FRAME_BYTES - start // FRAME_BYTES * FRAME_BYTES

    @property
    def beside_bytes(self) -> int:
        """Size of the segments that are not paged."""
        return sum(segment.nbytes for segment in list(self._segments.values())[1:])

    @property
    def aliased(self) -> bool:
        """Return whether views that may have written to it were handed out."""
        return any(page.aliased for page in self.pages)

    def shared_frames(self) -> list[int]:
        """Return the addresses of the frames between pages, which belong to no page."""
        return [
            frame
            for left, right in zip(self.pages, self.pages[1:], strict=False)
            for frame in range(left.frames_stop, right.frames_start, FRAME_BYTES)
        ]

    def row_range(self, first: int, last: int) -> tuple[int, int]:
        """Return the row range of the pages `first` (inclusive) to `last` (exclusive)."""
        if first == 0 and last == len(self.pages):
            return 0, self.rows
        assert self.rows_per_page is not None
        return first * self.rows_per_page, min(last * self.rows_per_page, self.rows)

    def encoded(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Return the segments of a range of rows, as cached views."""
        views = self._ranges.get((start, stop))
        if views is None:
            views = {
                name: segment if name in self.shared else segment[start:stop]
                for name, segment in self._segments.items()
            }
            if len(self._ranges) < _REMEMBERED_RANGES:
                self._ranges[start, stop] = views
        return views

    def share_segments(self, joined: JoinedEntries, resident: dict[str, torch.Tensor]) -> None:
        """Join several tensors that are treated as one: the small segments become part of theirs."""
        assert set(resident) == set(list(self._segments)[1:])
        self.joined = joined
        self._segments.update(resident)
        self._ranges = {(0, self.rows): self._segments}

    def holds(self, address: int) -> bool:
        """Return whether an address is in the paged segment."""
        return self.address <= address < self.address + self.n_bytes

    def mark_aliased(self) -> None:
        """Record that views were handed out; pages are checked for writes when they leave memory."""
        for page in self.pages:
            page.aliased = True

    def lease(self) -> tuple[torch.Tensor, object]:
        """Return the paged segment as a new uint8 tensor and the object that lives as long as any view of it."""
        buffer = (ctypes.c_uint8 * self.n_bytes).from_address(self.address)
        return _bytes_of(buffer), buffer


class JoinedEntries:
    """Tensors with consecutive rows in memory, treated as one; each is still paged separately.

    Created by `joined.join`.

    Attributes:
        entries: the tensors, in address order.
        rows: total number of rows.
        encoded: the segments of all rows.
    """

    def __init__(self, entries: tuple[TensorEntry, ...], encoded: dict[str, torch.Tensor]) -> None:
        self.entries = entries
        self.encoded = encoded
        self.rows = sum(entry.rows for entry in entries)


def model_of(tensor_id: str) -> str:
    """Return the name of the model that a weight belongs to; the main model's is empty."""
    return tensor_id.rpartition("/")[0]


def alias_memory(address: int, n_bytes: int) -> torch.Tensor:
    """Return a uint8 tensor over raw memory. The caller keeps the memory alive."""
    return _bytes_of((ctypes.c_uint8 * n_bytes).from_address(address))


def _bytes_of(buffer: ctypes.Array[ctypes.c_uint8]) -> torch.Tensor:
    # frombuffer refuses an empty buffer
    return torch.frombuffer(buffer, dtype=torch.uint8) if len(buffer) else torch.empty(0, dtype=torch.uint8)
