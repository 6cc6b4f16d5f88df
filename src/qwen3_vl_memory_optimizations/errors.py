"""Every error this library raises on purpose.

MemoryOptimizationError
├── ConfigurationError            a key, type or size that cannot be (also a ValueError)
├── MemoryBudgetExceeded          what was asked for does not fit the budget (also a MemoryError)
├── UnknownTensorError            no managed tensor has this id (also a KeyError)
├── TensorFreedError              the managed tensor was freed, or its optimizer closed
├── CodecError                    a tensor that this codec cannot encode or decode
├── InputError                    an image, video or prompt that cannot be used
└── StorageError                  anything about files; carries `path`
    ├── CheckpointError           not a checkpoint, an unknown architecture, a missing or truncated file
    ├── CorruptDataError          bytes whose checksum is not the recorded one
    ├── ShortIOError              the file ended, or accepted less, than was asked for
    └── InsufficientDiskSpaceError   the disk cannot hold what must be written

Errors are raised before state changes and carry their numbers as attributes.
"""

from __future__ import annotations

from pathlib import Path


def format_bytes(n_bytes: float) -> str:
    """Return a size for people: `1.25 GB`, `310 MB`, `4.0 kB` (decimal units)."""
    value = float(n_bytes)
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


class MemoryOptimizationError(Exception):
    """Base of every error of this library."""


class ConfigurationError(MemoryOptimizationError, ValueError):
    """A configuration key, type or size that cannot be."""


class MemoryBudgetExceeded(MemoryOptimizationError, MemoryError):
    """Something does not fit the budget; nothing was allocated.

    Attributes:
        requested_bytes: what was asked for.
        available_bytes: what the budget still had.
        budget_bytes: the budget itself.
        owner: who asked (`weights`, `general`, `activations`, ...).
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
        return f"no managed tensor has the id {self.tensor_id!r}: it was never allocated here, or it was freed"


class TensorFreedError(MemoryOptimizationError):
    """The managed tensor was freed, or the optimizer that owned its bytes was closed."""


class CodecError(MemoryOptimizationError):
    """A tensor that this codec cannot encode or decode."""


class InputError(MemoryOptimizationError, ValueError):
    """An image, a video or a prompt that cannot be used."""


class StorageError(MemoryOptimizationError):
    """Anything that goes wrong with a file.

    Attributes:
        path: the file or directory concerned.
    """

    def __init__(self, message: str, *, path: str | Path) -> None:
        super().__init__(message)
        self.path = Path(path)


class CheckpointError(StorageError):
    """Not a checkpoint, an architecture that is not supported, or a missing or truncated file."""


class CorruptDataError(StorageError):
    """Bytes on the disk whose checksum is not the one recorded when they were written."""


class ShortIOError(StorageError):
    """A read or write moved fewer bytes than asked for."""


class InsufficientDiskSpaceError(StorageError):
    """The disk cannot hold what must be written.

    Attributes:
        required_bytes: what must be written.
        available_bytes: what the file system has free.
    """

    def __init__(self, message: str, *, path: str | Path, required_bytes: int, available_bytes: int) -> None:
        super().__init__(message, path=path)
        self.required_bytes = required_bytes
        self.available_bytes = available_bytes
