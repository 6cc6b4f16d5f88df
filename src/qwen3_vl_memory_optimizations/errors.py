"""All errors raised by this library.

MemoryOptimizationError
├── ConfigurationError            an invalid key, type or size (also a ValueError)
├── MemoryBudgetExceeded          a request does not fit the budget (also a MemoryError)
├── UnknownTensorError            no managed tensor has this id (also a KeyError)
├── TensorFreedError              the managed tensor was freed, or its optimizer closed
├── CodecError                    a tensor that the codec cannot encode or decode
├── InputError                    an unusable image, video or prompt
└── StorageError                  a file problem; carries `path`
    ├── CheckpointError           not a checkpoint, an unsupported architecture, a missing or truncated file
    ├── CorruptDataError          stored bytes that fail their checksum
    ├── ShortIOError              a read or write moved fewer bytes than requested
    └── InsufficientDiskSpaceError   not enough free disk space for a write

Errors are raised before state changes and carry their numbers as attributes.
"""

from __future__ import annotations

from pathlib import Path


def format_bytes(n_bytes: float) -> str:
    """Format a size: `1.25 GB`, `310 MB`, `4.0 kB` (decimal units)."""
    value = float(n_bytes)
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= 0.9995 * scale:  # 999.7 kB would become 1e+03 kB
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def format_duration(seconds: float) -> str:
    """Format a duration: `0.25 s`, `70 s`, `12 min`, `3.5 h`."""
    for unit, scale, least in (("h", 3600.0, 7200.0), ("min", 60.0, 120.0)):
        if seconds >= least:
            value = seconds / scale
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


class MemoryOptimizationError(Exception):
    """Base class of all errors of this library."""


class ConfigurationError(MemoryOptimizationError, ValueError):
    """An invalid configuration key, type or size."""


class MemoryBudgetExceeded(MemoryOptimizationError, MemoryError):
    """A request does not fit the budget; nothing was allocated.

    Attributes:
        requested_bytes: bytes requested.
        available_bytes: bytes still available in the budget.
        budget_bytes: size of the budget.
        owner: account of the request (`weights`, `general`, `activations`, ...).
    """

    def __init__(
        self, message: str, *, requested_bytes: int, available_bytes: int, budget_bytes: int, owner: str
    ) -> None:
        super().__init__(message)
        self.requested_bytes = requested_bytes
        self.available_bytes = available_bytes
        self.budget_bytes = budget_bytes
        self.owner = owner


class UnknownTensorError(MemoryOptimizationError, KeyError):
    """No managed tensor has this id."""

    def __init__(self, tensor_id: object) -> None:
        super().__init__(tensor_id)
        self.tensor_id = tensor_id

    def __str__(self) -> str:
        return (
            f"no managed tensor has the id {self.tensor_id!r}: it was never allocated by this optimizer, or was freed"
        )


class TensorFreedError(MemoryOptimizationError):
    """The managed tensor was freed, or the optimizer that owned its bytes was closed."""


class CodecError(MemoryOptimizationError):
    """A tensor that the codec cannot encode or decode."""


class InputError(MemoryOptimizationError, ValueError):
    """An unusable image, video or prompt."""


class StorageError(MemoryOptimizationError):
    """A problem with a file.

    Attributes:
        path: the file or directory concerned.
    """

    def __init__(self, message: str, *, path: str | Path) -> None:
        super().__init__(message)
        self.path = Path(path)


class CheckpointError(StorageError):
    """Not a checkpoint, an unsupported architecture, or a missing or truncated file."""


class CorruptDataError(StorageError):
    """Bytes on disk that fail the checksum recorded when they were written."""


class ShortIOError(StorageError):
    """A read or write moved fewer bytes than requested."""


class InsufficientDiskSpaceError(StorageError):
    """The disk lacks space for a write.

    Attributes:
        required_bytes: bytes to write.
        available_bytes: free bytes of the file system.
    """

    def __init__(self, message: str, *, path: str | Path, required_bytes: int, available_bytes: int) -> None:
        super().__init__(message, path=path)
        self.required_bytes = required_bytes
        self.available_bytes = available_bytes
