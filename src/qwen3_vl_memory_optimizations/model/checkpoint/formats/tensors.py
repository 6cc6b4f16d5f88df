"""Read weights as the model sees them, in any stored form, some rows at a time (`LogicalTensor`)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from ....compression import ROW_MULTIPLE
from ....errors import CheckpointError
from ....storage import AlignedBuffer, DirectFile, TensorExtent

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The torch dtypes of readable safetensors types."""
_SAFETENSORS_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
PLAIN_FLOATS = ("F64", "F32", "F16", "BF16")
"""The types of weights stored unquantized."""

Rows = Callable[[int, int], torch.Tensor]
"""Called with the first row and the one after the last; returns these rows."""

_CHUNK_BYTES = 16 << 20
_PIECE_BYTES = 1 << 20
_BLOCK_VALUES = 1 << 18
"""Values decoded at once: codes, scales per value and the product stay in the CPU cache, and do not fragment the heap.
"""


def _torch_dtype(extent: TensorExtent) -> torch.dtype:
    if extent.dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{extent.path}: {extent.name} has the unsupported type {extent.dtype}; supported are "
            f"{', '.join(TORCH_DTYPES)}",
            path=extent.path,
        )
    return TORCH_DTYPES[extent.dtype]


class Files:
    """The files of a checkpoint, opened on demand and closed together."""

    def __init__(self) -> None:
        self._open: dict[Path, DirectFile] = {}

    def rows(self, extent: TensorExtent, start: int, stop: int) -> torch.Tensor:
        """Return rows of a tensor `[rows, ...]` as stored, in a separate copy."""
        row_bytes = extent.n_bytes // extent.shape[0] if extent.shape[0] else 0
        data = self.data(extent, start * row_bytes, stop * row_bytes)
        return data.view(_torch_dtype(extent)).view(stop - start, *extent.shape[1:])

    def whole(self, extent: TensorExtent) -> torch.Tensor:
        """Return a tensor as stored."""
        return self.data(extent, 0, extent.n_bytes).view(_torch_dtype(extent)).view(extent.shape)

    def data(self, extent: TensorExtent, begin: int, end: int) -> torch.Tensor:
        """Return bytes `begin` to `end` of a tensor, as uint8 `[end - begin]`."""
        data = torch.empty(max(0, end - begin), dtype=torch.uint8)
        view, file = data.numpy(), self.file(extent.path)
        for start in range(0, len(data), _PIECE_BYTES):
            piece = file.read_bytes(extent.offset_bytes + begin + start, min(_PIECE_BYTES, len(data) - start))
            view[start : start + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
        return data

    def file(self, path: Path) -> DirectFile:
        """Return an open file."""
        if path not in self._open:
            self._open[path] = DirectFile(path)
        return self._open[path]

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            file.close()


class LogicalTensor(ABC):
    """A weight of a checkpoint: its name, shape and values.

    Attributes:
        name: the model's name for it.
        path: its file, for errors.
        shape: as in the model.
        dtype: of the values as read.
        held_bytes: memory needed for reading, besides a few chunks.
    """

    held_bytes = 0

    def __init__(self, name: str, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.name, self.path, self.shape, self.dtype = name, path, tuple(shape), dtype

    @property
    def stored_as(self) -> str:
        """The type of the values as read, in safetensors spelling."""
        return _SAFETENSORS_NAMES[self.dtype]

    @property
    def n_bytes(self) -> int:
        """The size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def reader(self, files: Files) -> Rows:
        """Return a function that reads rows, in any float dtype; it may hold `held_bytes`, and is valid while `files`
        is open.

        Raises:
            CheckpointError: the parts contradict each other.
        """

    def row_chunks(self) -> Iterator[torch.Tensor]:
        """Yield the tensor some rows at a time; each chunk is valid until the next.

        Raises:
            CheckpointError: the parts contradict each other.
            StorageError: a file cannot be read.
        """
        rows, row_values = self.shape[0], max(1, math.prod(self.shape[1:]))
        step = max(1, _CHUNK_BYTES // self.dtype.itemsize // row_values)
        block = max(1, _BLOCK_VALUES // row_values)
        chunk = torch.empty((min(step, rows), *self.shape[1:]), dtype=self.dtype)
        with Files() as files:
            read = self.reader(files)
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                for begin in range(start, stop, block):
                    end = min(begin + block, stop)
                    chunk[begin - start : end - start] = read(begin, end)
                yield chunk[: stop - start]

    def whole(self) -> torch.Tensor:
        """Return the tensor."""
        return torch.cat([chunk.clone() for chunk in self.row_chunks()]).view(self.shape)

    def sample(self, n_rows: int) -> torch.Tensor:
        """Return about `n_rows` rows of a matrix `[n, columns]`, in blocks of 16 spread over it."""
        rows = self.shape[0]
        n_blocks = min(-(-n_rows // ROW_MULTIPLE), -(-rows // ROW_MULTIPLE))
        with Files() as files:
            read = self.reader(files)
            starts = (number * (rows - 1) // n_blocks // ROW_MULTIPLE * ROW_MULTIPLE for number in range(n_blocks))
            blocks = [read(start, min(start + ROW_MULTIPLE, rows)).to(self.dtype) for start in starts]
        return torch.cat(blocks).view(-1, math.prod(self.shape[1:]))

    def error(self, what: str) -> CheckpointError:
        """Return an error about this tensor."""
        remedy = "the checkpoint is damaged, or its config.json belongs to another one: download it again"
        return CheckpointError(f"{self.path}: {self.name}: {what}; {remedy}", path=self.path)


class PlainTensor(LogicalTensor):
    """A tensor stored unchanged; for a type that torch lacks, its `dtype` is uint8, and reading fails."""

    def __init__(self, extent: TensorExtent, name: str | None = None) -> None:
        super().__init__(name or extent.name, extent.path, extent.shape, TORCH_DTYPES.get(extent.dtype, torch.uint8))
        self.extent = extent

    @property
    def stored_as(self) -> str:
        """The type in the file, in safetensors spelling."""
        return self.extent.dtype

    def reader(self, files: Files) -> Rows:
        """Return a function that reads rows."""
        if not self.shape:
            return lambda start, stop: files.whole(self.extent)
        return lambda start, stop: files.rows(self.extent, start, stop)

    def row_chunks(self) -> Iterator[torch.Tensor]:
        """Yield the tensor some rows at a time, by direct reads into one buffer."""
        extent, dtype, shape = self.extent, self.dtype, self.shape
        if extent.n_bytes == 0:
            yield torch.empty(shape, dtype=dtype)
            return
        rows = shape[0] if shape else 1
        row_bytes = extent.n_bytes // rows
        step = max(1, _CHUNK_BYTES // row_bytes)
        with DirectFile(extent.path) as file, AlignedBuffer(min(step, rows) * row_bytes + 2 * 4096) as buffer:
            for start in range(0, rows, step):
                count = min(step, rows - start)
                offset = extent.offset_bytes + start * row_bytes
                lead = offset % 4096
                file.read_into(buffer.address + lead, offset, count * row_bytes)
                # A copy would double the memory; the view is dropped before the buffer is overwritten.
                chunk = torch.frombuffer(buffer.view, dtype=torch.uint8, offset=lead, count=count * row_bytes)
                if lead % dtype.itemsize:
                    chunk = chunk.clone()
                yield chunk.view(dtype).view(count, *shape[1:]) if shape else chunk.view(dtype).view(())
                del chunk


class StackedTensor(LogicalTensor):
    """Small tensors joined along one dimension, existing or new.

    Args:
        name: of the result.
        parts: in order.
        dim: where they are joined.
        new: whether the parts lack this dimension.
    """

    def __init__(self, name: str, parts: list[LogicalTensor], dim: int, *, new: bool) -> None:
        self._join = torch.stack if new else torch.cat
        self._parts, self._dim = parts, dim
        first = parts[0]
        shape = self._join([torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts], dim=dim).shape
        super().__init__(name, first.path, tuple(shape), first.dtype)
        self.held_bytes = self.n_bytes

    def reader(self, files: Files) -> Rows:
        """Return a function that reads rows; it holds the whole tensor."""
        values = self._join([part.whole().to(self.dtype) for part in self._parts], dim=self._dim)
        return lambda start, stop: values[start:stop]
