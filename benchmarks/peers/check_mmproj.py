"""Compare llama.cpp with transformers in fp32 on the same pixels: are the tower and the positions the same?

Images have sides that are multiples of 32, so no side resizes them. Compared are the embeddings of the tower, the main
ones and DeepStack's, and the logits of the tokens after an image. Files in fp16 prove names, layout and positions; the
quantised ones are to be read beside what bf16 alone does to transformers. libmtmd computes GELU from a table in fp16.
Needs memory for the model in fp32, and 4 GB of disk for the 2B shape.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks.peers.check_gguf import agreement  # noqa: E402
from benchmarks.peers.layout import FAST_TOWER, PEERS, SMALL_TOWER, Layout, Peer, worker_environment  # noqa: E402
from benchmarks.peers.prepare import write_gguf, write_mmproj  # noqa: E402
from benchmarks.peers.workers._measure import PIXELS_PER_TOKEN, random_ids  # noqa: E402

SIDES = ((448, 448), (320, 608), (256, 256))
"""Heights and widths of the images."""
TEXT_TOKENS = 32
COMPARED = (("F16", FAST_TOWER), ("Q8_0", SMALL_TOWER), ("Q4_0", SMALL_TOWER))
"""Types of the text decoder and of the tower."""
PARTS = ("embeddings", "deepstack 1", "deepstack 2", "deepstack 3", "logits")

Arrays = dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2B")
    parser.add_argument("--bench-dir", type=Path, default=ROOT / ".bench")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--child", choices=_CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--tower", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    layout = Layout(arguments.bench_dir.resolve())
    if arguments.child:
        np.savez(arguments.out, **_CHILDREN[arguments.child](layout, arguments))
        return
    true = _in_process(layout, arguments, PEERS["transformers fp32"])
    found = {"transformers bf16": _in_process(layout, arguments, PEERS["transformers bf16"])}
    for text_type, tower_type in COMPARED:
        with _files(layout, arguments.shape, text_type, tower_type):
            peer = replace(PEERS["llama.cpp Q8_0"], variant=text_type)
            name = f"llama.cpp {text_type}, tower {tower_type}"
            found[name] = _in_process(layout, arguments, peer, tower_type)
    results = {name: {part: agreement(each[part], true[part]) for part in PARTS} for name, each in found.items()}
    print(json.dumps(results, indent=1))


@contextlib.contextmanager
def _files(layout: Layout, shape: str, text_type: str, tower_type: str) -> Iterator[None]:
    """Write the files that `prepare.py` does not, and remove them in the end."""
    paths = layout.vision_gguf(shape, text_type), layout.mmproj(shape, tower_type)
    absent = [path for path in paths if not path.exists()]
    write_gguf(layout, shape, paths[0], text_type, "qwen3vl")
    write_mmproj(layout, shape, tower_type)
    yield
    for path in absent:
        path.unlink()


def _in_process(layout: Layout, arguments: argparse.Namespace, peer: Peer, tower_type: str = "") -> Arrays:
    python = str(layout.python) if peer.needs else sys.executable
    with tempfile.TemporaryDirectory() as directory:
        out = os.path.join(directory, "found.npz")
        command = [python, __file__, "--shape", arguments.shape, "--bench-dir", str(layout.bench), "--out", out]
        command += ["--child", peer.worker, "--variant", peer.variant, "--tower", tower_type]
        command += ["--threads", str(arguments.threads)]
        subprocess.run(command, check=True, env=worker_environment(layout, peer, "native", arguments.threads))
        return dict(np.load(out))


def _prompts() -> Iterator[tuple[np.ndarray, list[int]]]:
    """Give images, smooth as photographs are and with all values, each with tokens to follow it."""
    for seed, (height, width) in enumerate(SIDES):
        rows, columns = np.mgrid[:height, :width] / 32
        waves = [np.sin(rows * (1 + seed + band / 3) + columns * (2 - band)) for band in range(3)]
        noise = np.random.default_rng(seed).normal(0, 20, (height, width, 3))
        pixels = np.clip(127.5 + 100 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)
        yield pixels, random_ids(TEXT_TOKENS, seed)


def _collected(results: Iterable[tuple[np.ndarray, np.ndarray]], hidden: int) -> Arrays:
    """Return embeddings and logits of all images; the embeddings part by part."""
    embeddings, logits = (np.concatenate(each) for each in zip(*results, strict=True))
    parts = np.split(embeddings, embeddings.shape[1] // hidden, axis=1)
    return dict(zip(PARTS, [*parts, logits], strict=True))


def _transformers(layout: Layout, arguments: argparse.Namespace) -> Arrays:
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    torch.set_num_threads(arguments.threads)
    directory = layout.checkpoint(arguments.shape)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.variant]
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype).eval()
    processor = AutoImageProcessor.from_pretrained(directory)
    config = model.config

    def results() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for pixels, text in _prompts():
            image = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
            features = model.get_image_features(image["pixel_values"], image["image_grid_thw"])
            embeddings = torch.cat([features.pooler_output[0], *(each[0] for each in features.deepstack_features)], 1)
            expected = pixels.shape[0] * pixels.shape[1] // PIXELS_PER_TOKEN**2
            if len(embeddings) != expected:
                raise ValueError(f"{len(embeddings)} tokens of an image of {pixels.shape}, not {expected}")
            marked = [config.vision_start_token_id, *[config.image_token_id] * expected, config.vision_end_token_id]
            ids = torch.tensor([marked + text])
            kinds = (ids == config.image_token_id).int()
            logits = model(input_ids=ids, mm_token_type_ids=kinds, **image).logits[0, -1 - TEXT_TOKENS :]
            yield embeddings.float().numpy(), logits.float().numpy()

    with torch.no_grad():
        return _collected(results(), config.text_config.hidden_size)


def _llama_cpp(layout: Layout, arguments: argparse.Namespace) -> Arrays:
    import llama_cpp

    from benchmarks.peers.workers._mtmd import ImagePrompts

    path = str(layout.vision_gguf(arguments.shape, arguments.variant))
    llama = llama_cpp.Llama(path, n_ctx=512, n_threads=arguments.threads, flash_attn=True, verbose=False)
    images = ImagePrompts(llama, layout.mmproj(arguments.shape, arguments.tower), arguments.threads)
    results = [(images.embeddings(pixels), images.prefill(pixels, ids, all_logits=True)) for pixels, ids in _prompts()]
    return _collected(results, llama.n_embd())


_CHILDREN = {"plain_transformers": _transformers, "llama_cpp": _llama_cpp}


if __name__ == "__main__":
    main()
