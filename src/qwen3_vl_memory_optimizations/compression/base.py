"""What every codec is: a row-wise mapping between a matrix and its encoded segments.

A tensor of shape `[rows, ...]` is seen as a matrix `[rows, columns]`. A codec describes its encoded form as *segments*;
the first one is paged (moved between tiers by ranges of rows), the others are small and stay resident. Because every
segment is indexed by row, any range of rows can be encoded, decoded and multiplied on its own: a weight larger than the
memory is computed on piece by piece.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..errors import CodecError

ROW_MULTIPLE = 16
"""Weights are cut between rows at multiples of this: torch's fp32 products sum in another order in a narrower rest.
(With several rows of activations some libraries do so in any cut: see `Codec.wants_whole`.)"""

STEP_ELEMENTS = 1 << 18
"""How many values to work on at a time, so that intermediate results stay in the processor's cache."""

Encoded = Mapping[str, torch.Tensor]
"""Segment name -> tensor, all with the same leading number of rows."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of an encoded form: `shape[0]` is the number of rows of the tensor, unless all rows share the part."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shared: bool = False

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""
        n_elements = 1
        for extent in self.shape:
            n_elements *= extent
        return n_elements * self.dtype.itemsize


class Scratch:
    """Reusable memory for transient results; grows to the largest request and is then only reused.

    One slot a purpose: two slots are alive at the same time, two requests for one slot are not.

    Args:
        on_grow: called with the additional bytes *before* they are allocated; may raise to refuse them.
        slot_bytes: the size a user of a slot should keep to, by working in several steps.
    """

    def __init__(self, on_grow: Callable[[int], None] | None = None, slot_bytes: int = 16 * 2**20) -> None:
        self.slot_bytes = slot_bytes
        self._slots: dict[str, torch.Tensor] = {}
        self._on_grow = on_grow

    def get(self, slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor of this shape in the memory of `slot`."""
        n_elements = 1
        for extent in shape:
            n_elements *= extent
        n_bytes = n_elements * dtype.itemsize
        buffer = self._slots.get(slot)
        if buffer is None or buffer.numel() < n_bytes:
            held_bytes = 0 if buffer is None else buffer.numel()
            if self._on_grow is not None:
                self._on_grow(n_bytes - held_bytes)
            del buffer
            self._slots.pop(slot, None)  # the old memory goes before the new one comes
            buffer = self._slots[slot] = torch.empty(n_bytes, dtype=torch.uint8)
        return buffer[:n_bytes].view(dtype).view(shape)

    @property
    def n_bytes(self) -> int:
        """Bytes held."""
        return sum(buffer.numel() for buffer in self._slots.values())

    def clear(self) -> None:
        """Let go of the memory."""
        self._slots.clear()


class LinearInput:
    """The left operand of a product, with the forms codecs derive from it computed once.

    Args:
        x: activations `[..., columns]`, floating point; seen as `x2d` of shape `[M, columns]`.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self.x2d = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        self._derived: dict[object, object] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (M) and columns."""
        rows, columns = self.x2d.shape
        return rows, columns

    @property
    def rows(self) -> int:
        """M, the number of rows of `x2d`."""
        return self.x2d.shape[0]

    @property
    def given_dtype(self) -> torch.dtype:
        """The dtype of the activations as they were given."""
        return self.x2d.dtype

    def derived(self, key: object, compute: Callable[[torch.Tensor], object]) -> object:
        """Return `compute(x2d)`, computed at the first call for `key`."""
        return self.once(key, lambda: compute(self.x2d))

    def once(self, key: object, make: Callable[[], object]) -> object:
        """Return `make()`, called at the first call for `key`."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def parts(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield ranges of rows with a copy of their values in fp32: never all at once where there are many."""
        rows, columns = self.x2d.shape
        step = max(1, STEP_ELEMENTS // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield start, stop, self.x2d[start:stop].to(torch.float32, copy=True)


class Codec(ABC):
    """Encodes rows of a matrix and computes with the encoded form.

    Class attributes:
        name: the key in the registry and in packed checkpoints.
        lossless: whether `decode(encode(w))` is `w`, bit by bit.
        fallback: the codec for weights that this one does not take.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    fallback: ClassVar[str] = "none"

    @property
    def stored_name(self) -> str:
        """The name in packed checkpoints: another one where the encoded form has variants."""
        return self.name

    def fit(self, values: Callable[[], torch.Tensor]) -> Codec:
        """Return the codec for one tensor, where its encoded form depends on more than the shape (rank, sparsity).

        `stored_name` then holds, after a colon, what `restored` needs.

        Args:
            values: gives the whole tensor; only codecs that must look call it.

        Raises:
            CodecError: the tensor does not suit this codec.
        """
        return self

    def restored(self, parameters: str) -> Codec:
        """Return the codec of a tensor that was encoded by a fitted one, from what its `stored_name` says."""
        raise CodecError(f"the codec {self.name!r} takes no parameters, {parameters!r} were given")

    @abstractmethod
    def supports(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether tensors of this shape and dtype can be encoded."""

    @abstractmethod
    def segments(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Segment, ...]:
        """Return the segments of the encoded form of a tensor of this shape and dtype; the first is the paged one."""

    def row_block(self, shape: tuple[int, ...]) -> int:
        """How many rows of a tensor of this shape are encoded together.

        Rows that are encoded, decoded or multiplied start at a multiple of it, and end at one or with the tensor. Only
        where it is 1 single rows can be looked up.
        """
        return 1

    @abstractmethod
    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode a range of rows `[n, ...]`.

        Raises:
            CodecError: values that this codec cannot represent.
        """

    @abstractmethod
    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        """Decode a range of rows into `out` `[n, columns]` (any floating dtype) and return it."""

    @abstractmethod
    def linear(self, x: LinearInput, encoded: Encoded, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        """Return `x @ rows.T + bias` of shape `[M, n]` in the dtype of `x`; `bias` `[n]` is that of these rows."""

    def wants_whole(self, x: LinearInput) -> bool:
        """Whether a product should have all rows of the weight at once where memory allows, to keep its bits.

        In fp32 with several rows: MKL on Intel chooses its kernel by the width of the matrix, bits included.
        """
        return x.rows > 1 and x.x2d.dtype == torch.float32


def linear_in_steps(
    x: LinearInput,
    encoded: Encoded,
    bias: torch.Tensor | None,
    decode: Callable[[Encoded, torch.Tensor], torch.Tensor],
    scratch: Scratch,
    *,
    slots: int = 1,
) -> torch.Tensor:
    """Return `x @ rows.T + bias`, decoding as many rows at a time as `slots` of scratch memory take."""
    rows, columns = len(next(iter(encoded.values()))), x.x2d.shape[1]
    fitting = slots * scratch.slot_bytes // (columns * x.x2d.element_size())
    step = max(ROW_MULTIPLE, fitting // ROW_MULTIPLE * ROW_MULTIPLE)
    if rows <= step:
        return F.linear(x.x2d, decode(encoded, scratch.get("decoded", (rows, columns), x.x2d.dtype)), bias)
    out = x.x2d.new_empty((x.rows, rows))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = {name: segment[start:stop] for name, segment in encoded.items()}
        decoded = decode(part, scratch.get("decoded", (stop - start, columns), x.x2d.dtype))
        out[:, start:stop] = F.linear(x.x2d, decoded, None if bias is None else bias[start:stop])
    return out


def bf16_at_least(values: torch.Tensor) -> torch.Tensor:
    """Return the smallest bf16 values that are not below `values` (fp32, not negative), as fp32."""
    bits = values.view(torch.int32)
    return torch.where((bits & 0xFFFF) == 0, bits, (bits & -0x10000) + 0x10000).view(torch.float32)


def columns_of(shape: tuple[int, ...]) -> int:
    """Return the number of columns of the matrix view of a tensor of this shape."""
    n = 1
    for extent in shape[1:]:
        n *= extent
    return n
