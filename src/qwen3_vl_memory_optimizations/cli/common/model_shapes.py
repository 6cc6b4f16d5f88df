"""The shapes of the published Qwen3-VL models, and the configurations and tensors that follow from them."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen3VLConfig

Matrix = tuple[int, int]

KV_HEADS, HEAD_DIM, VOCABULARY = 8, 128, 151936
"""The same in all published shapes."""
POSITIONS = 48 * 48
_PATCH_VALUES = 3 * 2 * 16 * 16
_MERGED_PATCHES = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes in which the published Qwen3-VL models differ.

    Attributes:
        tied: the language-model head shares the embedding weights.
        deepstack: vision blocks whose outputs also go to the first decoder layers.
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
    deepstack: tuple[int, ...] = (5, 11, 17)

    def reduced(self, *, layers: int | None = None, vision_blocks: int | None = None) -> ModelShape:
        """Return this shape with fewer layers.

        DeepStack taps keep their relative depth, and there are never more of them than decoder layers to receive them.

        Args:
            layers: of the text decoder; `None`: all.
            vision_blocks: of the vision tower; `None`: all.

        Raises:
            ValueError: a number is less than one.
        """
        layers = self.layers if layers is None else layers
        depth = self.vision_blocks if vision_blocks is None else vision_blocks
        if layers < 1 or depth < 1:
            raise ValueError(f"layers={layers}, vision_blocks={depth}: each must be at least 1")
        taps = sorted({min(tap * depth // self.vision_blocks, depth - 1) for tap in self.deepstack})
        return dataclasses.replace(self, layers=layers, vision_blocks=depth, deepstack=tuple(taps[-layers:]))

    def decoder_matrices(self) -> list[Matrix]:
        """Return the matrices read per new token: all layers and the language-model head."""
        hidden, queries, keys = self.hidden, self.heads * HEAD_DIM, KV_HEADS * HEAD_DIM
        attention = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
        mlp = [(self.mlp, hidden), (self.mlp, hidden), (hidden, self.mlp)]
        return (attention + mlp) * self.layers + [(VOCABULARY, hidden)]

    def embedding_matrices(self) -> list[Matrix]:
        """Return the embedding unless it is tied to the head; each token reads one row."""
        return [] if self.tied else [(VOCABULARY, self.hidden)]

    def vision_matrices(self) -> list[Matrix]:
        """Return the matrices of the vision tower, read once per image."""
        width, wide = self.vision_hidden, self.vision_mlp
        block = [(3 * width, width), (width, width), (wide, width), (width, wide)]
        merged = width * _MERGED_PATCHES
        merger = [(merged, merged), (self.hidden, merged)]
        whole = [(width, _PATCH_VALUES), (POSITIONS, width)]
        return whole + block * self.vision_blocks + merger * (1 + len(self.deepstack))

    @property
    def n_parameters(self) -> int:
        """Number of weights, vectors included."""
        matrices = self.decoder_matrices() + self.embedding_matrices() + self.vision_matrices()
        return sum(math.prod(matrix) for matrix in matrices) + self._text_vectors() + self._vision_vectors()

    def _text_vectors(self) -> int:
        return self.layers * (2 * self.hidden + 2 * HEAD_DIM) + self.hidden

    def _vision_vectors(self) -> int:
        width, merged = self.vision_hidden, self.vision_hidden * _MERGED_PATCHES
        norms_of_block, biases_of_block = 4 * width, 3 * width + width + self.vision_mlp + width
        taps = len(self.deepstack)
        mergers = (1 + taps) * (merged + self.hidden) + 2 * width + taps * 2 * merged
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
        deepstack=(8, 16, 24),
    ),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Ids of tokens with a meaning of their own; the defaults are those of the published models.

    Attributes:
        end_of_turn: ends an answer; `None`: nothing does.
    """

    end_of_text: int | None = 151643
    end_of_turn: int | None = 151645
    vision_start: int = 151652
    vision_end: int = 151653
    image: int = 151655
    video: int = 151656
    pad: int | None = None


def build_config(shape: ModelShape, tokens: SpecialTokens) -> Qwen3VLConfig:
    """Return the configuration of a shape."""
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            hidden_act="silu",
            max_position_embeddings=262144,
            rms_norm_eps=1e-6,
            attention_bias=False,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            bos_token_id=tokens.end_of_text,
            eos_token_id=tokens.end_of_turn,
            pad_token_id=tokens.pad,
            tie_word_embeddings=shape.tied,
        ),
        vision_config=dict(
            depth=shape.vision_blocks,
            hidden_size=shape.vision_hidden,
            intermediate_size=shape.vision_mlp,
            num_heads=16,
            in_channels=3,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=shape.hidden,
            num_position_embeddings=POSITIONS,
            deepstack_visual_indexes=list(shape.deepstack),
            hidden_act="gelu_pytorch_tanh",
        ),
        image_token_id=tokens.image,
        video_token_id=tokens.video,
        vision_start_token_id=tokens.vision_start,
        vision_end_token_id=tokens.vision_end,
        tie_word_embeddings=shape.tied,
    )


def checkpoint_tensors(config: Qwen3VLConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of a checkpoint, in the order of the model.

    The configuration receives what building a model adds to it: architecture and dtype.
    """
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]  # the embedding under another name; a file holds a tensor once
    return shapes
