"""The codec interface: a row-wise mapping between a matrix and its encoded segments.

A tensor of shape `[rows, ...]` is treated as a matrix `[rows, columns]`. A codec describes its encoded form as
*segments*. The first segment is paged (moved between tiers in ranges of rows); the others are small and stay resident.
Every segment is indexed by row, so any range of rows can be encoded, decoded and multiplied independently. A weight
larger than memory is therefore computed in parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..errors import CodecError
from ..native import Weight

ROW_MULTIPLE = 16
"""torch's fp32 GEMM sums a narrower tail in another order, so weights are split only at multiples of this many rows.
(With several rows of activations some libraries do so at any split: see `Codec.wants_whole`.)"""

STEP_ELEMENTS = 1 << 18
"""Values to process at a time, so that intermediate results stay in the processor's cache."""

Encoded = Mapping[str, torch.Tensor]
"""Segment name -> tensor, all with the same number of rows."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of an encoded form: `shape[0]` is the tensor's number of rows, unless all rows share the part."""

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


@dataclass(frozen=True, slots=True)
class Compensation:
    """How errors in columns of a weight are made up for, in the order in which its codec encodes them.

    The sum of squared errors of a layer's outputs is `|| E R ||^2`, where E are the errors of the weight and R is upper
    triangular: `R R^T` are the sums of products of the inputs. So column k, which is encoded after the columns before
    it, is aimed at its value plus `E[:, :k] @ feedback[:k, k]`.

    Attributes:
        feedback: fp32 `[columns, columns]`: R with each column divided by its diagonal element.
        importance: fp32 `[columns]`: squares of the diagonal.
    """

    feedback: torch.Tensor
    importance: torch.Tensor


class Scratch:
    """Reusable memory for transient results; grows to the largest request and is then reused.

    Use one slot per purpose: two slots can be in use at once, two requests for the same slot cannot.

    Args:
        on_grow: called with the additional bytes *before* they are allocated; may raise to refuse them.
        slot_bytes: the size that users of a slot should stay within, by working in steps.
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
            self._slots.pop(slot, None)  # free the old memory before allocating the new
            buffer = self._slots[slot] = torch.empty(n_bytes, dtype=torch.uint8)
        return buffer[:n_bytes].view(dtype).view(shape)

    @property
    def n_bytes(self) -> int:
        """Bytes held."""
        return sum(buffer.numel() for buffer in self._slots.values())

    def clear(self) -> None:
        """Free the memory."""
        self._slots.clear()


class LinearInput:
    """The left operand of a product; forms that codecs derive from it are computed once.

    Args:
        x: activations `[..., columns]`, floating point; available as `x2d` of shape `[M, columns]`.
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
        """Original dtype of the activations."""
        return self.x2d.dtype

    def derived(self, key: object, compute: Callable[[torch.Tensor], object]) -> object:
        """Return `compute(x2d)`, computed on the first call for `key`."""
        return self.once(key, lambda: compute(self.x2d))

    def once(self, key: object, make: Callable[[], object]) -> object:
        """Return `make()`, called on the first call for `key`."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def parts(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield ranges of rows with an fp32 copy of their values; many rows are never copied all at once."""
        rows, columns = self.x2d.shape
        step = max(1, STEP_ELEMENTS // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield start, stop, self.x2d[start:stop].to(torch.float32, copy=True)


class Codec(ABC):
    """Encodes rows of a matrix and computes with the encoded form.

    Class attributes:
        name: the key in the registry and in packed checkpoints.
        lossless: whether `decode(encode(w))` equals `w` bit by bit.
        fallback: the codec for weights that this one does not support.
        suits_vocabulary: whether embeddings and heads, which are the most sensitive, may be stored with it.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    fallback: ClassVar[str] = "none"
    suits_vocabulary: ClassVar[bool] = True

    @property
    def stored_name(self) -> str:
        """Name in packed checkpoints; differs from `name` if the encoded form has variants."""
        return self.name

    def fit(self, values: Callable[[], torch.Tensor]) -> Codec:
        """Return the codec for one tensor, if its encoded form depends on more than the shape (rank, sparsity).

        `stored_name` then holds the parameters for `restored` after a colon.

        Args:
            values: returns the whole tensor; called only by codecs that need the values.

        Raises:
            CodecError: the tensor does not suit this codec.
        """
        return self

    def restored(self, parameters: str) -> Codec:
        """Return the codec of a tensor that a fitted codec encoded, from the parameters in its `stored_name`."""
        raise CodecError(f"the codec {self.name!r} takes no parameters, but got {parameters!r}")

    @abstractmethod
    def supports(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Return whether tensors of this shape and dtype can be encoded."""

    @abstractmethod
    def segments(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Segment, ...]:
        """Return the segments of the encoded form of a tensor of this shape and dtype; the first is the paged one."""

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
        """Return `x @ rows.T + bias` of shape `[M, n]` in the dtype of `x`; `bias` `[n]` belongs to these rows."""

    def native_weight(self, encoded: Encoded) -> Weight | None:
        """Return encoded rows as the native core's layer steps take them, valid while the rows stay in place.

        `None`: the native core does not know this codec.
        """
        return None

    @property
    def compensates(self) -> bool:
        """Whether `encode` can make later columns of a row compensate errors of earlier ones (see `compensation`)."""
        return False

    def compensation(self, inputs: torch.Tensor) -> Compensation:
        """Return how errors are compensated, for inputs `[m, columns]` of the layer whose weight is to be encoded.

        Raises:
            CodecError: this codec does not; or the inputs are not finite.
        """
        raise CodecError(f"the codec {self.name!r} does not compensate errors")

    def encode_compensated(self, rows: torch.Tensor, compensation: Compensation) -> dict[str, torch.Tensor]:
        """Encode a range of rows `[n, ...]` so that products with the inputs change least.

        Raises:
            CodecError: values that this codec cannot represent; or it does not compensate errors.
        """
        raise CodecError(f"the codec {self.name!r} does not compensate errors")

    def wants_whole(self, x: LinearInput) -> bool:
        """Return whether a product needs all rows of the weight at once, where memory allows, for identical bits.

        True for fp32 with several rows: MKL on Intel chooses its kernel, and so the bits, by the matrix width.
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
    """Return `x @ rows.T + bias`, decoding as many rows at a time as fit in `slots` slots of scratch memory."""
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
    """Return the smallest bf16 values not below `values` (fp32, non-negative), as fp32."""
    bits = values.view(torch.int32)
    return torch.where((bits & 0xFFFF) == 0, bits, (bits & -0x10000) + 0x10000).view(torch.float32)


def columns_of(shape: tuple[int, ...]) -> int:
    """Return the number of columns of the matrix view of a tensor of this shape."""
    n = 1
    for extent in shape[1:]:
        n *= extent
    return n
