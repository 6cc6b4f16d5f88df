"""Measure this machine: memory, SSD and matrix products, each several times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...compression import Codec, INT4Codec, LinearInput, RotatedINT8Codec, Scratch
from ...errors import StorageError
from ...figures import Reading, read_bandwidth, read_rates
from ...storage.probe import scratch_bandwidths

PROMPT_ROWS = 128
"""Rows of a product that stands for a prompt or picture."""
_COLUMNS, _ROWS = 2048, 2048
_SSD_READINGS = 5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Rates of this machine.

    Attributes:
        memory: bandwidth of all threads in bytes/s.
        ssd: bandwidth of direct reads in bytes/s; `None`: not measured, for the reason `ssd_problem`.
        decode, prompt: weights as `float32`, `bfloat16`, `int8_rotated`, `int4` -> operations/s of products with one
            row, and with `PROMPT_ROWS`.
    """

    memory: Reading
    ssd: Reading | None
    ssd_problem: str | None
    decode: dict[str, Reading]
    prompt: dict[str, Reading]

    def to_dict(self) -> dict[str, Any]:
        """Return medians and spreads, ready for JSON."""
        return {
            "ssd_bytes_per_s": None if self.ssd is None else self.ssd.per_s,
            "ssd_problem": self.ssd_problem,
            "memory_bytes_per_s": self.memory.per_s,
            "decode_operations_per_s": {kind: each.per_s for kind, each in self.decode.items()},
            "prompt_operations_per_s": {kind: each.per_s for kind, each in self.prompt.items()},
            "spreads": {name: each.spread for name, each in self.readings().items()},
        }

    def readings(self) -> dict[str, Reading]:
        """Return all readings by name."""
        found = {"memory": self.memory} | ({} if self.ssd is None else {"storage": self.ssd})
        found |= {f"decode {kind}": each for kind, each in self.decode.items()}
        return found | {f"prompt {kind}": each for kind, each in self.prompt.items()}


def measure(directory: Path, *, quick: bool) -> Measurements:
    """Measure this machine, and the SSD of a directory; a full disk does not hide the rest."""
    ssd, problem = None, None
    try:
        readings = 3 if quick else _SSD_READINGS
        found = scratch_bandwidths(directory, readings=readings + 1, total_bytes=(64 if quick else 256) << 20)
        ssd = Reading.of(found[1:])  # the first one is the warm-up
    except StorageError as error:
        problem = str(error)
    readings = 5 if quick else 9
    return Measurements(
        memory=read_bandwidth((64 if quick else 256) << 20, readings=readings),
        ssd=ssd,
        ssd_problem=problem,
        decode=product_rates(1, readings=readings),
        prompt=product_rates(PROMPT_ROWS, readings=readings),
    )


def product_rates(rows: int, *, readings: int) -> dict[str, Reading]:
    """Measure products of `rows` activations with a 2048 x 2048 layer, in operations/s.

    Args:
        rows: 1 for a decode step; many for a prompt or a picture.
        readings: how often each rate is read.

    Returns:
        One rate each for fp32, bf16, INT8 and INT4 weights, the last two with activations as the library computes: with
        one thread or with all, whichever is faster.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_ROWS, _COLUMNS, generator=generator, dtype=torch.float32)
    x = torch.randn(rows, _COLUMNS, generator=generator, dtype=torch.float32)
    low_x, low_weight = x.bfloat16(), weight.bfloat16()
    operations = 2.0 * rows * _COLUMNS * _ROWS

    def encoded_product(codec: Codec) -> Callable[[], Any]:
        encoded, scratch = codec.encode(weight), Scratch()
        return lambda: codec.linear(LinearInput(x), encoded, bias=None, scratch=scratch)

    products: dict[str, Callable[[], Any]] = {
        "float32": lambda: F.linear(x, weight),
        "bfloat16": lambda: F.linear(low_x, low_weight),
        "int8_rotated": encoded_product(RotatedINT8Codec()),
        "int4": encoded_product(INT4Codec()),
    }
    runs = {name: (run, operations) for name, run in products.items()}
    threads = torch.get_num_threads()
    rates: list[dict[str, Reading]] = []
    try:
        # On a busy machine several threads wait for each other, and one is faster: decode steps choose likewise.
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            with torch.inference_mode():
                rates.append(read_rates(runs, readings=readings))
    finally:
        torch.set_num_threads(threads)
    return {name: max((found[name] for found in rates), key=lambda each: each.per_s) for name in products}
