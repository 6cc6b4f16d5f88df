"""Sizes and speed bounds of the published models, computed from their real shapes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

Matrix = tuple[int, int]

PROCESS_BYTES = 500_000_000
"""Process memory besides weights: interpreter, torch and transformers (about 400 MB measured), activations."""

_KV_HEADS, _HEAD_DIM, _VOCABULARY = 8, 128, 151936
_PATCH_VALUES = 3 * 2 * 16 * 16
_POSITIONS = 48 * 48
_MERGED_PATCHES = 4
_DEEPSTACK_LAYERS = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes in which the published Qwen3-VL models differ.

    Attributes:
        tied: the language-model head shares the embedding weights.
    """

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    tied: bool
    vision_blocks: int
    vision_hidden: int
    vision_mlp: int

    def decoder_matrices(self) -> list[Matrix]:
        """Return the matrices read per new token: all layers and the language-model head."""
        hidden, queries, keys = self.hidden, self.heads * _HEAD_DIM, _KV_HEADS * _HEAD_DIM
        attention = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
        mlp = [(self.mlp, hidden), (self.mlp, hidden), (hidden, self.mlp)]
        return (attention + mlp) * self.layers + [(_VOCABULARY, hidden)]

    def embedding_matrices(self) -> list[Matrix]:
        """Return the embedding unless it is tied to the head; each token reads one row."""
        return [] if self.tied else [(_VOCABULARY, self.hidden)]

    def vision_matrices(self) -> list[Matrix]:
        """Return the matrices of the vision tower, read once per image."""
        width, wide = self.vision_hidden, self.vision_mlp
        block = [(3 * width, width), (width, width), (wide, width), (width, wide)]
        merged = width * _MERGED_PATCHES
        merger = [(merged, merged), (self.hidden, merged)]
        whole = [(width, _PATCH_VALUES), (_POSITIONS, width)]
        return whole + block * self.vision_blocks + merger * (1 + _DEEPSTACK_LAYERS)

    @property
    def n_parameters(self) -> int:
        """Number of weights, vectors included."""
        matrices = self.decoder_matrices() + self.embedding_matrices() + self.vision_matrices()
        return sum(math.prod(matrix) for matrix in matrices) + self._text_vectors() + self._vision_vectors()

    def _text_vectors(self) -> int:
        return self.layers * (2 * self.hidden + 2 * _HEAD_DIM) + self.hidden

    def _vision_vectors(self) -> int:
        width, merged = self.vision_hidden, self.vision_hidden * _MERGED_PATCHES
        norms_of_block, biases_of_block = 4 * width, 3 * width + width + self.vision_mlp + width
        mergers = (1 + _DEEPSTACK_LAYERS) * (merged + self.hidden) + 2 * width + _DEEPSTACK_LAYERS * 2 * merged
        return width + self.vision_blocks * (norms_of_block + biases_of_block) + mergers


MODELS = (
    ModelShape(
        name="2B",
        layers=28,
        hidden=2048,
        mlp=6144,
        heads=16,
        tied=True,
        vision_blocks=24,
        vision_hidden=1024,
        vision_mlp=4096,
    ),
    ModelShape(
        name="4B",
        layers=36,
        hidden=2560,
        mlp=9728,
        heads=32,
        tied=True,
        vision_blocks=24,
        vision_hidden=1024,
        vision_mlp=4096,
    ),
    ModelShape(
        name="8B",
        layers=36,
        hidden=4096,
        mlp=12288,
        heads=32,
        tied=False,
        vision_blocks=27,
        vision_hidden=1152,
        vision_mlp=4304,
    ),
)


def encoded_bytes(matrices: Iterable[Matrix], codec: str) -> int:
    """Return the size of bf16 matrices as a codec stores them."""
    import torch

    from ..compression import create_codec

    encoder = create_codec(codec)
    return sum(segment.n_bytes for matrix in matrices for segment in encoder.segments(matrix, torch.bfloat16))


def least_budgets(shape: ModelShape, itemsize: int) -> dict[str, int]:
    """Return the minimum `ram_budget` for each prompt size; with less, a run is refused before its first token.

    Args:
        shape: the model shape.
        itemsize: bytes per activation: 2 in bf16, 4 in fp32.
    """
    from types import SimpleNamespace

    from ..model.run.needs import least_budget_bytes

    text = SimpleNamespace(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        num_hidden_layers=shape.layers,
        vocab_size=_VOCABULARY,
    )
    vision = SimpleNamespace(
        hidden_size=shape.vision_hidden,
        intermediate_size=shape.vision_mlp,
        spatial_merge_size=2,
        out_hidden_size=shape.hidden,
        deepstack_visual_indexes=tuple(range(_DEEPSTACK_LAYERS)),
    )
    config = SimpleNamespace(get_text_config=lambda: text, vision_config=vision)
    cases = {"1,024 tokens": (1024, 0), "16,384 tokens": (16384, 0), "an image of 1,024 tokens": (1088, 4096)}
    return {
        name: least_budget_bytes(config, prompt_tokens=tokens, new_tokens=256, patches=patches, itemsize=itemsize)
        for name, (tokens, patches) in cases.items()
    }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Expected speed of one model with one codec.

    Attributes:
        decoder_bytes: bytes used per new token.
        resident_bytes: the part of them that stays in memory.
        read_bytes_per_token: the rest, read from the SSD.
        tokens_per_s: upper bound: only reads are assumed to take time.
        bound_by: the bottleneck, `ssd` or `memory`.
    """

    model: str
    codec: str
    decoder_bytes: int
    resident_bytes: int
    read_bytes_per_token: int
    tokens_per_s: float | None
    bound_by: str | None


def estimate(
    shape: ModelShape,
    codec: str,
    *,
    ram_budget_bytes: int,
    ssd_bytes_per_s: float | None,
    memory_bytes_per_s: float,
) -> Estimate:
    """Estimate tokens/s within a budget: 1 / max(missing bytes / SSD bandwidth, decoder bytes / memory bandwidth)."""
    decoder_bytes = encoded_bytes(shape.decoder_matrices(), codec)
    resident_bytes = min(decoder_bytes, max(0, ram_budget_bytes - PROCESS_BYTES))
    missing_bytes = decoder_bytes - resident_bytes
    memory_s = decoder_bytes / memory_bytes_per_s
    ssd_s = 0.0 if not missing_bytes else missing_bytes / ssd_bytes_per_s if ssd_bytes_per_s else None
    return Estimate(
        model=shape.name,
        codec=codec,
        decoder_bytes=decoder_bytes,
        resident_bytes=resident_bytes,
        read_bytes_per_token=missing_bytes,
        tokens_per_s=None if ssd_s is None else 1 / max(ssd_s, memory_s),
        bound_by=None if ssd_s is None else "ssd" if ssd_s > memory_s else "memory",
    )
