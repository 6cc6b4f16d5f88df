"""A Qwen3-VL checkpoint of a published shape with random bf16 weights, written in seconds.

Speed and memory depend on the shapes and not on the values, so it stands in for a checkpoint of gigabytes that would
have to be downloaded. Tokenizer and special tokens are those of a model that is given.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3VLConfig

    from ._output import Progress
    from ._sizes import ModelShape

_KV_HEADS, _HEAD_DIM, _VOCABULARY = 8, 128, 151936
"""The same in all published shapes."""
_BLOCK_VALUES = 4_194_301  # a prime: see RandomValues
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


class RandomValues:
    """Give random bf16 values as fast as memory is copied.

    Drawing billions of values takes longer than writing them, so one block is drawn and repeated without end. Its
    length is a prime: each time round, the rows of a matrix begin at other places of the block, so no two are equal.
    """

    def __init__(self) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self._block = torch.randn(_BLOCK_VALUES, generator=generator, dtype=torch.float32)
        self._scaled: dict[float, torch.Tensor] = {}
        self._next = 0

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """Yield the values of a tensor in order, flat: ones for norms, zeros for biases, else random ones."""
        import torch

        if len(shape) == 1:
            yield torch.full(shape, float(name.endswith(".weight")), dtype=torch.bfloat16)
            return
        # An embedding has the usual 0.02; a matrix keeps activations at the order of one.
        std = 0.02 if "embed" in name else math.prod(shape[1:]) ** -0.5
        if std not in self._scaled:
            self._scaled[std] = (self._block * std).bfloat16()
        missing = math.prod(shape)
        while missing:
            part = self._scaled[std][self._next : self._next + missing]
            yield part
            missing -= part.numel()
            self._next = (self._next + part.numel()) % _BLOCK_VALUES


def write_checkpoint(shape: ModelShape, directory: Path, *, tokenizer_of: Path, progress: Progress) -> None:
    """Write a checkpoint to an empty directory; memory stays within tens of megabytes.

    Args:
        shape: of the model.
        directory: exists.
        tokenizer_of: the checkpoint whose tokenizer and special tokens it gets.
        progress: called with a description, the bytes written and those to write.
    """
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    from ..storage import write_header

    config = _config(shape, json.loads((tokenizer_of / "config.json").read_text(encoding="utf-8")))
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    if not shape.tied:
        shapes["lm_head.weight"] = tuple(model.lm_head.weight.shape)
    tensors = {name: ("BF16", sizes, 2 * math.prod(sizes)) for name, sizes in shapes.items()}
    total = sum(n_bytes for _, _, n_bytes in tensors.values())
    values, done = RandomValues(), 0
    with open(directory / "model.safetensors", "wb") as file:
        file.write(write_header(tensors, {"format": "pt"}))
        for name, sizes in shapes.items():
            for part in values.chunks(name, sizes):
                done += file.write(part.view(torch.uint8).numpy().data)
            progress("writing random weights", done, total)
        file.flush()
        # Else the first reads from the disk would wait for all that is still to be written.
        os.fsync(file.fileno())
    for name in _TOKENIZER_FILES:
        shutil.copyfile(tokenizer_of / name, directory / name)
    (directory / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR), encoding="utf-8")
    config.save_pretrained(directory)


_PREPROCESSOR = {
    "do_resize": True,
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "size": {"shortest_edge": 256**2, "longest_edge": 256**2},
    "image_processor_type": "Qwen2VLImageProcessor",
}


def _config(shape: ModelShape, small: dict[str, Any]) -> Qwen3VLConfig:
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=_VOCABULARY,
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=_KV_HEADS,
            head_dim=_HEAD_DIM,
            max_position_embeddings=262144,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            bos_token_id=None,
            eos_token_id=None,  # random weights would end the answer at a random place
            pad_token_id=small["text_config"]["pad_token_id"],
            tie_word_embeddings=shape.tied,
        ),
        vision_config=dict(
            depth=shape.vision_blocks,
            hidden_size=shape.vision_hidden,
            intermediate_size=shape.vision_mlp,
            num_heads=16,
            patch_size=16,
            out_hidden_size=shape.hidden,
            num_position_embeddings=48 * 48,
            deepstack_visual_indexes=[shape.vision_blocks * part // 4 - 1 for part in (1, 2, 3)],
        ),
        tie_word_embeddings=shape.tied,
        **{name: small[name] for name in _TOKEN_IDS},
    )
