"""Snapshots for inspection: `TensorUse` (memory held by a tensor) and `TensorPages` (state of each page)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .entry import IN_MEMORY, Page, PageState, TensorEntry

PAGE_LETTERS = {
    PageState.RESIDENT: "r",
    PageState.LOADING: "l",
    PageState.WRITING: "w",
    PageState.SWAPPED: "s",
    PageState.FREED: "f",
}
"""One letter per state. A resident page that is in use is `PINNED` instead."""

PINNED = "p"


@dataclass(frozen=True, slots=True)
class TensorUse:
    """Memory held by one tensor.

    Attributes:
        lossless: whether its codec reproduces the same bits.
        logical_bytes: its size as the model sees it; `original_bytes`: its size before encoding, such as in the
            checkpoint, whose dtype may differ; `encoded_bytes`: size of the paged part of its encoded form.
        beside_bytes: size of the remaining part, such as scales, which stays in memory.
        resident_bytes: how much of the paged part is in memory.
        undroppable_bytes: how much of that cannot be dropped immediately, because it is in use or dirty.
    """

    tensor_id: str
    kind: str
    codec: str
    lossless: bool
    logical_bytes: int
    original_bytes: int
    encoded_bytes: int
    beside_bytes: int
    resident_bytes: int
    undroppable_bytes: int


@dataclass(frozen=True, slots=True)
class TensorPages:
    """One tensor and the states of its pages, in address order.

    Attributes:
        n_bytes: size of the paged part of its encoded form.
        states: one letter per page, see `PAGE_LETTERS`.
    """

    tensor_id: str
    kind: str
    codec: str
    n_bytes: int
    states: str


def describe_use(entry: TensorEntry) -> TensorUse:
    """Return the memory a tensor holds now. Needs the Pager's lock."""
    there = [page for page in entry.pages if page.state in IN_MEMORY]
    return TensorUse(
        entry.tensor_id,
        entry.kind,
        entry.codec.name,
        entry.codec.lossless,
        entry.logical_bytes,
        entry.original_bytes,
        entry.n_bytes,
        entry.beside_bytes,
        sum(page.stop_bytes - page.start_bytes for page in there),
        sum(page.stop_bytes - page.start_bytes for page in there if page.dirty or page.pins),
    )


def describe_pages(entries: Iterable[TensorEntry]) -> list[TensorPages]:
    """Return the current page states of tensors; takes about 0.3 us per page. Needs the Pager's lock."""
    return [
        TensorPages(
            entry.tensor_id, entry.kind, entry.codec.name, entry.n_bytes, "".join(_letter(page) for page in entry.pages)
        )
        for entry in entries
    ]


def _letter(page: Page) -> str:
    return PINNED if page.pins and page.state is PageState.RESIDENT else PAGE_LETTERS[page.state]
