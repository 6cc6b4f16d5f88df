"""Compact memory map: the tensors, sent once, and the run-length encoded states of all pages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ...paging import TensorPages

_RUN = re.compile(r"(\d+)([a-z])")


class MappedTensor(NamedTuple):
    """A tensor of the map, without the states of its pages."""

    kind: str
    codec: str
    n_bytes: int
    n_pages: int


class MapWriter:
    """Turns maps into changes since the previous map."""

    def __init__(self) -> None:
        self._known: dict[str, MappedTensor] = {}
        self._runs: str | None = None

    def changes(self, tensors: Sequence[TensorPages]) -> dict[str, Any]:
        """Return the changes since the previous map, for `MemoryMap.after`; empty if nothing changed."""
        states = {each.tensor_id: each.states for each in tensors}
        now = {each.tensor_id: MappedTensor(each.kind, each.codec, each.n_bytes, len(each.states)) for each in tensors}
        gone = [key for key, tensor in self._known.items() if now.get(key) != tensor]
        for key in gone:
            del self._known[key]
        new = {key: tensor for key, tensor in now.items() if key not in self._known}
        self._known.update(new)
        runs = shorten("".join(states[key] for key in self._known))
        changes: dict[str, Any] = {}
        if gone or new:
            changes["tensors"] = {"remove": gone, "add": [[key, *tensor] for key, tensor in new.items()]}
        if runs != self._runs:
            changes["map"] = self._runs = runs
        return changes


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """The location of each page, rebuilt from changes.

    Attributes:
        tensors: by id, in the order of `runs`.
        runs: the concatenated states of their pages, encoded by `shorten`.
    """

    tensors: Mapping[str, MappedTensor] = field(default_factory=dict)
    runs: str = ""

    def after(self, changes: Mapping[str, Any]) -> MemoryMap:
        """Return the map after the given changes."""
        tensors = self.tensors
        if "tensors" in changes:
            removed = set(changes["tensors"]["remove"])
            kept = {key: tensor for key, tensor in tensors.items() if key not in removed}
            tensors = kept | {key: MappedTensor(*facts) for key, *facts in changes["tensors"]["add"]}
        return MemoryMap(tensors, changes.get("map", self.runs))

    def states(self) -> dict[str, str]:
        """Return the page states of each tensor as letters."""
        letters = "".join(letter * int(count) for count, letter in _RUN.findall(self.runs))
        states, start = {}, 0
        for key, tensor in self.tensors.items():
            states[key] = letters[start : start + tensor.n_pages]
            start += tensor.n_pages
        return states


def merge_changes(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two consecutive changes into one."""
    merged = {key: value for key, value in {**first, **second}.items() if key == "map"}
    if "tensors" in first or "tensors" in second:
        one, two = (each.get("tensors", {"remove": [], "add": []}) for each in (first, second))
        removed = set(two["remove"])
        merged["tensors"] = {
            "remove": list(dict.fromkeys([*one["remove"], *two["remove"]])),
            "add": [row for row in one["add"] if row[0] not in removed] + two["add"],
        }
    return merged


def shorten(states: str) -> str:
    """Run-length encode a string of letters: `rrrs` is `3r1s`."""
    return "".join(f"{len(list(run))}{letter}" for letter, run in groupby(states))
