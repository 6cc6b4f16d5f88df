"""A checkpoint in the shape of Qwen3-VL with random bf16 weights, written about as fast as the disk allows.

Speed and memory depend on shapes and not on the values, so it stands in for a published checkpoint that would have to
be downloaded. Tensor names, shapes, configuration and file layout are those that `save_pretrained` gives, with an index
even if one file holds everything.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model_shapes import ModelShape, SpecialTokens, build_config, checkpoint_tensors

if TYPE_CHECKING:
    import torch

    from ...model.checkpoint.packing import Progress

SHARD_BYTES = 4 * 10**9
"""The most bytes of tensors in one file, unless one tensor alone has more."""
INDEX = "model.safetensors.index.json"

_ELEMENT_BYTES = 2
_BLOCK_VALUES = 1 << 22
_CHUNK_VALUES = 1 << 21
_FLUSH_BYTES = 256 << 20
"""Dirty pages are written back this often, so that the first reads do not wait for all of them."""


class RandomWeights:
    """Give weights about as fast as memory is copied.

    Drawing billions of normal values takes longer than writing them. One block of them is drawn, and each part of a
    tensor is a window into it at a random place with every row scaled anew. This leaves matrices of full rank whose
    rows differ in magnitude as those of trained ones do. A tensor depends on the seed, its name and its shape alone:
    the first layers of a reduced checkpoint are those of the full one.
    """

    def __init__(self, seed: int) -> None:
        import torch

        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._block = torch.randn(_BLOCK_VALUES, generator=generator, dtype=torch.float32).bfloat16()
        self._buffer = torch.empty(_CHUNK_VALUES, dtype=torch.bfloat16)

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """Yield the values of a tensor in order, flat; each part is valid until the next is requested."""
        import torch

        rows, columns = shape[0], math.prod(shape[1:])
        generator = torch.Generator().manual_seed(self._seed ^ zlib.crc32(name.encode()))
        is_norm = len(shape) == 1 and name.endswith(".weight")
        # Words of very different size would make the same few win every greedy choice.
        spread = 0.1 if "embed_tokens" in name or "lm_head" in name else 0.25
        factors = torch.randn(rows, 1, generator=generator, dtype=torch.float32).mul_(spread).exp_()
        scales = factors.mul_(_std(name, shape)).bfloat16()
        step = max(1, _CHUNK_VALUES // columns)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            part = self._buffer[: count * columns]
            if is_norm:
                yield part.fill_(1)
                continue
            offset = int(torch.randint(_BLOCK_VALUES - part.numel(), (), generator=generator))
            window = self._block[offset : offset + part.numel()].view(count, columns)
            torch.mul(window, scales[first : first + count], out=part.view(count, columns))
            yield part


def _std(name: str, shape: tuple[int, ...]) -> float:
    """Return 0.02 for embeddings and biases, and for a matrix what keeps activations of order one."""
    if len(shape) == 1 or "embed_tokens" in name or "pos_embed" in name:
        return 0.02
    # Random attention averages over all positions. At full weight that average drowns the token itself, and decoding
    # repeats one word forever.
    damping = 0.1 if "o_proj" in name else 1.0
    return damping * math.prod(shape[1:]) ** -0.5


def write_checkpoint(
    shape: ModelShape,
    directory: Path,
    *,
    tokens: SpecialTokens | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    most_pixels: int = 4096**2,
    sorts: bool = True,
    drops_cached: bool = True,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint without a tokenizer; memory stays within tens of megabytes.

    `config.json` is written last: a directory without it is not a whole checkpoint.

    Args:
        shape: of the model.
        directory: exists, and holds no checkpoint.
        tokens: ids of special tokens; default: the published ones.
        seed: determines the weights.
        shard_bytes: the most bytes of tensors in a file.
        most_pixels: the most pixels per image, for the image processor.
        sorts: tensors by name, as `save_pretrained` does; otherwise in the order of the model.
        drops_cached: leave nothing of the files in the page cache.
        progress: called with a description, the bytes written and the total.
    """
    tokens = tokens or SpecialTokens()
    config = build_config(shape, tokens)
    shapes = checkpoint_tensors(config)
    shapes = dict(sorted(shapes.items())) if sorts else shapes
    total = sum(map(_tensor_bytes, shapes.values()))
    shards = _split(shapes, shard_bytes)
    weights, done = RandomWeights(seed), 0
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard = {name: shapes[name] for name in names}
        for n_bytes in _write_shard(directory / file, shard, weights, drops_cached=drops_cached):
            done += n_bytes
            if progress is not None:
                progress("writing random weights", done, total)
        places.update(dict.fromkeys(names, file))
    metadata = {"total_parameters": total // _ELEMENT_BYTES, "total_size": total}
    _write_json(directory / INDEX, {"metadata": metadata, "weight_map": places})
    _write_json(directory / "preprocessor_config.json", _preprocessor(most_pixels))
    # Greedy, unlike the published file: the same tokens are decoded each time.
    pad = tokens.end_of_text if tokens.pad is None else tokens.pad
    ids = {"bos_token_id": tokens.end_of_text, "eos_token_id": tokens.end_of_turn, "pad_token_id": pad}
    _write_json(directory / "generation_config.json", {**ids, "do_sample": False})
    config.save_pretrained(directory)


def weight_bytes(shape: ModelShape) -> int:
    """Return the bytes of all weights of a checkpoint."""
    return _ELEMENT_BYTES * shape.n_parameters


def _preprocessor(most_pixels: int) -> dict[str, Any]:
    return {
        "do_resize": True,
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": 256**2, "longest_edge": most_pixels},
        "image_processor_type": "Qwen2VLImageProcessor",
    }


def _tensor_bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _ELEMENT_BYTES


def _split(shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> list[list[str]]:
    """Distribute tensors among files as `save_pretrained` does; a tensor above the limit has its own."""
    shards: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = _tensor_bytes(shape)
        if size > shard_bytes:
            shards.append([name])
            continue
        if filled + size > shard_bytes:
            shards.append(current)
            current, filled = [], 0
        current.append(name)
        filled += size
    return [*shards, current] if current else shards


def _write_shard(
    path: Path, shapes: dict[str, tuple[int, ...]], weights: RandomWeights, *, drops_cached: bool
) -> Iterator[int]:
    """Write one file, and yield the bytes of each part."""
    import torch

    from ...storage import write_header

    def flush() -> None:
        os.fdatasync(file.fileno())
        if drops_cached:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    tensors = {name: ("BF16", shape, _tensor_bytes(shape)) for name, shape in shapes.items()}
    with open(path, "wb") as file, ThreadPoolExecutor(1) as flusher:
        file.write(write_header(tensors, {"format": "pt"}))
        pending: Future[None] | None = None
        unflushed = 0
        for name, shape in shapes.items():
            for part in weights.chunks(name, shape):
                unflushed += file.write(part.view(torch.uint8).numpy().data)
                yield part.nbytes
                if unflushed >= _FLUSH_BYTES:
                    # One flush runs while the next bytes are made; waiting for it bounds what is dirty.
                    if pending:
                        pending.result()
                    pending, unflushed = flusher.submit(flush), 0
        if pending:
            pending.result()
        file.flush()
        flush()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
