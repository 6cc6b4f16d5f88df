"""Codec speeds on this machine: measured once, fitted as straight lines over size, then looked up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..hardware import cpu_model
from ..native import core
from .base import Codec, LinearInput, Scratch
from .codecs.svd import SKETCHES
from .kernels import fastest_dtype
from .registry import create_codec

MEASURED_CODECS = ("none", "int8", "int8_rotated", "int4", "fp16", "svd", "sparse")
OPERATIONS = ("encode", "decode", "linear")
_SIZES = (256, 1024)
_LEAST_RUNS, _MOST_RUNS, _ENOUGH_S, _LONGEST_S = 3, 200, 0.05, 0.5
_SVD_RANK = 16
_SPARSITY = 0.9
_SSD_BYTES_PER_S = 1.0e9
_ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "FBGEMM_ENABLE_INSTRUCTIONS")


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds as a function of work: `fixed_s + per_unit_s * work`."""

    fixed_s: float
    per_unit_s: float

    def seconds(self, work: float) -> float:
        """Return the time for this much work."""
        return self.fixed_s + self.per_unit_s * work


@dataclass(frozen=True)
class CodecSpeeds:
    """Time of each operation of each codec on this machine.

    Attributes:
        lines: codec name -> operation (`encode`, `decode`, `linear` with one row) -> time over `work_of`.
        ssd_bytes_per_s: of the disk that holds what does not fit in memory.
        dtype: of the measured values and activations, as named by torch.
        machine: the machine that was measured (see `machine_name`).
    """

    lines: Mapping[str, Mapping[str, Line]]
    ssd_bytes_per_s: float
    dtype: str
    machine: str

    def seconds(self, codec: str, operation: str, work: float) -> float:
        """Return the time of an operation."""
        return self.lines[codec][operation].seconds(work)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in a form that can be written as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> CodecSpeeds:
        """Return the figures from the result of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: `stored` is not a result of `to_dict`.
        """
        lines = {
            codec: {operation: Line(**operations[operation]) for operation in OPERATIONS}
            for codec, operations in stored["lines"].items()
        }
        if not set(MEASURED_CODECS) <= lines.keys():
            raise ValueError(f"figures of {sorted(set(MEASURED_CODECS) - lines.keys())} are missing")
        return cls(lines, float(stored["ssd_bytes_per_s"]), str(stored["dtype"]), str(stored["machine"]))


def machine_name() -> str:
    """Return what speeds depend on: processor, instruction sets of torch and of the native core, threads, torch."""
    native = core()
    limits = "".join(f" {os.environ[name]}" for name in _ISA_LIMITS if name in os.environ)
    isa = f"{torch.backends.cpu.get_cpu_capability()}{limits}"
    kernels = "torch's kernels" if native is None else f"native core {native.isa}"
    return f"{cpu_model()}, {isa}, {kernels}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def work_of(codec: Codec, operation: str, rows: int, columns: int) -> float:
    """Return the work of an operation, in units proportional to its time.

    The unit is one matrix element, except for SVD: elements of the factors for a product, multiplications for decoding,
    and the multiplications of the factorization for encoding.
    """
    rank = getattr(codec, "rank", None)
    if codec.name != "svd" or rank is None:
        return rows * columns
    return {
        "linear": rank * (rows + columns),
        "decode": rank * rows * columns,
        "encode": rows * columns * next((width for width in SKETCHES if rank <= width), min(rows, columns)),
    }[operation]


def measure_codec_speeds(
    ssd_bytes_per_s: float = _SSD_BYTES_PER_S,
    *,
    dtype: torch.dtype | None = None,
    timer: Callable[[], float] = time.perf_counter,
) -> CodecSpeeds:
    """Measure each operation of each codec at two sizes; takes a few seconds.

    Args:
        ssd_bytes_per_s: of the disk that holds what does not fit in memory.
        dtype: of values and activations; default: this machine's compute dtype.
        timer: a monotonic clock in seconds.
    """
    dtype = dtype or fastest_dtype()
    generator = torch.Generator().manual_seed(0)
    lines: dict[str, dict[str, Line]] = {}
    with torch.inference_mode():
        for name in MEASURED_CODECS:
            points: dict[str, list[tuple[float, float]]] = {operation: [] for operation in OPERATIONS}
            for size in _SIZES:
                matrix = _suited(name, size, generator).to(dtype)
                codec, seconds = timed(create_codec(name), matrix, timer)
                for operation, taken in seconds.items():
                    points[operation].append((work_of(codec, operation, size, size), taken))
            lines[name] = {operation: _line(*points[operation]) for operation in OPERATIONS}
    return CodecSpeeds(lines, ssd_bytes_per_s, str(dtype).removeprefix("torch."), machine_name())


def timed(codec: Codec, matrix: torch.Tensor, timer: Callable[[], float]) -> tuple[Codec, dict[str, float]]:
    """Return the codec fitted to a matrix and the seconds of each operation on it; fitting counts as encoding.

    Raises:
        CodecError: the codec does not suit the matrix.
    """
    fitted = codec.fit(lambda: matrix)
    encoded = fitted.encode(matrix)
    out, scratch = torch.empty_like(matrix), Scratch()
    x = torch.ones(1, matrix.shape[1], dtype=matrix.dtype)
    operations: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.fit(lambda: matrix).encode(matrix),
        "decode": lambda: fitted.decode(encoded, out),
        "linear": lambda: fitted.linear(LinearInput(x), encoded, None, scratch),
    }
    operations["linear"]()  # warm-up: the first call is slow
    return fitted, {name: _best_seconds(run, timer) for name, run in operations.items()}


def _best_seconds(run: Callable[[], object], timer: Callable[[], float]) -> float:
    """Return the minimum of several runs; shorter operations get more runs, as other load disturbs them more."""
    best, spent, runs = float("inf"), 0.0, 0
    while runs < _LEAST_RUNS or (runs < _MOST_RUNS and spent < _ENOUGH_S):
        start = timer()
        run()
        seconds = timer() - start
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
        if spent > _LONGEST_S:
            break
    return best


def _suited(name: str, size: int, generator: torch.Generator) -> torch.Tensor:
    """Return values that a codec supports."""
    if name == "svd":
        left = torch.randn(size, _SVD_RANK, generator=generator, dtype=torch.float32)
        return left @ torch.randn(_SVD_RANK, size, generator=generator, dtype=torch.float32)
    values = torch.randn(size, size, generator=generator, dtype=torch.float32)
    if name == "sparse":
        values[torch.rand(size, size, generator=generator, dtype=torch.float32) < _SPARSITY] = 0
    return values


def _line(small: tuple[float, float], large: tuple[float, float]) -> Line:
    """Return the line through two points (work, seconds), with slope and intercept clamped to at least zero."""
    (less, least_s), (more, most_s) = small, large
    fixed_s = max(0.0, (min(least_s, most_s) * more - most_s * less) / (more - less))
    return Line(fixed_s, (most_s - fixed_s) / more)
