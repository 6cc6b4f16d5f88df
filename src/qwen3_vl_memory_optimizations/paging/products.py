"""`Products`: compute products with weights on the encoded form while its pages are in memory."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from ..compression import Codec, LinearInput, Scratch, columns_of
from ..compression.base import Encoded
from ..interrupts import shield
from ..pools import FramePool
from .records.entry import TensorEntry
from .transfers.access import Access

_WHOLE_SHARE = 4


class Products:
    """Computes products with the weights of a Pager.

    Args:
        access: pins their pages in memory.
        frames: their limit decides which tensors may be in memory whole.
        scratch: returns the calling thread's workspace.
    """

    def __init__(self, access: Access, frames: FramePool, scratch: Callable[[], Scratch]) -> None:
        self._access = access
        self._frames = frames
        self._scratch = scratch
        self._local = threading.local()

    @property
    def scratch(self) -> Scratch:
        """The calling thread's workspace."""
        return self._scratch()

    def linear(self, entry: TensorEntry, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x @ W.T + bias`, computed on the encoded form in ranges of rows of W as they become resident."""
        left, held = self._left_operand(x), (entry,)
        with shield:
            if self._access.hold(held):
                try:
                    out = entry.codec.linear(left, entry.encoded(0, entry.rows), bias, self._scratch())
                finally:
                    self._access.let_go(held)
            elif len(entry.pages) > 1 and entry.codec.wants_whole(left) and self._fits_whole(entry):
                self._access.pin(entry)
                try:
                    out = entry.codec.linear(left, entry.encoded(0, entry.rows), bias, self._scratch())
                finally:
                    self._access.unpin(entry)
            else:
                out = self._linear_in_ranges(entry, left, bias)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], entry.rows)

    def linear_transposed(self, entry: TensorEntry, grad: torch.Tensor) -> torch.Tensor:
        """Return `grad @ W` for `[..., rows]`, in the dtype of `grad`: the gradient of the input of `linear`.

        The result is `[..., columns]`. W is decoded in ranges of rows as they become resident. The sum is in fp32, or
        fp64 if `grad` is fp64.
        """
        columns, dtype = columns_of(entry.shape), grad.dtype
        grad2d = grad.reshape(-1, entry.rows)
        sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        out = torch.zeros((grad2d.shape[0], columns), dtype=sum_dtype)
        with shield:
            for start, rows in self.decoded_parts(entry, sum_dtype):
                out.addmm_(grad2d[:, start : start + len(rows)].to(sum_dtype), rows)
        return out.to(dtype).view(*grad.shape[:-1], columns)

    def decoded_parts(self, entry: TensorEntry, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield all rows in parts: the number of the first row, and the values `[n, columns]` in a workspace.

        The values are valid until the next part is requested.
        """
        columns = columns_of(entry.shape)
        step = max(1, self._scratch().slot_bytes // (columns * dtype.itemsize))
        for first, last in self._access.row_ranges(entry):
            for start in range(first, last, step):
                stop = min(start + step, last)
                rows = self._scratch().get("decoded", (stop - start, columns), dtype)
                yield start, entry.codec.decode(entry.encoded(start, stop), rows)

    def linear_joined(self, entries: Sequence[TensorEntry], x: torch.Tensor) -> torch.Tensor:
        """Return `x @ W.T` for the rows of several tensors, concatenated: one product if they are joined (see `join`).

        If any of them is not in memory, each product is computed separately as its rows are loaded.
        """
        joined = entries[0].joined
        if joined is not None and joined.entries == tuple(entries):
            with shield:
                if self._access.hold(joined.entries):
                    try:
                        out = entries[0].codec.linear(self._left_operand(x), joined.encoded, None, self._scratch())
                    finally:
                        self._access.let_go(joined.entries)
                    return out if x.dim() == 2 else out.view(*x.shape[:-1], joined.rows)
        return torch.cat([self.linear(entry, x, None) for entry in entries], dim=-1)

    @contextmanager
    def whole(self, entries: Sequence[TensorEntry]) -> Iterator[bool]:
        """Hold whole tensors in memory for several products; counts as one access to each, in this order.

        Yields:
            Whether they are in memory; `False` if they would displace too much other data.
        """
        missing_bytes = sum(entry.n_bytes for entry in entries if entry.missing)
        if missing_bytes > self._frames.limit_bytes // _WHOLE_SHARE:
            yield False
            return
        with shield, ExitStack() as pins:
            for entry in entries:
                self._access.pin(entry)
                pins.callback(self._access.unpin, entry)
            yield True

    @contextmanager
    def held(self, groups: Sequence[Sequence[TensorEntry]]) -> Iterator[list[tuple[Codec, Encoded]] | None]:
        """Hold weights in memory for code that computes on their encoded rows; counts as one access to each.

        Args:
            groups: each either one tensor or several that are joined (see `join`).

        Yields:
            Codec and encoded rows of each group; `None`, with nothing held, if a page is not in memory or tensors of
            a group are not joined.
        """
        entries = [entry for group in groups for entry in group]
        joined = all(
            len(group) == 1 or (group[0].joined is not None and group[0].joined.entries == tuple(group))
            for group in groups
        )
        if not joined:
            yield None
            return
        with shield:
            if not self._access.hold(entries):
                yield None
                return
            try:
                yield [(group[0].codec, _encoded(group)) for group in groups]
            finally:
                self._access.let_go(entries)

    def linear_of_whole(self, entry: TensorEntry, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x @ W.T + bias` inside `whole`, which already counted the access."""
        out = entry.codec.linear(self._left_operand(x), entry.encoded(0, entry.rows), bias, self._scratch())
        return out if x.dim() == 2 else out.view(*x.shape[:-1], entry.rows)

    def _left_operand(self, x: torch.Tensor) -> LinearInput:
        """Return `x` prepared as a left operand, reusing the previous product's if its input was the same (q, k, v)."""
        if x.is_inference():  # has no version counter: it may have been written to since
            return LinearInput(x)
        last = getattr(self._local, "left", None)
        if last is not None and last[0]() is x and last[1] == x._version:
            return last[2]
        left = LinearInput(x)
        self._local.left = (weakref.ref(x), x._version, left)
        return left

    def _fits_whole(self, entry: TensorEntry) -> bool:
        """Return whether a tensor may evict others to be in memory whole; a larger one would evict most of them."""
        return entry.missing == 0 or entry.n_bytes <= self._frames.limit_bytes // _WHOLE_SHARE

    def _linear_in_ranges(self, entry: TensorEntry, left: LinearInput, bias: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor | None = None
        for start, stop in self._access.row_ranges(entry):
            part_bias = bias if bias is None else bias[start:stop]
            part = entry.codec.linear(left, entry.encoded(start, stop), part_bias, self._scratch())
            if stop - start == entry.rows:
                out = part
            else:
                if out is None:
                    out = part.new_empty((left.rows, entry.rows))
                out[:, start:stop] = part
        assert out is not None
        return out


def _encoded(group: Sequence[TensorEntry]) -> Encoded:
    joined = group[0].joined
    return group[0].encoded(0, group[0].rows) if len(group) == 1 or joined is None else joined.encoded
