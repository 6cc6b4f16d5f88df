"""Choose the codec for a tensor by error, size and speed on this machine. Every choice can be explained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import CodecError, ConfigurationError
from .base import Codec, LinearInput, Scratch
from .registry import create_codec
from .speeds import CodecSpeeds, measure_codec_speeds, work_of

TOLERANCES = {
    "weights": 0.02,
    "kv_cache": 0.02,
    "vision_features": 0.02,
    "text_embeddings": 0.02,
    "general": 0.001,
}
"""Maximum relative error for each kind of tensor; for a weight with calibration inputs, that of the outputs."""

ACCESS_OF_KIND = {
    "weights": "hot",
    "kv_cache": "cold",
    "vision_features": "cold",
    "text_embeddings": "cold",
    "general": "cold",
}
ACCESS_PATTERNS = ("hot", "streamed", "cold", "bytes")
CANDIDATES = ("none", "fp16", "int8", "sparse", "svd")
WEIGHT_CANDIDATES = ("none", "fp16", "int8_rotated", "int8", "sparse", "svd")
"""Codecs for weights; of two that cost the same, the first is chosen."""
_SAMPLE_ROWS = 256
_CALIBRATION_ROWS = 8
"""Weights multiplied by the same input: an outlier in one changes how the others are computed."""
_MARGIN = 0.95
"""To be chosen, a method must cost less than this share of every method before it in `CANDIDATES`."""
_WORTH_BYTES = 4096
_LOW_RANK_SHARE = 0.5
_LEAST_CODING_BYTES_PER_S = 25e6
_BEST = {
    "hot": "the fastest product",
    "streamed": "the fastest to read and multiply",
    "cold": "the least bytes",
    "bytes": "the least bytes",
}


@dataclass(frozen=True)
class Candidate:
    """One method and its expected figures.

    Attributes:
        method: the name of the codec.
        n_bytes: size of the encoded form; `None` if the codec does not support the tensor.
        relative_error: measured on rows of the tensor, or on the outputs for the calibration inputs.
        seconds: operation (encode, decode, linear with one row) -> time on this machine.
        cost: the figure compared (see `CompressionMethodSelector`); infinite: not admitted.
        reason: why it is not admitted; empty if it is.
        codec: fitted to the tensor.
    """

    method: str
    n_bytes: int | None = None
    relative_error: float | None = None
    seconds: dict[str, float] | None = None
    cost: float = math.inf
    reason: str = ""
    codec: Codec | None = None


@dataclass(frozen=True)
class Selection:
    """A choice with its inputs. `str()` returns a readable table."""

    chosen: str
    reason: str
    candidates: tuple[Candidate, ...]
    codec: Codec
    tolerance: float
    access: str
    shape: tuple[int, ...]
    sparsity: float
    variance: float

    def codecs(self) -> list[Codec]:
        """Return the admitted codecs: the chosen one, then the others by rising cost."""
        others = sorted((each for each in self.candidates if each.cost < math.inf), key=lambda each: each.cost)
        return [self.codec, *(each.codec for each in others if each.codec not in (None, self.codec))]

    def __str__(self) -> str:
        lines = [
            f"tensor {list(self.shape)}, {self.access}: {100 * self.sparsity:.0f} % zeros, variance "
            f"{self.variance:.3g}, tolerance {self.tolerance:g}",
            f"{'':2}{'method':8}{'bytes':>12}{'error':>10}{'encode':>10}{'decode':>10}{'linear':>10}",
        ]
        for each in self.candidates:
            mark = "* " if each.method == self.chosen else "  "
            times = each.seconds or {}
            cells = [
                "-" if each.n_bytes is None else str(each.n_bytes).rjust(12),
                "-" if each.relative_error is None else f"{each.relative_error:.2g}",
                *(f"{1e6 * times[name]:.0f} us" if name in times else "-" for name in ("encode", "decode", "linear")),
            ]
            row = f"{mark}{each.method:8}{cells[0]:>12}" + "".join(f"{cell:>10}" for cell in cells[1:])
            lines.append(f"{row}  {each.reason}".rstrip())
        return "\n".join([*lines, f"{self.chosen}: {self.reason}"])


class CompressionMethodSelector:
    """Chooses the method for a tensor: the cheapest of those whose error is within the tolerance.

    Cost depends on the access pattern. `hot`: in memory and multiplied at each step, so the product's time counts.
    `streamed`: prefetched from the SSD for each product, so the longer of the two times counts. `cold`: written, and
    perhaps read once, so the bytes count, among the methods that code at least 25 MB/s. `bytes`: only the bytes count,
    and no speed is measured.

    If two methods cost the same, the one with the smaller loss is chosen; if nothing is gained, `none`.

    Args:
        speeds: of this machine; default: measured when first needed.
        tolerances: maximum relative error by kind; missing kinds use `TOLERANCES`.
        candidates: names of codecs, `none` first; of two that cost the same the earlier one is chosen.
    """

    def __init__(
        self,
        speeds: CodecSpeeds | None = None,
        tolerances: dict[str, float] | None = None,
        candidates: tuple[str, ...] = CANDIDATES,
    ) -> None:
        self._speeds = speeds
        self.candidates = candidates
        self.tolerances = TOLERANCES | (tolerances or {})

    @property
    def speeds(self) -> CodecSpeeds:
        """The speeds that choices are based on."""
        if self._speeds is None:
            self._speeds = measure_codec_speeds()
        return self._speeds

    def explain(
        self,
        tensor: torch.Tensor,
        *,
        kind: str = "general",
        access: str | None = None,
        calibration: torch.Tensor | None = None,
        n_rows: int | None = None,
    ) -> Selection:
        """Return the candidates for a tensor, their figures, the choice and its reason.

        Args:
            tensor: of any shape and dtype.
            kind: sets the tolerance, and the default access pattern.
            access: `hot`, `streamed` or `cold`.
            calibration: inputs `[m, columns]` of the layer, if the tensor is its weight; the error is then that of its
                outputs.
            n_rows: rows of the whole matrix, if `tensor` is a sample of its rows; bytes and times are for the whole.

        Raises:
            ConfigurationError: an unknown kind or access pattern, or inputs of another width.
        """
        if kind not in self.tolerances:
            raise ConfigurationError(f"kind: {kind!r} is not one of {', '.join(self.tolerances)}")
        access = access or ACCESS_OF_KIND.get(kind, "cold")
        if access not in ACCESS_PATTERNS:
            raise ConfigurationError(f"access: {access!r} is not one of {', '.join(ACCESS_PATTERNS)}")
        tolerance, matrix = self.tolerances[kind], matrix_view(tensor)
        if calibration is not None and calibration.shape[-1] != matrix.shape[-1]:
            raise ConfigurationError(
                f"calibration: inputs of width {calibration.shape[-1]} for a weight of {matrix.shape[-1]} columns"
            )
        raw = create_codec("none")

        def selection(chosen: str, reason: str, candidates: tuple[Candidate, ...], codec: Codec) -> Selection:
            sparsity, variance = _statistics(matrix)
            return Selection(
                chosen, reason, candidates, codec, tolerance, access, tuple(tensor.shape), sparsity, variance
            )

        rows = len(matrix) if n_rows is None else n_rows
        whole_bytes = rows * matrix.shape[-1] * matrix.element_size()
        if not tensor.dtype.is_floating_point or whole_bytes < _WORTH_BYTES:
            why = f"below {_WORTH_BYTES} bytes" if tensor.dtype.is_floating_point else f"{tensor.dtype} is kept exactly"
            return selection("none", why, (Candidate("none", whole_bytes, 0.0, cost=0.0, codec=raw),), raw)
        candidates = tuple(
            self._candidate(name, matrix, access, tolerance, calibration, rows) for name in self.candidates
        )
        best = candidates[0]
        for each in candidates[1:]:
            if each.cost < _MARGIN * best.cost:
                best = each
        assert best.codec is not None
        others = sum(each.cost < math.inf for each in candidates) - 1
        reason = f"{_BEST[access]} of {others + 1} admitted" if others else "no other method is admitted"
        return selection(best.method, reason, candidates, best.codec)

    def _candidate(
        self,
        name: str,
        matrix: torch.Tensor,
        access: str,
        tolerance: float,
        calibration: torch.Tensor | None,
        rows: int,
    ) -> Candidate:
        shape = (rows, matrix.shape[1])
        codec = create_codec(name)
        if not codec.supports(shape, matrix.dtype):
            return Candidate(name, reason=f"does not take {matrix.dtype}")
        sample = matrix[:: -(-len(matrix) // _SAMPLE_ROWS)]
        try:
            if name == "svd":
                _require_low_rank(sample)
            codec = codec.fit(lambda: matrix)
            error = 0.0 if codec.lossless else _error(codec, sample, calibration)
        except CodecError as refusal:
            return Candidate(name, reason=str(refusal))
        n_bytes = sum(segment.n_bytes for segment in codec.segments(shape, matrix.dtype))
        original_bytes = rows * matrix.shape[1] * matrix.element_size()
        if access == "bytes":
            seconds, ssd_bytes_per_s = {}, 0.0
        else:
            seconds = {
                operation: self.speeds.seconds(name, operation, work_of(codec, operation, *shape))
                for operation in ("encode", "decode", "linear")
            }
            ssd_bytes_per_s = self.speeds.ssd_bytes_per_s
        cost, reason = admitted_cost(access, error, tolerance, n_bytes, original_bytes, seconds, ssd_bytes_per_s, name)
        return Candidate(name, n_bytes, error, seconds, cost, reason, codec)


def admitted_cost(
    access: str,
    error: float,
    tolerance: float,
    n_bytes: int,
    original_bytes: int,
    seconds: dict[str, float],
    ssd_bytes_per_s: float,
    method: str,
) -> tuple[float, str]:
    """Return a method's cost for an access pattern, and why it is not admitted; its cost is then infinite."""
    if method != "none":
        if not error <= tolerance:
            return math.inf, f"loses {error:.3g}, more than {tolerance:g}"
        if n_bytes >= original_bytes:
            return math.inf, "saves no bytes"
    if access == "hot":
        return seconds["linear"], ""
    if access == "streamed":
        return max(n_bytes / ssd_bytes_per_s, seconds["linear"]), ""
    if access == "bytes":
        return float(n_bytes), ""
    if method != "none" and original_bytes < _LEAST_CODING_BYTES_PER_S * (seconds["encode"] + seconds["decode"]):
        return math.inf, f"codes less than {_LEAST_CODING_BYTES_PER_S / 1e6:.0f} MB/s"
    return float(n_bytes), ""


def matrix_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of any shape as a matrix `[rows, columns]`; the last dimension becomes the columns."""
    if tensor.dim() == 0:
        return tensor.detach().reshape(1, 1)
    return tensor.detach().reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def relative_error(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Return the Frobenius norm of the difference, relative to that of the exact values, over finite values."""
    finite = exact.isfinite()
    kept = torch.where(finite, exact, 0).float()
    lost = torch.where(finite, found, 0).float().sub_(kept)
    largest = float(kept.abs().max()) if kept.numel() else 0.0
    if largest == 0:
        return 0.0 if not bool(lost.any()) else math.inf
    # Scale first: squares of very large or small fp32 values would overflow or underflow.
    return float(lost.div_(largest).norm() / kept.div_(largest).norm())


def _error(codec: Codec, rows: torch.Tensor, calibration: torch.Tensor | None) -> float:
    """Return the relative error of some rows, or of their product with the calibration inputs."""
    encoded = codec.encode(rows)
    if calibration is None:
        return relative_error(rows, codec.decode(encoded, torch.empty_like(rows)))
    # Use the codec's own product, not one with decoded rows: it may round activations too.
    inputs, scratch = calibration.reshape(-1, calibration.shape[-1]).float(), Scratch()
    found = [codec.linear(LinearInput(part), encoded, None, scratch) for part in inputs.split(_CALIBRATION_ROWS)]
    return relative_error(inputs @ rows.float().t(), torch.cat(found))


def _require_low_rank(sample: torch.Tensor) -> None:
    """Raise if sampled rows show no low rank, before the slow factorization of the whole tensor.

    Raises:
        CodecError: the rows show no low rank.
    """
    least = min(sample.shape)
    finite = torch.where(sample.isfinite(), sample, 0).float()
    finite /= finite.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    wide = finite if finite.shape[0] <= finite.shape[1] else finite.t()
    # Eigenvalues of the Gram matrix of the rows are the squared singular values, at a tenth of the time.
    values = torch.linalg.eigvalsh((wide @ wide.t()).double()).clamp_min(0).flip(0)
    needed = int((values.sum() - values.cumsum(0) > 1e-4 * values.sum()).sum()) + 1
    if needed > max(_LOW_RANK_SHARE * least, 1):
        raise CodecError(f"no low rank: a sample of its rows needs {needed} of {least} directions")


def _statistics(matrix: torch.Tensor) -> tuple[float, float]:
    """Return the share of zeros and the variance of the finite values."""
    if matrix.numel() == 0:
        return 0.0, 0.0
    sparsity = float((matrix == 0).float().mean())
    finite = matrix[matrix.isfinite()] if matrix.dtype.is_floating_point else matrix
    return sparsity, float(finite.double().var(correction=0)) if finite.numel() else 0.0
