"""One measurement of the KV cache as JSON: attention and cache of a decode step, perplexity through the cache, swap.

    measure.py step --codecs dynamic int8 --tokens 32768   `dynamic`: DynamicCache and sdpa
    measure.py perplexity MODEL --codecs int8 --tokens 20480
    measure.py swap --codecs int8 --tokens 32768 --budget 500000000   blocks on the SSD, and what the SSD gives

`step` builds the cache of the 2B shape (28 layers, 16 query and 8 key-value heads of 128) from random numbers and runs
the update of the cache and the attention of all layers, with no weights between them.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks import results  # noqa: E402

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 28, 16, 8, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=("step", "perplexity", "swap"))
    parser.add_argument("model", nargs="?", help="checkpoint of a language model, for `perplexity`")
    parser.add_argument("--codecs", nargs="+", default=["int8"], help="the first alone counts, but for `step`")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--block-tokens", type=int, default=None)
    parser.add_argument("--window", type=int, default=2048, help="tokens of a window of text")
    parser.add_argument("--chunk", type=int, default=64, help="tokens of a forward, for `perplexity`")
    parser.add_argument("--budget", type=int, default=0, help="bytes for the blocks, for `swap`")
    parser.add_argument("--swap-dir", type=Path, default=Path("/tmp"))
    arguments = parser.parse_args()
    here = {"machine": results.machine(), "commit": results.commit(), "date": results.now()}
    here["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    here["threads"] = torch.get_num_threads()
    with torch.no_grad():
        found = {"step": step, "perplexity": perplexity, "swap": swap}[arguments.work](arguments)
    print(json.dumps(vars(arguments) | found | here, default=str))


def shape_of_2b() -> SimpleNamespace:
    """Return what the caches read of a configuration."""
    config = SimpleNamespace(num_hidden_layers=LAYERS, _attn_implementation="managed_sdpa")
    config.get_text_config = lambda decoder=True: config
    return config


def new_cache(codec: str, block_tokens: int | None, pager: object = None) -> object:
    """Return an empty cache: DynamicCache, or ours."""
    if codec == "dynamic":
        from transformers import DynamicCache

        return DynamicCache()
    from qwen3_vl_memory_optimizations.model.kv.cache import BLOCK_TOKENS, ManagedKVCache

    return ManagedKVCache(shape_of_2b(), codec=codec, pager=pager, block_tokens=block_tokens or BLOCK_TOKENS)


def fill(cache: object, tokens: int, dtype: torch.dtype, piece: int = 4096) -> None:
    """Write random keys and values into all layers; those of one piece are the same in each layer."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, tokens, piece):
        length = min(piece, tokens - start)
        states = torch.randn((2, 1, KV_HEADS, length, HEAD_DIM), generator=generator).to(dtype)
        for layer in range(LAYERS):
            cache.update(states[0], states[1], layer)
            if hasattr(cache.layers[layer], "settle"):
                cache.layers[layer].settle()


class Step:
    """A decode step of all layers: each appends a token and attends."""

    def __init__(self, dtype: torch.dtype) -> None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        from qwen3_vl_memory_optimizations.model.kv.attention import attention_forward

        self._attend = {True: sdpa_attention_forward, False: attention_forward}
        self._module = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, is_causal=True)
        self._query = torch.randn((1, HEADS, 1, HEAD_DIM)).to(dtype)
        self._key, self._value = torch.randn((2, 1, KV_HEADS, 1, HEAD_DIM)).to(dtype)

    def __call__(self, cache: object) -> float:
        """Return the seconds that it took."""
        attend = self._attend[type(cache).__name__ == "DynamicCache"]
        start = time.perf_counter()
        for layer in range(LAYERS):
            keys, values = cache.update(self._key, self._value, layer)
            attend(self._module, self._query, keys, values, None, scaling=HEAD_DIM**-0.5)
        return time.perf_counter() - start


def step(arguments: argparse.Namespace) -> dict:
    """Time decode steps behind a context; caches take turns, step by step."""
    dtype = getattr(torch, arguments.dtype)
    caches = {codec: new_cache(codec, arguments.block_tokens) for codec in arguments.codecs}
    for cache in caches.values():
        fill(cache, arguments.tokens, dtype)
    take_step = Step(dtype)
    seconds: dict[str, list[float]] = {codec: [] for codec in caches}
    for _ in range(arguments.steps):
        for codec, cache in caches.items():
            seconds[codec].append(take_step(cache))
    return {"caches": {codec: figures(cache, seconds[codec]) for codec, cache in caches.items()}}


def figures(cache: object, seconds: list[float]) -> dict:
    """Return what a cache took and holds."""
    sixteen_bit_bytes = 2 * 2 * LAYERS * KV_HEADS * HEAD_DIM * cache.get_seq_length()
    if hasattr(cache, "storage_bytes"):
        n_bytes = cache.storage_bytes()
    else:
        n_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    measured = seconds[len(seconds) // 3 :]  # kernels are chosen in the first third
    return {
        "step_ms": round(1e3 * statistics.median(measured), 1),
        "least_ms": round(1e3 * min(measured), 1),
        "n_bytes": n_bytes,
        "of_16_bit": round(n_bytes / sixteen_bit_bytes, 4),
    }


def perplexity(arguments: argparse.Namespace) -> dict:
    """Read text in windows, a chunk at a time through the cache, so that what was cached is what is attended to."""
    import math

    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    from qwen3_vl_memory_optimizations.evaluation.data import SHIPPED_TEXT
    from qwen3_vl_memory_optimizations.model.kv.cache import ManagedKVCache
    from qwen3_vl_memory_optimizations.model.run.generation import cache_maker

    codec = arguments.codecs[0]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if codec != "dynamic":
        cache_maker(model, codec, None, reuses=False)  # the model attends over our caches from now on
    ids = AutoTokenizer.from_pretrained(arguments.model)(
        SHIPPED_TEXT.read_text(encoding="utf-8"), return_tensors="pt"
    ).input_ids[0]
    name = "cache" if "cache" in inspect.signature(type(model.model).forward).parameters else "past_key_values"
    total, count = 0.0, 0
    for start in range(0, min(arguments.tokens, len(ids) - arguments.window), arguments.window):
        window = ids[start : start + arguments.window][None]
        cache = (
            DynamicCache()
            if codec == "dynamic"
            else ManagedKVCache(model.config, codec=codec, block_tokens=arguments.block_tokens)
        )
        logits = []
        for position in range(0, window.shape[1], arguments.chunk):
            logits.append(model(window[:, position : position + arguments.chunk], **{name: cache}).logits[0])
        scores = torch.cat(logits)[:-1].log_softmax(-1)
        total -= float(scores.gather(1, window[0, 1:, None]).sum())
        count += window.shape[1] - 1
    return {"perplexity": math.exp(total / count), "scored_tokens": count}


def swap(arguments: argparse.Namespace) -> dict:
    """Decode with more KV than the budget holds; compare the rate of reading with that of direct reads alone."""
    from qwen3_vl_memory_optimizations import MemoryOptimizer

    settings = {"tensor_budget": arguments.budget, "cache_dir": arguments.swap_dir}
    with MemoryOptimizer(memory_config=settings) as optimizer:
        dtype = getattr(torch, arguments.dtype)
        cache = new_cache(arguments.codecs[0], arguments.block_tokens, optimizer.pager)
        fill(cache, arguments.tokens, dtype, piece=1024)
        stats, take_step = optimizer.pager.stats, Step(dtype)
        for _ in range(2):
            take_step(cache)
        before = stats.bytes_read
        seconds = [take_step(cache) for _ in range(arguments.steps)]
        n_read = stats.bytes_read - before
        found = {
            "n_bytes": cache.storage_bytes(),
            "swap_used_bytes": optimizer.pager.swap_used_bytes,
            "bytes_read_a_step": n_read // len(seconds),
            "step_ms": round(1e3 * statistics.median(seconds), 1),
            "read_gb_s": round(n_read / sum(seconds) / 1e9, 3),
        }
        del cache
    return found | {"ssd_gb_s": round(ssd_rate(arguments.swap_dir), 3)}


def ssd_rate(directory: Path, n_bytes: int = 1 << 30) -> float:
    """Return the GB/s of direct reads of 1 MiB by four threads, of a file that was just written."""
    import os
    from concurrent.futures import ThreadPoolExecutor

    from qwen3_vl_memory_optimizations.paging import BlockSpace
    from qwen3_vl_memory_optimizations.storage import SwapFile

    size = 1 << 20
    os.makedirs(directory, exist_ok=True)
    with SwapFile(directory, 2 * n_bytes) as file, ThreadPoolExecutor(4) as threads:
        space = BlockSpace(None)
        buffers = [space.allocate(2 * size).data for _ in range(4)]
        addresses = [-(-buffer.data_ptr() // 4096) * 4096 for buffer in buffers]
        extents = [file.allocate(size) for _ in range(n_bytes // size)]
        for offset in extents:
            file.write(offset, addresses[0], size)
        start = time.perf_counter()

        def read(lane: int) -> None:
            for offset in extents[lane::4]:
                file.read(offset, addresses[lane], size)

        list(threads.map(read, range(4)))
        return n_bytes / (time.perf_counter() - start) / 1e9


if __name__ == "__main__":
    main()
