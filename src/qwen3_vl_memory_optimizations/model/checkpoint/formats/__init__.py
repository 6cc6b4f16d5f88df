"""Read a model's weights from plain and quantized checkpoints, GGUF files, and adapters on a base."""

from .opening import config_of, files_directory, needs_packing, open_checkpoint, side_files, weights_of
from .parts import declared_dtype
from .tensors import PLAIN_FLOATS, TORCH_DTYPES, LogicalTensor, PlainTensor

__all__ = [
    "PLAIN_FLOATS",
    "TORCH_DTYPES",
    "LogicalTensor",
    "PlainTensor",
    "config_of",
    "declared_dtype",
    "files_directory",
    "needs_packing",
    "open_checkpoint",
    "side_files",
    "weights_of",
]
