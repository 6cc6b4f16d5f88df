"""The published sizes of Qwen3-VL: configurations, and the tensors their checkpoints hold."""

from __future__ import annotations

import os
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

END_OF_TEXT, END_OF_TURN = 151643, 151645


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    layers: int
    hidden: int
    mlp: int
    heads: int
    vision_layers: int
    vision_hidden: int
    vision_mlp: int
    deepstack: tuple[int, ...]
    tied: bool


_SMALL_VISION = dict(vision_layers=24, vision_hidden=1024, vision_mlp=4096, deepstack=(5, 11, 17))
_SHAPES = {
    "2B": _Shape(layers=28, hidden=2048, mlp=6144, heads=16, tied=True, **_SMALL_VISION),
    "4B": _Shape(layers=36, hidden=2560, mlp=9728, heads=32, tied=True, **_SMALL_VISION),
    "8B": _Shape(
        layers=36,
        hidden=4096,
        mlp=12288,
        heads=32,
        tied=False,
        vision_layers=27,
        vision_hidden=1152,
        vision_mlp=4304,
        deepstack=(8, 16, 24),
    ),
}
SIZES = tuple(_SHAPES)


def build_config(size: str, *, layers: int | None = None, vision_layers: int | None = None) -> Qwen3VLConfig:
    """The configuration of a published size, or of a version of it with fewer layers.

    Args:
        size: one of `SIZES`.
        layers: text layers; not given: all.
        vision_layers: vision blocks; not given: all. DeepStack taps keep their relative depth, and there are
            never more of them than text layers to receive them.

    Raises:
        ValueError: the size is unknown or a number of layers is less than one.
    """
    if size not in _SHAPES:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
    shape = _SHAPES[size]
    layers = shape.layers if layers is None else layers
    depth = shape.vision_layers if vision_layers is None else vision_layers
    if layers < 1 or depth < 1:
        raise ValueError(f"layers={layers}, vision_layers={depth}: each must be at least 1")
    taps = sorted({min(tap * depth // shape.vision_layers, depth - 1) for tap in shape.deepstack})
    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=151936,
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_hidden_layers=layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=8,
            head_dim=128,
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
            bos_token_id=END_OF_TEXT,
            eos_token_id=END_OF_TURN,
            tie_word_embeddings=shape.tied,
        ),
        vision_config=dict(
            depth=depth,
            hidden_size=shape.vision_hidden,
            intermediate_size=shape.vision_mlp,
            num_heads=16,
            in_channels=3,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=shape.hidden,
            num_position_embeddings=2304,
            deepstack_visual_indexes=taps[-layers:],
            hidden_act="gelu_pytorch_tanh",
        ),
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=shape.tied,
    )


def checkpoint_tensors(config: Qwen3VLConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors `save_pretrained` writes for a configuration, in its order.

    The configuration receives what building a model adds to it: architecture and dtype.
    """
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    shapes = {name: tuple(tensor.shape) for name, tensor in sorted(model.state_dict().items())}
    if config.tie_word_embeddings:
        # The head is the embedding under another name, and a file holds a tensor once.
        del shapes["lm_head.weight"]
    return shapes
