"""`check`: compare the Pager's counters with the actual state, for tests and for diagnosis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ...pools import FRAME_BYTES, FramePool, units_of
from ...storage import SwapFile
from ..transfers.moves import PageMover
from .entry import IN_MEMORY, Page, PageState, TensorEntry


def check(
    entries: Iterable[TensorEntry], frames: FramePool, mover: PageMover, swap: SwapFile, *, complete: bool
) -> None:
    """Assert that counters, pages, frames and the swap file agree. Called under the Pager's lock.

    Args:
        entries: all tensors that have memory, including freed ones that callers still hold.
        frames, mover, swap: what the tensors use.
        complete: no tensor whose frames already count is about to be added.
    """
    entries = list(entries)
    for entry in entries:
        missing = sum(page.state is not PageState.RESIDENT for page in entry.pages)
        assert entry.missing == missing, (entry.tensor_id, entry.missing, missing)
    pages = [page for entry in entries for page in entry.pages]
    for page in pages:
        _check_page(page)
    there = [page for page in pages if page.state in IN_MEMORY]
    if complete:
        between = sum(len(entry.shared_frames()) for entry in entries) * FRAME_BYTES
        _equal("bytes of frames", frames.used_bytes, _bytes_of(there) + between)
        extents = [page.swap_offset for page in pages if page.swap_offset is not None]
        assert len(extents) == len(set(extents)), "two pages share one extent of the swap file"
        _equal("extents of the swap file", set(swap.extents()), set(extents))
    units = {unit for page in there for unit in units_of(page.frames_start, page.n_bytes)}
    assert not units & set(frames.free_units()), "a free frame belongs to a page in memory"
    moving = Counter(page.state for page in pages)
    _equal("transfers", mover.moving, moving[PageState.LOADING] + moving[PageState.WRITING])
    _equal("bytes being written out", mover.leaving_bytes, _bytes_of(p for p in there if p.state is PageState.WRITING))
    _equal("prefetched bytes", mover.ahead_bytes, _bytes_of(p for p in there if p.unused and not p.kept))
    if complete:
        weights = (page for page in there if page.entry.kind == "weights")
        _equal("bytes of weights", mover.weights_resident_bytes, _bytes_of(weights))
    loading = (page for page in there if page.state is PageState.LOADING)
    _equal("untouched bytes", mover.untouched_bytes, sum(page.untouched_bytes for page in loading))
    swap.check()


def _check_page(page: Page) -> None:
    name = (page.entry.tensor_id, page.index, page.state)
    assert page.pins >= 0 and page.awaited >= 0, (name, page.pins, page.awaited)
    assert page.state is not PageState.FREED, name
    assert not page.pins or page.state is PageState.RESIDENT, (name, page.pins)
    if page.state in (PageState.SWAPPED, PageState.LOADING):
        assert not page.dirty, name
        assert page.swap_offset is not None or page.entry.source is not None, name
    if page.state is PageState.WRITING:
        assert page.dirty and page.swap_offset is not None, name


def _bytes_of(pages: Iterable[Page]) -> int:
    return sum(page.n_bytes for page in pages)


def _equal(what: str, counted: object, found: object) -> None:
    assert counted == found, f"{what}: {counted} counted, {found} found"
