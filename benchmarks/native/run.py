"""The native core beside torch: products, attention, and tokens of a model, in one run and in turns.

Products are timed with weights that no cache holds, for one to 256 rows of activations; the memory's speed is that of a
sum over 400 MB. With `--model` (a packed checkpoint) processes with the native core and with `QWEN3VL_MEM_ISA=torch`
take turns. Writes the tables of `README.md` beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
ROWS = (1, 2, 4, 8, 16, 64, 256)
SHAPES = ((2048, 2048), (6144, 2048), (2048, 6144))
_COLD_BYTES = 300_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a packed checkpoint, whose tokens are timed too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="the tables of README.md")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(tokens(arguments.model)))
        return
    from benchmarks.results import BEGIN, END, write_between
    from qwen3_vl_memory_optimizations.compression.speeds import machine_name
    from qwen3_vl_memory_optimizations.native import core

    native = core()
    if native is None:
        sys.exit("the native core is not built: make setup")
    text = f"{machine_name()}; {datetime.date.today().isoformat()}.\n\n" + products_table() + "\n" + attention_table()
    if arguments.model is not None:
        text += "\n" + tokens_table(arguments.model, arguments.rounds)
    print(text)
    if arguments.write:
        write_between(Path(__file__).with_name("README.md"), BEGIN, END, text.splitlines())


def median_s(run: Callable[[int], object], n: int, rounds: int = 3) -> float:
    """Return the median time of `run(0)` to `run(n - 1)` over rounds, after a warm-up."""
    run(0)
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for number in range(n):
            run(number)
        found.append((time.perf_counter() - start) / n)
    return statistics.median(found)


def products_table() -> str:
    """Return the times of products, and of torch's in fp32 with weights decoded before."""
    import torch

    from qwen3_vl_memory_optimizations.compression import INT8Codec
    from qwen3_vl_memory_optimizations.native import core

    native, codec = core(), INT8Codec()
    assert native is not None
    read = torch.zeros(50_000_000, dtype=torch.float64)
    memory = read.nbytes / median_s(lambda _: read.sum(), 3)
    lines = [
        f"A plain read of memory: {memory / 1e9:.1f} GB/s.",
        "",
        "| weight | rows | native, ms | GB/s | GOP/s | 8-bit activations, ms | fp32 of torch, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for n, columns in SHAPES:
        weights = torch.randn(n, columns)
        encoded = codec.encode(weights)
        copies = [encoded["data"].clone() for _ in range(max(3, _COLD_BYTES // (n * columns)))]
        plain = [weights.clone() for _ in range(3)]
        for rows in ROWS:
            lines.append(_row(native, (n, columns), rows, copies, encoded["scale"], plain))
    return "\n".join(lines) + "\n"


def _row(native: Any, shape: tuple[int, int], rows: int, copies: list[Any], scale: Any, plain: list[Any]) -> str:
    import torch

    n, columns = shape
    x, out = torch.randn(rows, columns), torch.empty(rows, n)

    def product_s(integers: Any) -> float:
        def product(number: int) -> object:
            return native.linear(integers, copies[number % len(copies)], scale, torch.float32, out=out)

        return median_s(product, len(copies) if rows < 64 else 4)

    native_s = product_s(native.quantize(x))
    as_bytes = (
        f"{product_s(native.quantize(x, as_bytes=True)) * 1e3:.2f}" if rows > 16 and native.multiplies_bytes else ""
    )
    torch_s = median_s(lambda number: torch.nn.functional.linear(x, plain[number % 3]), 3)
    return (
        f"| {n} x {columns} | {rows} | {native_s * 1e3:.2f} | {n * columns / native_s / 1e9:.1f} | "
        f"{2 * rows * n * columns / native_s / 1e9:.0f} | {as_bytes} | {torch_s * 1e3:.2f} |"
    )


def attention_table() -> str:
    """Return the times of a token's attention in one layer of the 2B shape, and the speed at which blocks are read."""
    lines = ["| tokens before | ms per layer | GB/s |", "|---|---|---|"]
    for tokens in (8192, 32768):
        steps, keep = _attention_steps(tokens, max(4, _COLD_BYTES // (tokens * 8 * 128 * 2)))
        seconds = median_s(lambda number, steps=steps: steps[number](), len(steps))
        lines.append(f"| {tokens:,} | {seconds * 1e3:.2f} | {tokens * 8 * 128 * 2 / seconds / 1e9:.1f} |")
        del keep
    return (
        "Attention to INT8 blocks of 256 tokens (8 key heads of 128, 16 query heads), in memory:\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _attention_steps(tokens: int, layers: int) -> tuple[list[Callable[[], object]], list[Any]]:
    """Return calls that attend to blocks of as many layers, and what must stay alive."""
    import ctypes

    import torch

    from qwen3_vl_memory_optimizations.native import Attention, core

    native, heads, keys, size, block, tail = core(), 16, 8, 128, 256, 64
    assert native is not None
    query, out = torch.randn(1, 1, heads, size), torch.empty(1, 1, heads, size)
    newest = torch.randn(2, 1, keys, tail, size)
    keep: list[Any] = [query, out, newest]
    steps: list[Callable[[], object]] = []
    for _ in range(layers):
        blocks = [
            (
                torch.randint(-127, 128, (keys, block, size), dtype=torch.int8),
                torch.randint(-127, 128, (keys, size, block), dtype=torch.int8),
                torch.full((2, keys, block), 0.01, dtype=torch.bfloat16),
            )
            for _ in range(tokens // block)
        ]
        places = [
            (key.data_ptr(), value.data_ptr(), scale[0].data_ptr(), scale[1].data_ptr()) for key, value, scale in blocks
        ]
        columns = [(ctypes.c_void_p * len(blocks))(*column) for column in zip(*places, strict=True)]
        step = Attention(
            *(query.data_ptr(), 1, 1, heads, keys, size, size**-0.5, len(blocks), block),
            *(ctypes.addressof(column) for column in columns),
            *(newest[0].data_ptr(), newest[1].data_ptr(), 0, keys * tail * size, tail * size, tail, out.data_ptr()),
        )
        keep += [blocks, columns]
        steps.append(lambda step=step: native.run(step))  # type: ignore[misc]
    return steps, keep


def tokens(model_path: Path) -> dict[str, float]:
    """Return milliseconds per token, and seconds for a prompt of 256 tokens."""
    import torch

    from qwen3_vl_memory_optimizations import create_optimized_model

    stamps: list[float] = []

    class Stamps:
        def put(self, value: object) -> None:
            stamps.append(time.perf_counter())

        def end(self) -> None:
            pass

    with tempfile.TemporaryDirectory() as cache:
        model = create_optimized_model(str(model_path), {"cache_dir": cache, "private": True})

        def prompt(length: int) -> torch.Tensor:
            return torch.randint(1000, 100_000, (1, length))

        model.generate(input_ids=prompt(32), max_new_tokens=4, do_sample=False)
        stamps.clear()
        options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
        model.generate(input_ids=prompt(32), streamer=Stamps(), **options)
        times = [after - before for before, after in zip(stamps[4:], stamps[5:], strict=False)]
        start = time.perf_counter()
        model.generate(input_ids=prompt(256), max_new_tokens=1, do_sample=False)
        prompt_s = time.perf_counter() - start
        model.memory_optimizer.close()
    return {"token_ms": statistics.median(times) * 1e3, "prompt_s": prompt_s}


def tokens_table(model_path: Path, rounds: int) -> str:
    """Return the medians of processes that take turns."""
    found: dict[str, list[dict[str, float]]] = {"native": [], "torch": []}
    command = [sys.executable, __file__, "--child", "--model", str(model_path)]
    for _ in range(rounds):
        for kernels, results in found.items():
            environment = {**os.environ, "QWEN3VL_MEM_ISA": "" if kernels == "native" else "torch"}
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            results.append(json.loads(ran.stdout.splitlines()[-1]))
    lines = [
        "| kernels | ms per token | tokens per second | prompt of 256 tokens, s |",
        "|---|---|---|---|",
    ]
    for kernels, results in found.items():
        token_ms, prompt_s = (statistics.median(each[key] for each in results) for key in ("token_ms", "prompt_s"))
        lines.append(f"| {kernels} | {token_ms:.1f} | {1000 / token_ms:.1f} | {prompt_s:.2f} |")
    return f"2B shape, codec `auto`, no budget; {rounds} processes each, in turns.\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
