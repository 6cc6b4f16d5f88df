#!/usr/bin/env python3
"""Write a Qwen3-VL checkpoint of true size with random bfloat16 weights.

Speed and memory depend on shapes and not on what the weights say, so such a checkpoint stands in for the
published one where that cannot be had. Tensor names, shapes, configuration and file layout are those
`save_pretrained` gives, with an index even where one file holds all.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

# A script finds its neighbour by name alone, a module of a package does not.
if __package__:
    from .full_size_shapes import END_OF_TEXT, END_OF_TURN, SIZES, build_config, checkpoint_tensors
else:
    from full_size_shapes import END_OF_TEXT, END_OF_TURN, SIZES, build_config, checkpoint_tensors

SHARD_BYTES = 4 * 10**9
"""Most bytes of tensors in one file, unless one tensor alone has more."""

_ELEMENT_BYTES = 2
_BLOCK_VALUES = 1 << 22
_CHUNK_VALUES = 1 << 21
# Dirty pages are written back and dropped this often, so that the page cache does not fill.
_FLUSH_BYTES = 256 << 20
# Room for headers and small files when free space is checked.
_EXTRA_BYTES = 64 << 20
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer*.json", "vocab.json", "merges.txt", "special_tokens*", "chat_template*")


class RandomWeights:
    """Gives weights about as fast as memory can be copied.

    Drawing billions of normal values would take longer than writing them. A block of them is drawn once, and
    each part of a tensor is a window into it at a random place with every row scaled anew, which leaves
    matrices of full rank whose rows differ in magnitude as those of trained ones do. A tensor depends on the
    seed, its name and its shape alone: the first layers of a reduced checkpoint are those of the full one.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._block = torch.randn(_BLOCK_VALUES, generator=generator).bfloat16()
        self._buffer = torch.empty(_CHUNK_VALUES, dtype=torch.bfloat16)

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """The values of a tensor in order, flat; each part is valid until the next is asked for."""
        rows, columns = shape[0], math.prod(shape[1:])
        generator = torch.Generator().manual_seed(self._seed ^ zlib.crc32(name.encode()))
        is_norm = len(shape) == 1 and name.endswith(".weight")
        # Words of very different size would make the same few win every greedy choice.
        spread = 0.1 if "embed_tokens" in name or "lm_head" in name else 0.25
        factors = torch.randn(rows, 1, generator=generator).mul_(spread).exp_()
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
    """For matrices what keeps activations of order one, for embeddings and biases the usual 0.02."""
    if len(shape) == 1 or "embed_tokens" in name or "pos_embed" in name:
        return 0.02
    # Random attention averages over all positions: at full weight that average drowns the token itself, and
    # decoding repeats one word for ever.
    damping = 0.1 if "o_proj" in name else 1.0
    return damping * math.prod(shape[1:]) ** -0.5


def make_checkpoint(
    size: str,
    out_dir: str | Path,
    *,
    layers: int | None = None,
    vision_layers: int | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    tokenizer_dir: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write a Hugging Face directory of random weights.

    `config.json` is written last: a directory without it is not a whole checkpoint. Memory stays within tens
    of megabytes whatever the size.

    Args:
        size: one of `SIZES`.
        out_dir: directory to write, made if absent.
        layers: text layers; not given: all.
        vision_layers: vision blocks; not given: all.
        seed: decides the weights.
        shard_bytes: most bytes of tensors in a file.
        tokenizer_dir: where to copy the tokenizer's files from; not given: none are written.
        overwrite: replace a checkpoint that is there.
        progress: show a progress bar.

    Returns:
        The directory.

    Raises:
        ValueError: the size is unknown, or a number does not make sense.
        FileExistsError: the directory holds a checkpoint and `overwrite` is off.
        FileNotFoundError: `tokenizer_dir` holds no tokenizer.
        OSError: the disk has too little room; nothing was written.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes}: must be at least 1")
    config = build_config(size, layers=layers, vision_layers=vision_layers)
    shapes = checkpoint_tensors(config)
    tokenizer_files = _tokenizer_files(tokenizer_dir) if tokenizer_dir is not None else []
    out = Path(out_dir)
    old = [*out.glob("*.safetensors"), *out.glob(_INDEX), *out.glob("config.json")]
    if old and not overwrite:
        raise FileExistsError(errno.EEXIST, "already holds a checkpoint (overwrite replaces it)", str(out))
    total = sum(map(_tensor_bytes, shapes.values()))
    _check_room(out, total, reusable=sum(path.stat().st_size for path in old))
    out.mkdir(parents=True, exist_ok=True)
    for path in old:
        path.unlink()
    weights = RandomWeights(seed)
    shards = _split(shapes, shard_bytes)
    places: dict[str, str] = {}
    with _progress_bar(f"{size} checkpoint", total if progress else None) as advance:
        for number, names in enumerate(shards, 1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
            _write_shard(out / file, {name: shapes[name] for name in names}, weights, advance)
            places.update(dict.fromkeys(names, file))
    metadata = {"total_parameters": total // _ELEMENT_BYTES, "total_size": total}
    _write_json(out / _INDEX, {"metadata": metadata, "weight_map": places})
    for path in tokenizer_files:
        shutil.copyfile(path, out / path.name)
    _write_json(out / "preprocessor_config.json", _PREPROCESSOR)
    # Greedy, unlike the published file: a benchmark decodes the same tokens each time.
    tokens = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TURN, "pad_token_id": END_OF_TEXT}
    _write_json(out / "generation_config.json", {**tokens, "do_sample": False})
    config.save_pretrained(out)
    return out


_PREPROCESSOR = {
    "do_resize": True,
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "image_processor_type": "Qwen2VLImageProcessor",
}


def _tensor_bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _ELEMENT_BYTES


def _split(shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> list[list[str]]:
    """Share tensors out among files the way `save_pretrained` does; a tensor above the limit has its own."""
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
    path: Path, shapes: dict[str, tuple[int, ...]], weights: RandomWeights, advance: Callable[[int], None]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _tensor_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format wants the data to begin at a multiple of eight.
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, ThreadPoolExecutor(1) as flusher:
        file.write(len(text).to_bytes(8, "little") + text)
        pending: Future[None] | None = None
        unflushed = 0
        for name, shape in shapes.items():
            for part in weights.chunks(name, shape):
                unflushed += file.write(part.view(torch.uint8).numpy())
                advance(part.nbytes)
                if unflushed >= _FLUSH_BYTES:
                    # One flush runs while the next bytes are made; waiting for it bounds what is dirty.
                    if pending:
                        pending.result()
                    pending, unflushed = flusher.submit(_flush, file.fileno()), 0
        if pending:
            pending.result()
        file.flush()
        _flush(file.fileno())


def _flush(descriptor: int) -> None:
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _check_room(out: Path, total: int, *, reusable: int) -> None:
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + reusable
    needed = total + _EXTRA_BYTES
    if needed > free:
        text = f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free: {(needed - free) / 1e9:.1f} GB missing"
        raise OSError(errno.ENOSPC, text, str(out))


def _tokenizer_files(folder: str | Path) -> list[Path]:
    files = sorted({path for pattern in _TOKENIZER_FILES for path in Path(folder).glob(pattern)})
    if not any(path.name in ("tokenizer.json", "vocab.json") for path in files):
        raise FileNotFoundError(errno.ENOENT, "holds no tokenizer.json or vocab.json", str(folder))
    return files


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def _progress_bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    if total is None:
        yield lambda count: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    with Progress("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def main() -> None:
    """Write the checkpoint the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES, help="published size to imitate")
    parser.add_argument("out_dir", type=Path, help="directory to write")
    parser.add_argument("--layers", type=int, help="text layers (default: all)")
    parser.add_argument("--vision-layers", type=int, help="vision blocks (default: all)")
    parser.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 1e9, help="GB a file (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="decides the weights (default: 0)")
    parser.add_argument("--tokenizer", type=Path, help="directory to copy tokenizer files from")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    args = parser.parse_args()
    try:
        make_checkpoint(
            args.size,
            args.out_dir,
            layers=args.layers,
            vision_layers=args.vision_layers,
            seed=args.seed,
            shard_bytes=int(args.shard_gb * 1e9),
            tokenizer_dir=args.tokenizer,
            overwrite=args.overwrite,
            progress=True,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
