"""Compress runtime tensors of any shape with the codecs used for weights (specification 2.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import CodecError
from .base import Codec
from .registry import create_codec
from .selection import CompressionMethodSelector, Selection, matrix_view, relative_error


@dataclass(frozen=True)
class CompressedTensor:
    """The encoded form of a tensor; it shares no memory with the original.

    Attributes:
        codec: encodes and decodes it.
        shape, dtype: those of the original.
        encoded: segment name -> tensor.
        relative_error: measured, in the Frobenius norm over the finite values; 0.0 if lossless.
    """

    codec: Codec
    shape: tuple[int, ...]
    dtype: torch.dtype
    encoded: dict[str, torch.Tensor]
    relative_error: float

    @property
    def method(self) -> str:
        """Name of the codec."""
        return self.codec.name

    @property
    def n_bytes(self) -> int:
        """Size of the encoded form in bytes."""
        return sum(segment.nbytes for segment in self.encoded.values())

    @property
    def original_bytes(self) -> int:
        """Size of the original in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def ratio(self) -> float | None:
        """Compression ratio, original bytes / encoded bytes; `None` for an empty tensor."""
        return self.original_bytes / self.n_bytes if self.n_bytes else None


class TensorCompressor:
    """Compresses tensors of any shape with one codec.

    The last dimension becomes the columns and all others the rows, so a KV tensor has one scale per token and head.
    A tensor without elements is kept unchanged.

    Args:
        tolerance: maximum relative error; `None`: no limit.
    """

    codec_name: ClassVar[str]

    def __init__(self, tolerance: float | None = None) -> None:
        self.tolerance = tolerance
        self._codec = create_codec(self.codec_name)

    def compress(self, tensor: torch.Tensor) -> CompressedTensor:
        """Encode a tensor and measure the error.

        Raises:
            CodecError: the codec does not support the tensor or its values, or the error exceeds the tolerance.
        """
        if tensor.numel() == 0:
            return _compressed(create_codec("none"), tensor)
        matrix = matrix_view(tensor)
        if not self._codec.supports(tuple(matrix.shape), tensor.dtype):
            raise CodecError(f"{self.codec_name} does not take a {tensor.dtype} tensor of shape {list(tensor.shape)}")
        compressed = _compressed(self._codec.fit(lambda: matrix), tensor)
        if self.tolerance is not None and compressed.relative_error > self.tolerance:
            raise CodecError(
                f"{self.codec_name} has a relative error of {compressed.relative_error:.2g} on this tensor, above the "
                f"tolerance of {self.tolerance:g}"
            )
        return compressed

    def decompress(self, compressed: CompressedTensor) -> torch.Tensor:
        """Return a new tensor with the shape and dtype of the original."""
        return decompress(compressed)


class INT8QuantizationCompressor(TensorCompressor):
    """INT8 with one scale per row. NaN and infinite values are refused."""

    codec_name = "int8"


class FP16QuantizationCompressor(TensorCompressor):
    """16 bits per value. NaN and infinite values are kept."""

    codec_name = "fp16"


class SVDDecompositionCompressor(TensorCompressor):
    """Two low-rank factors that keep 95 % of the energy within the codec's tolerance; refuses other tensors."""

    codec_name = "svd"


class SparseCompressionCompressor(TensorCompressor):
    """Exact nonzero values; refuses tensors that would not become smaller."""

    codec_name = "sparse"


def _compressed(codec: Codec, tensor: torch.Tensor) -> CompressedTensor:
    matrix = matrix_view(tensor)
    if tensor.numel() == 0:
        return CompressedTensor(codec, tuple(tensor.shape), tensor.dtype, {"data": matrix.clone()}, 0.0)
    original = tensor.untyped_storage().data_ptr()
    encoded = {
        name: segment.clone() if segment.untyped_storage().data_ptr() == original else segment
        for name, segment in codec.encode(matrix).items()
    }
    error = 0.0
    if not codec.lossless:
        error = relative_error(matrix, codec.decode(encoded, torch.empty_like(matrix)))
    return CompressedTensor(codec, tuple(tensor.shape), tensor.dtype, encoded, error)


def decompress(compressed: CompressedTensor) -> torch.Tensor:
    """Return a new tensor with the values, shape and dtype of the original."""
    out = torch.empty(compressed.shape, dtype=compressed.dtype)
    if out.numel():
        compressed.codec.decode(compressed.encoded, matrix_view(out))
    return out


class MemoryCompressionManager:
    """Compresses runtime tensors: key and value states, vision features, embeddings.

    Args:
        selector: chooses the method; default: uses this machine's speeds, measured when first needed.

    Attributes:
        int8_compressor, fp16_compressor, svd_compressor, sparse_compressor: the methods.
        selector: chooses among them.
    """

    def __init__(self, selector: CompressionMethodSelector | None = None) -> None:
        self.int8_compressor = INT8QuantizationCompressor()
        self.fp16_compressor = FP16QuantizationCompressor()
        self.svd_compressor = SVDDecompositionCompressor()
        self.sparse_compressor = SparseCompressionCompressor()
        self.selector = selector or CompressionMethodSelector()

    def compress(
        self,
        tensor: torch.Tensor,
        *,
        kind: str = "general",
        access: str | None = None,
        calibration: torch.Tensor | None = None,
    ) -> CompressedTensor:
        """Encode a tensor with the most suitable method, which may be `none`.

        Args:
            tensor: of any shape and dtype; tensors that are empty or not floating point are kept unchanged.
            kind: sets the tolerance (see `TOLERANCES`).
            access: `hot`, `streamed` or `cold`; default: that of the kind.
            calibration: inputs `[m, columns]` of the layer, if the tensor is its weight.

        Raises:
            ConfigurationError: an unknown kind or access pattern.
        """
        chosen = self.explain(tensor, kind=kind, access=access, calibration=calibration)
        for codec in chosen.codecs():  # chosen from a sample of rows; it may still fail on the whole tensor
            try:
                compressed = _compressed(codec, tensor)
            except CodecError:
                continue
            if compressed.relative_error <= chosen.tolerance or calibration is not None:
                return compressed
        return _compressed(create_codec("none"), tensor)

    def decompress(self, compressed: CompressedTensor) -> torch.Tensor:
        """Return a new tensor with the shape and dtype of the original."""
        return decompress(compressed)

    def explain(
        self,
        tensor: torch.Tensor,
        *,
        kind: str = "general",
        access: str | None = None,
        calibration: torch.Tensor | None = None,
    ) -> Selection:
        """Return the candidates for a tensor, their figures, the choice and its reason (see `compress`)."""
        return self.selector.explain(tensor, kind=kind, access=access, calibration=calibration)
