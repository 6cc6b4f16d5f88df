"""Binds the native core with ctypes; its interface is documented in `core/core.h`."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigurationError
from .structures import (
    BF16_ROWS,
    FP16_ROWS,
    INT4_ROWS,
    INT8_ROWS,
    Attention,
    Compensation,
    Encoding,
    FullAttention,
    Layer,
    LayerEnd,
    LayerStart,
    Weight,
)

logger = logging.getLogger(__name__)

ISA_VARIABLE = "QWEN3VL_MEM_ISA"
"""Environment variable: the largest instruction set to use, or `torch` for torch's kernels."""
COLUMN_MULTIPLE = 32
"""Rows of integer activations are padded with zeros to a multiple of this many columns."""
MOST_HEAD_SIZE = 128
"""Of `Core.attend_all`."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of activations and results."""

_ABI = 4
_LIBRARY = Path(__file__).with_name("libcore.so")
_ARM = platform.machine().lower() in ("aarch64", "arm64")
_SETS = ("portable", "dotprod") if _ARM else ("portable", "avx2", "avxvnni", "avx512vnni", "amx")
_TORCH = "torch"


@dataclass(frozen=True, slots=True)
class Integers:
    """Activations as integers of 14 bits, or 8.

    Attributes:
        values: int16 `[rows, columns]`, columns padded with zeros to `COLUMN_MULTIPLE`.
        scale: the value of one unit in each row, fp32 `[rows]`; NaN for rows with NaN or infinite values.
        columns: without the padding.
        bytes: whether all of them fit 8 bits.
    """

    values: torch.Tensor
    scale: torch.Tensor
    columns: int
    bytes: bool = False


class Core:
    """The library's functions, for tensors on the CPU.

    Args:
        library: the file.
        isa: the largest instruction set to use; empty: no limit.

    Attributes:
        isa: the instruction set in use.

    Raises:
        OSError: the file cannot be loaded, is of another version, or does not know the instruction set.
    """

    def __init__(self, library: Path = _LIBRARY, isa: str = "") -> None:
        functions = ctypes.CDLL(str(library))
        pointer, number, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        abi = int(functions.qm_abi())
        if abi != _ABI:
            raise OSError(f"{library}: version {abi} of its interface, not {_ABI}; build it again")
        functions.qm_select.argtypes, functions.qm_select.restype = [ctypes.c_char_p], ctypes.c_char_p
        self._select = functions.qm_select
        self._quantize = functions.qm_quantize
        self._quantize.restype = integer
        self._quantize.argtypes = [
            *(pointer, integer, number, number, number, pointer, number, integer, pointer, pointer, integer)
        ]
        self._linear = functions.qm_linear
        self._linear.restype = None
        self._linear.argtypes = [
            *(pointer, pointer, number, ctypes.POINTER(Weight), pointer, integer, number, integer, integer)
        ]
        self._multiplies_bytes = functions.qm_multiplies_bytes
        self._multiplies_bytes.argtypes, self._multiplies_bytes.restype = [], integer
        self._float_linear = functions.qm_float_linear
        self._float_linear.restype = None
        self._float_linear.argtypes = [*(pointer, number, ctypes.POINTER(Weight), pointer, integer, number, integer)]
        self._encode = functions.qm_encode
        self._encode.restype = None
        self._encode.argtypes = [ctypes.POINTER(Encoding), integer]
        self._encode_compensated = functions.qm_encode_compensated
        self._encode_compensated.restype = None
        self._encode_compensated.argtypes = [ctypes.POINTER(Compensation), integer]
        self._run_layers = functions.qm_run_layers
        self._run_layers.argtypes, self._run_layers.restype = [pointer, number, integer], None
        self._steps: dict[type, Any] = {}
        for structure, name in ((LayerStart, "qm_start_layer"), (Attention, "qm_attend"), (LayerEnd, "qm_end_layer")):
            function = self._steps[structure] = getattr(functions, name)
            function.argtypes, function.restype = [ctypes.POINTER(structure), integer], None
        self._work_bytes: dict[type, Any] = {}
        for structure, name in ((LayerStart, "qm_start_layer_bytes"), (LayerEnd, "qm_end_layer_bytes")):
            function = self._work_bytes[structure] = getattr(functions, name)
            function.argtypes, function.restype = [ctypes.POINTER(structure)], number
        self._attend_all = functions.qm_attend_all
        self._attend_all.argtypes, self._attend_all.restype = [ctypes.POINTER(FullAttention), integer], None
        self._full_attention_bytes = functions.qm_full_attention_bytes
        self._full_attention_bytes.argtypes = [ctypes.POINTER(FullAttention)]
        self._full_attention_bytes.restype = number
        self.isa = self.select(isa)

    def select(self, isa: str) -> str:
        """Use at most this instruction set in the whole process, or the largest (empty); return the one in use.

        Raises:
            OSError: it is unknown.
        """
        selected = self._select(isa.encode())
        if selected is None:
            raise OSError(f"the native core does not know the instruction set {isa!r}")
        self.isa = selected.decode()
        return self.isa

    @property
    def multiplies_bytes(self) -> bool:
        """Whether many rows are multiplied faster if their activations have 8 bits."""
        return bool(self._multiplies_bytes())

    def quantize(self, x2d: torch.Tensor, signs: torch.Tensor | None = None, *, as_bytes: bool = False) -> Integers:
        """Round activations to integers, rotated first if `signs` is given (see `rotation_signs`).

        Args:
            x2d: `[rows, columns]` of a dtype in `DTYPES`; the columns of a row are adjacent.
            signs: fp32 `[block]`, 1 or -1; a power of two that divides the columns.
            as_bytes: with 8 bits instead of 14, except rows whose largest value is more than 16 times their root mean
                square: an error of 16 / 127 / sqrt(12), 3.6 %. Rotated activations of models have ratios of 3 to 6.
        """
        if x2d.stride(1) != 1:
            x2d = x2d.contiguous()
        rows, columns = x2d.shape
        padded = -(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        values = torch.empty((rows, padded), dtype=torch.int16)
        scale = torch.empty(rows, dtype=torch.float32)
        given, block = (None, 0) if signs is None else (signs.data_ptr(), len(signs))
        fits = self._quantize(
            x2d.data_ptr(),
            DTYPES[x2d.dtype],
            rows,
            columns,
            x2d.stride(0),
            given,
            block,
            as_bytes,
            values.data_ptr(),
            scale.data_ptr(),
            torch.get_num_threads(),
        )
        return Integers(values, scale, columns, bool(fits))

    def linear(
        self,
        x: Integers,
        data: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
        *,
        tables: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `x @ (data * scale).T`, `[rows, n]`.

        Args:
            x: the activations.
            data: int8 `[n, columns]`, or 4-bit rows, uint8 `[n, columns / 16 + columns / 2]`; contiguous.
            scale: fp32 `[n]`, contiguous.
            dtype: of the result, one of `DTYPES`.
            out: where to write the result; its rows may lie apart.
            tables: int8 `[256, 16]`, the integers that 4-bit rows name (see `INT4Codec`); `None`: the rows are int8.
        """
        rows, n = len(x.scale), len(data)
        if out is None:
            out = torch.empty((rows, n), dtype=dtype)
        named = None if tables is None else tables.data_ptr()
        self._linear(
            x.values.data_ptr(),
            x.scale.data_ptr(),
            rows,
            Weight(data.data_ptr(), scale.data_ptr(), None, 0, n, x.columns, named, INT4_ROWS if named else INT8_ROWS),
            out.data_ptr(),
            DTYPES[dtype],
            out.stride(0),
            x.bytes,
            torch.get_num_threads(),
        )
        return out

    def float_linear(
        self, x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return `x @ (data * scale).T`, `[rows, n]`, computed in fp32; made for few rows of `x`.

        Args:
            x: fp32 `[rows, columns]`, contiguous.
            data: bf16 or fp16 `[n, columns]`, contiguous.
            scale: fp32 `[n]`; `None`: all are 1.
            dtype: of the result, one of `DTYPES`.
        """
        rows, n = len(x), len(data)
        out = torch.empty((rows, n), dtype=dtype)
        weight = float_weight(data, scale)
        self._float_linear(x.data_ptr(), rows, weight, out.data_ptr(), DTYPES[dtype], n, torch.get_num_threads())
        return out

    def encode(
        self,
        values: torch.Tensor,
        tables: torch.Tensor,
        errors: torch.Tensor,
        nearest: torch.Tensor,
        data: torch.Tensor,
    ) -> torch.Tensor:
        """Write values as 4-bit rows; return int64 `[rows, 2]`: products of values and integers, squares of integers.

        Args:
            values: int16 `[rows, columns]`, contiguous, in halves of the unit of the tables.
            tables: int8 `[256, 16]`.
            errors: uint16 `[509, 256]` of each value from -254 on with each table, 4,095 at most.
            nearest: uint8 `[256, 509]`, the code of each value.
            data: where to write, uint8 `[rows, columns / 16 + columns / 2]`, contiguous.
        """
        products = torch.empty((len(values), 2), dtype=torch.int64)
        pointers = [each.data_ptr() for each in (tables, errors, nearest, data, products)]
        self._encode(Encoding(values.data_ptr(), *values.shape, *pointers), torch.get_num_threads())
        return products

    def encode_compensated(
        self,
        targets: torch.Tensor,
        fed_back: torch.Tensor,
        feedback: torch.Tensor,
        importance: torch.Tensor,
        tables: torch.Tensor,
        errors: torch.Tensor,
        nearest: torch.Tensor,
        data: torch.Tensor,
        first: int,
    ) -> None:
        """Write 64 columns of 4-bit rows, each value making up for the errors of those before it.

        Args:
            targets: fp32 `[rows, 64]`, values in the unit of the tables and in the order of groups (`core/codes.inl`);
                replaced by what the chosen integers lack. Its rows may lie apart.
            fed_back: fp32 `[rows, 64]`, contiguous: what errors of earlier columns add to the targets.
            feedback: fp32 `[64, 64]`, contiguous: of the error of column i, the share that is added to column j > i.
            importance: fp32 `[64]` of a squared error in each column.
            tables, errors, nearest: as in `encode`.
            data: whole rows, uint8 `[rows, columns / 16 + columns / 2]`, contiguous; these columns are written.
            first: the number of the first of the 64 columns.
        """
        columns = data.shape[1] * 16 // 9
        pointers = [each.data_ptr() for each in (feedback, importance, tables, errors, nearest)]
        numbers, codes = data.data_ptr() + first // 16, data.data_ptr() + columns // 16 + first // 2
        job = Compensation(
            *(targets.data_ptr(), targets.stride(0), fed_back.data_ptr(), len(targets)),
            *(*pointers, numbers, codes, data.shape[1]),
        )
        self._encode_compensated(job, torch.get_num_threads())

    def attend_all(self, heads: torch.Tensor, scale: float) -> torch.Tensor:
        """Return attention of all tokens to all, in integers of 12 bits: `[tokens, heads * size]`.

        Args:
            heads: query, key and value `[tokens, 3, heads, size]`, contiguous, of a dtype in `DTYPES`; an even size, at
                most `MOST_HEAD_SIZE`.
            scale: of the scores.
        """
        tokens, _, n_heads, size = heads.shape
        out = torch.empty((tokens, n_heads * size), dtype=heads.dtype)
        query, key, value = (heads[:, part].data_ptr() for part in range(3))
        stride = heads.stride(0)
        job = FullAttention(
            query, key, value, DTYPES[heads.dtype], tokens, n_heads, size, stride, scale, out.data_ptr(), out.stride(0)
        )
        work = torch.empty(int(self._full_attention_bytes(job)), dtype=torch.uint8)
        job.work = work.data_ptr()
        self._attend_all(job, torch.get_num_threads())
        return out

    def work_bytes(self, step: LayerStart | LayerEnd) -> int:
        """Return the bytes of memory that `step.work` must have."""
        return int(self._work_bytes[type(step)](step))

    def run(self, step: LayerStart | Attention | LayerEnd) -> None:
        """Run a step of a decoder layer; its memory must stay alive and in place meanwhile."""
        self._steps[type(step)](step, torch.get_num_threads())

    def run_layers(self, layers: ctypes.Array[Layer], first: int, stop: int) -> None:
        """Run the layers `first` to `stop` of an array, one after the other."""
        address = ctypes.addressof(layers) + first * ctypes.sizeof(Layer)
        self._run_layers(address, stop - first, torch.get_num_threads())


def float_weight(data: torch.Tensor, scale: torch.Tensor | None) -> Weight:
    """Return 16-bit rows `[n, columns]`, bf16 or fp16, with a scale for each, as the native core takes them."""
    address = None if scale is None else scale.data_ptr()
    format_ = BF16_ROWS if data.dtype == torch.bfloat16 else FP16_ROWS
    return Weight(data.data_ptr(), address, None, 0, *data.shape, None, format_)


@lru_cache(maxsize=1)
def core() -> Core | None:
    """Return the native core, loaded at the first call, or `None` if this process uses torch's kernels.

    Raises:
        ConfigurationError: the environment names an unknown instruction set, or one of another sort of processor.
    """
    isa = os.environ.get(ISA_VARIABLE, "").strip().lower()
    if isa not in ("", _TORCH, *_SETS):
        raise ConfigurationError(f"{ISA_VARIABLE}: {isa!r} is not one of {', '.join((_TORCH, *_SETS))}")
    if isa == _TORCH:
        return None
    try:
        loaded = Core(isa=isa)
    except (OSError, AttributeError) as error:  # not built, for another platform, or of another version
        logger.info("torch's kernels are used: %s", error)
        return None
    if not _agrees(loaded):
        logger.warning("the native kernels for %s are wrong on this processor; using portable ones", loaded.isa)
        loaded.select("portable")
    return loaded


def _agrees(loaded: Core) -> bool:
    """Return whether the kernels in use give the bits of the portable ones, as they must (takes 1 ms)."""
    isa, columns = loaded.isa, 1100
    weights = (torch.arange(40 * columns, dtype=torch.int32) * 31 % 255 - 127).to(torch.int8).view(40, columns)
    scale = torch.linspace(0.01, 0.02, 40, dtype=torch.float32)
    x = torch.sin(torch.arange(19 * columns, dtype=torch.float32)).view(19, columns)
    found = []
    for each in (isa, "portable"):
        loaded.select(each)
        integers, as_bytes = loaded.quantize(x), loaded.quantize(x, as_bytes=True)
        products = [loaded.linear(each, weights, scale, torch.float32) for each in (integers, as_bytes)]
        products += [loaded.linear(loaded.quantize(x[:1]), weights, scale, torch.bfloat16)]
        attended = loaded.attend_all(x.flatten()[: 30 * 3 * 2 * 72].view(30, 3, 2, 72), 0.1)
        found.append((integers.values, integers.scale, *products, attended))
    loaded.select(isa)
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))
