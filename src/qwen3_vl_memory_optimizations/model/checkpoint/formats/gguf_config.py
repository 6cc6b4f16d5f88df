"""Build the `config.json` of Qwen3-VL from the settings in GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....errors import CheckpointError
from ....storage import CONFIG_FILE, SafetensorsHeader

_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_PLAIN_ROPE = (None, "none", "mrope")


class _Settings:
    """Settings of a file; a missing one raises an error with the remedy."""

    def __init__(self, path: Path, table: Mapping[str, Any], prefix: str) -> None:
        self._path, self._table, self._prefix = path, table, prefix

    def __call__(self, key: str, kind: type = int) -> Any:
        value = self._table.get(f"{self._prefix}.{key}")
        if value is None:
            raise no_config(self._path, f"its metadata has no {self._prefix}.{key}")
        return kind(value)


def no_config(path: Path, why: str) -> CheckpointError:
    """Return the error for a file whose settings do not yield a configuration."""
    return CheckpointError(
        f"{path}: cannot derive the configuration from the file: {why}; put {CONFIG_FILE} of the original "
        f"model into {path.parent}",
        path=path,
    )


def _as_written(value: float) -> float:
    """Return the decimal number behind an fp32 one: 1e-06, not 9.99999997e-07."""
    return float(f"{value:.7g}")


def built_config(
    path: Path, model: Mapping[str, Any], vision: Mapping[str, Any], headers: list[SafetensorsHeader]
) -> dict[str, Any]:
    """Return the entries of the original model's `config.json` that affect the model.

    Args:
        path: the file of the language model.
        model: its settings.
        vision: the settings of the vision tower.
        headers: tensor shapes, for sizes that no setting declares.

    Raises:
        CheckpointError: a setting is missing or not understood.
    """
    text, tower = _Settings(path, model, "qwen3vl"), _Settings(path, vision, "clip.vision")
    shapes = {name: extent.shape for header in headers for name, extent in header.tensors.items()}
    tokens = {token: number for number, token in enumerate(model.get("tokenizer.ggml.tokens") or ())}
    absent = [token for token in _TOKENS.values() if token not in tokens]
    if absent:
        raise no_config(path, f"its vocabulary has no {absent[0]}")
    if model.get("qwen3vl.rope.scaling.type") not in _PLAIN_ROPE:
        raise no_config(path, f"rope scaling {model['qwen3vl.rope.scaling.type']!r}")
    for name in ("token_embd.weight", "v.position_embd.weight", "v.patch_embd.weight"):
        if name not in shapes:
            raise no_config(path, f"there is no tensor {name!r}")
    levels = vision.get("clip.vision.is_deepstack_layers")
    sections = text("rope.dimension_sections", list)
    if not levels or len(sections) < 3:
        raise no_config(path, "clip.vision.is_deepstack_layers or qwen3vl.rope.dimension_sections is empty")
    n_heads = text("attention.head_count")
    tied = "output.weight" not in shapes
    plain = {extent.dtype for header in headers for extent in header.tensors.values()} == {"F32"}
    dtype = "float32" if plain else "bfloat16"
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": dtype,
        "tie_word_embeddings": tied,
        **{key: tokens[token] for key, token in _TOKENS.items()},
        "text_config": {
            "model_type": "qwen3_vl_text",
            "dtype": dtype,
            "attention_bias": False,
            "bos_token_id": model.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": model.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": model.get("tokenizer.ggml.padding_token_id"),
            "head_dim": int(model.get("qwen3vl.attention.key_length") or text("embedding_length") // n_heads),
            "hidden_act": "silu",
            "hidden_size": text("embedding_length"),
            "intermediate_size": text("feed_forward_length"),
            "max_position_embeddings": text("context_length"),
            "num_attention_heads": n_heads,
            "num_hidden_layers": text("block_count"),
            "num_key_value_heads": text("attention.head_count_kv"),
            "rms_norm_eps": _as_written(text("attention.layer_norm_rms_epsilon", float)),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": _as_written(text("rope.freq_base", float)),
                "mrope_interleaved": True,
                "mrope_section": sections[:3],
            },
            "tie_word_embeddings": tied,
            "vocab_size": shapes["token_embd.weight"][0],
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "dtype": dtype,
            "deepstack_visual_indexes": [layer for layer, is_one in enumerate(levels) if is_one],
            "depth": tower("block_count"),
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": tower("embedding_length"),
            "in_channels": shapes["v.patch_embd.weight"][1],
            "intermediate_size": tower("feed_forward_length"),
            "num_heads": tower("attention.head_count"),
            "num_position_embeddings": shapes["v.position_embd.weight"][0],
            "out_hidden_size": tower("projection_dim"),
            "patch_size": tower("patch_size"),
            "spatial_merge_size": tower("spatial_merge_size"),
            "temporal_patch_size": 2,
        },
    }
