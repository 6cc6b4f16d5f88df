"""Sizes of models as codecs store them, computed from their shapes."""

from __future__ import annotations

from collections.abc import Iterable

from .model_shapes import VOCABULARY, Matrix

PROCESS_BYTES = 500_000_000
"""Process memory besides weights: interpreter, torch and transformers (about 400 MB measured), activations."""


def encoded_bytes(matrices: Iterable[Matrix], codec: str) -> int:
    """Return the size of bf16 matrices as a codec stores them (embeddings and heads: see `suits_vocabulary`)."""
    import torch

    from ...compression import create_codec

    encoder = create_codec(codec)
    lookup = encoder if encoder.suits_vocabulary else create_codec(encoder.fallback)
    return sum(
        segment.n_bytes
        for matrix in matrices
        for segment in (lookup if matrix[0] == VOCABULARY else encoder).segments(matrix, torch.bfloat16)
    )
