"""INT4: group-wise, asymmetric, rounded to nearest (RTN). Half the bytes of INT8, and clearly less accurate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from ...errors import CodecError
from ..base import Codec, Encoded, LinearInput, Scratch, Segment, bf16_at_least, columns_of

_LEVELS = 15
_MIDDLE = 8
_PARAMETER_BYTES = 4
_BLOCK_BYTES = 2 << 20
_MOST_PACKED_ROWS = 32
LAYOUTS = (64, 32)
"""Rows interleaved by torch's kernel: 64 with AVX512, 32 with AVX2."""


class INT4Codec(Codec):
    """Half a byte per weight, and a bf16 scale and zero point for each group of columns in a row.

    A weight is `(q - 8) * scale + zero`. Everything is in the one paged segment, because scales of 12 % of the bytes
    cannot all stay in memory. Rows are stored in blocks (`row_block`), each computed by one kernel call. A block starts
    with the nibbles in the layout of torch's kernel, `[rows / layout, columns, layout / 2]` bytes: byte `j` holds row
    `j` (low) and row `j + layout / 2` (high). The pairs of scale and zero follow, `[columns / group, rows, 2]` bf16.

    Single rows cannot be extracted from a block, so look-up tables, and the head tied to them, which is the most
    sensitive matrix, are stored with `fallback`. So are shapes that do not divide evenly.

    Args:
        group: columns that share a scale.
        layout: interleaved rows, 64 or 32; default: that of this machine's kernel. A machine with another layout
            decodes the weights instead: correct, but slower.
    """

    name = "int4"
    lossless = False
    fallback = "int8"

    def __init__(self, *, group: int = 64, layout: int | None = None) -> None:
        self.group = group
        self.layout = layout or kernel_layout() or LAYOUTS[0]

    @property
    def stored_name(self) -> str:
        """`int4_64` or `int4_32`, by the layout of the packing machine."""
        return f"{self.name}_{self.layout}"

    def supports(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Return True for floating-point matrices with rows in whole layouts and columns in whole groups."""
        if not dtype.is_floating_point or len(shape) < 2 or 0 in shape:
            return False
        return shape[0] % self.layout == 0 and columns_of(shape) % self.group == 0

    def segments(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Segment, ...]:
        """Return `data` uint8 `[rows, columns / 2 + 4 * columns / group]`, to be read in blocks."""
        return (Segment("data", torch.uint8, (shape[0], self._row_bytes(columns_of(shape)))),)

    def row_block(self, shape: tuple[int, ...]) -> int:
        """Return the largest power of two, at least `layout`, for which a block has at most 2 MiB."""
        return self._block_rows(columns_of(shape))

    def _row_bytes(self, columns: int) -> int:
        return columns // 2 + columns // self.group * _PARAMETER_BYTES

    def _block_rows(self, columns: int) -> int:
        fitting = _BLOCK_BYTES // self._row_bytes(columns)
        return max(self.layout, 1 << max(fitting, 1).bit_length() - 1)

    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantise rows `[n, ...]` of any floating dtype that start on a block boundary.

        Raises:
            CodecError: NaN or infinite values, or values too large for the bf16 scales.
        """
        matrix = rows.reshape(rows.shape[0], -1)
        n, columns = matrix.shape
        data = torch.empty((n, self._row_bytes(columns)), dtype=torch.uint8)
        for block in self._blocks(data, columns):
            values = matrix[block.start : block.stop].to(torch.float32).view(-1, columns // self.group, self.group)
            least, most = values.amin(dim=2), values.amax(dim=2)  # aminmax takes ten times as long
            scale = bf16_at_least((most - least) / _LEVELS)
            zero = (least + scale * _MIDDLE).bfloat16().float()
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            if not bool((torch.isfinite(scale) & torch.isfinite(zero)).all()):
                raise CodecError("INT4 cannot represent NaN, infinite or huge weights; store this tensor as 'none'")
            levels = values.sub(zero[..., None]).div_(scale[..., None]).round_().add_(_MIDDLE).clamp_(0, _LEVELS)
            interleaved = levels.to(torch.uint8).view(-1, self.layout, columns).transpose(1, 2)
            half = self.layout // 2
            block.nibbles.view(-1, columns, half).copy_(interleaved[..., :half] | (interleaved[..., half:] << 4))
            block.parameters[..., 0] = scale.t()
            block.parameters[..., 1] = zero.t()
        return {"data": data}

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        """Write `(q - 8) * scale + zero` in the dtype of `out`."""
        scratch = Scratch()
        for block in self._blocks(encoded["data"], out.shape[1]):
            decoded = scratch.get("decoded", (out.shape[1], block.n_rows), out.dtype)
            out[block.start : block.stop] = self._transposed(block, decoded, scratch).t()
        return out

    def linear(self, x: LinearInput, encoded: Encoded, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        """Compute few rows with torch's kernel if its layout matches the weight's; else decode."""
        if x.rows <= _MOST_PACKED_ROWS and self.layout == kernel_layout():
            product = self._packed_product(x, encoded)
        else:
            product = self._decoded_product(x, encoded, scratch)
        return product if bias is None else product.add_(bias)

    def wants_whole(self, x: LinearInput) -> bool:
        """Return False: ranges consist of whole blocks, and each block is a separate product."""
        return False

    def _packed_product(self, x: LinearInput, encoded: Encoded) -> torch.Tensor:
        """Multiply few rows with torch's weight-only kernel, which reads each byte once, in bf16 with fp32 sums."""
        activations = x.derived("bf16", lambda x2d: x2d.to(torch.bfloat16).contiguous())
        assert isinstance(activations, torch.Tensor)
        products = [
            torch._weight_int4pack_mm_for_cpu(activations, block.nibbles, self.group, block.parameters)
            for block in self._blocks(encoded["data"], activations.shape[1])
        ]
        product = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        return product.to(x.x2d.dtype)

    def _decoded_product(self, x: LinearInput, encoded: Encoded, scratch: Scratch) -> torch.Tensor:
        """Multiply many rows, decoding in steps into the transposed matrix, which is closest to the layout."""
        n, columns = encoded["data"].shape[0], x.x2d.shape[1]
        fitting = scratch.slot_bytes // (columns * max(x.x2d.element_size(), _work_dtype(x.x2d.dtype).itemsize))
        step = max(1, fitting // self.layout) * self.layout
        out = x.x2d.new_empty((x.rows, n))
        for block in self._blocks(encoded["data"], columns):
            for first in range(0, block.n_rows, step):
                part = block.part(first, min(first + step, block.n_rows))
                decoded = scratch.get("decoded", (columns, part.n_rows), x.x2d.dtype)
                out[:, part.start : part.stop] = F.linear(x.x2d, self._transposed(part, decoded, scratch).t())
        return out

    def _transposed(self, block: _Block, out: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """Decode a block into `out` `[columns, rows]`."""
        columns, n = out.shape
        if out.dtype != _work_dtype(out.dtype):
            wide = scratch.get("wide", (columns, n), _work_dtype(out.dtype))
            return out.copy_(self._transposed(block, wide, scratch))
        half = self.layout // 2
        packed = block.nibbles.view(n // self.layout, columns, half)
        nibbles = scratch.get("nibbles", tuple(packed.shape), torch.uint8)
        signed = nibbles.view(torch.int8).transpose(0, 1)
        levels = out.view(columns, n // self.layout, self.layout)
        # Avoid shifts (torch has no vector code for them) and mixed strides: several times faster.
        torch.bitwise_and(packed, 0x0F, out=nibbles).sub_(_MIDDLE)
        levels[..., :half] = signed
        torch.bitwise_and(packed, 0xF0, out=nibbles).sub_(_MIDDLE << 4)
        levels[..., half:] = signed
        levels[..., half:] *= 1 / 16
        scale, zero = (block.parameters[..., which].to(out.dtype).contiguous()[:, None] for which in (0, 1))
        out.view(columns // self.group, self.group, n).mul_(scale).add_(zero)
        return out

    def _blocks(self, data: torch.Tensor, columns: int) -> Iterator[_Block]:
        """Yield the blocks of rows `[n, row_bytes]` that start on a block boundary; the last may be shorter."""
        flat, numbers = data.view(-1), data.view(torch.bfloat16).view(-1)
        n, row_bytes = data.shape
        step, nibble_bytes, groups = self._block_rows(columns), columns // 2, columns // self.group
        for start in range(0, n, step):
            n_rows = min(step, n - start)
            offset = start * row_bytes
            # as_strided: one operation per view, which matters beside a product of 50 microseconds
            nibbles = flat.as_strided((n_rows, nibble_bytes), (nibble_bytes, 1), flat.storage_offset() + offset)
            first = numbers.storage_offset() + (offset + n_rows * nibble_bytes) // 2
            parameters = numbers.as_strided((groups, n_rows, 2), (2 * n_rows, 2, 1), first)
            yield _Block(start, n_rows, nibbles, parameters)


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to decode in: the scales of small values are below the range of fp16."""
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass(frozen=True, slots=True)
class _Block:
    """Views of one block: nibbles uint8 `[n_rows, columns / 2]`, scale and zero bf16 `[groups, n_rows, 2]`."""

    start: int
    n_rows: int
    nibbles: torch.Tensor
    parameters: torch.Tensor

    @property
    def stop(self) -> int:
        return self.start + self.n_rows

    def part(self, first: int, last: int) -> _Block:
        """Return a range of its rows, in whole layouts."""
        return _Block(self.start + first, last - first, self.nibbles[first:last], self.parameters[:, first:last])


@lru_cache(maxsize=1)
def kernel_layout() -> int:
    """Return how many rows torch's INT4 kernel interleaves on this machine; 0 if its layout is unknown.

    The layout depends on the instruction set and torch does not guarantee it, so it is probed.
    """
    rows, columns = max(LAYOUTS), 32
    levels = (torch.arange(rows * columns).view(rows, columns) * 7 // 5 % 16).to(torch.uint8)
    try:
        packed = torch._convert_weight_to_int4pack_for_cpu(levels.int(), 1)
    except (AttributeError, RuntimeError):  # torch before 2.6, or a build without the kernel
        return 0
    for layout in LAYOUTS:
        half = layout // 2
        interleaved = levels.view(-1, layout, columns).transpose(1, 2)
        expected = interleaved[..., :half] | (interleaved[..., half:] << 4)
        if torch.equal(packed.view(-1), expected.reshape(-1)):
            return layout
    return 0
