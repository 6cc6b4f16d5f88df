#!/usr/bin/env python3
"""Write a Qwen3-VL checkpoint of true size with random bfloat16 weights.

Speed and memory depend on shapes and not on what the weights say, so such a checkpoint stands in for the
published one where that cannot be had.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from qwen3_vl_memory_optimizations.cli.common.model_shapes import MODELS  # noqa: E402
from qwen3_vl_memory_optimizations.cli.common.progress import progress_line  # noqa: E402
from qwen3_vl_memory_optimizations.cli.common.random_checkpoint import (  # noqa: E402
    INDEX,
    SHARD_BYTES,
    weight_bytes,
    write_checkpoint,
)

SIZES = {shape.name: shape for shape in MODELS}
_TOKENIZER_FILES = ("tokenizer*.json", "vocab.json", "merges.txt", "special_tokens*", "chat_template*")
_EXTRA_BYTES = 64 << 20
"""Room for headers and small files when free space is checked."""


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

    Args:
        size: one of `SIZES`.
        out_dir: directory to write, made if absent.
        layers: text layers; not given: all.
        vision_layers: vision blocks; not given: all.
        seed: decides the weights.
        shard_bytes: most bytes of tensors in a file.
        tokenizer_dir: where to copy the tokenizer's files from; not given: none are written.
        overwrite: replace a checkpoint that is there.
        progress: show a progress line.

    Returns:
        The directory.

    Raises:
        ValueError: the size is unknown, or a number does not make sense.
        FileExistsError: the directory holds a checkpoint and `overwrite` is off.
        FileNotFoundError: `tokenizer_dir` holds no tokenizer.
        OSError: the disk has too little room; nothing was written.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes}: must be at least 1")
    shape = SIZES[size].reduced(layers=layers, vision_blocks=vision_layers)
    tokenizer_files = _tokenizer_files(tokenizer_dir) if tokenizer_dir is not None else []
    out = Path(out_dir)
    old = [*out.glob("*.safetensors"), *out.glob(INDEX), *out.glob("config.json")]
    if old and not overwrite:
        raise FileExistsError(errno.EEXIST, "already holds a checkpoint (overwrite replaces it)", str(out))
    _check_room(out, weight_bytes(shape), reusable=sum(path.stat().st_size for path in old))
    out.mkdir(parents=True, exist_ok=True)
    for path in old:
        path.unlink()
    for path in tokenizer_files:
        shutil.copyfile(path, out / path.name)
    with progress_line(quiet=not progress) as line:
        write_checkpoint(shape, out, seed=seed, shard_bytes=shard_bytes, progress=line.report)
    return out


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
