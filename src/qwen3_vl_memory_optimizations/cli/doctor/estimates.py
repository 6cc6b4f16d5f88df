"""Estimate what each model does with each codec in a budget: whether it fits, its speed, time per page and tokens."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from ...compression.kernels import fastest_dtype
from ...config import MemoryConfig
from ...figures import judge, tokens_per_s_with
from ...model.inputs.detail import DETAIL_PIXELS
from ...model.kv.sizes import TAIL_TOKENS
from ...model.run.decode_steps import DecodeUse
from ...model.run.estimate import decode_ops, estimate_prompt, rates_name
from ...model.run.needs import PROCESS_BYTES, STREAMED_BYTES, WORKSPACE_BYTES, RunNeeds, least_budget_bytes, run_needs
from ...model.run.rates import DECODE, RunRates, usual_share
from ...native import core
from ..common.model_shapes import HEAD_DIM, KV_HEADS, MODELS, ModelShape, SpecialTokens, build_config
from ..common.model_sizes import encoded_bytes
from .measurements import Measurements

CODECS = ("none", "int8_rotated", "int4")
BITS = {"none": 16, "int8_rotated": 8, "int4": 4}
_RECORDED_AS = {"none": ("none",), "int8_rotated": ("auto", "int8_rotated", "int8"), "int4": ("int4",)}
_PATCH, _MERGED, _MERGED_SIDE = 16, 4, 32
_A4_RATIO = math.sqrt(2)
_QUESTION_TOKENS, _ANSWER_TOKENS = 40, 256
_PIECE_TOKENS = 1024
_MOST_TOKENS = 262_144
_KERNEL_SHARE = 63 / 64
_DECODE_SHARE = 0.5
"""Share of the speed of products alone that a token reached after 1,024 others: 0.47 of the memory bandwidth, 0.66 of
a slower kernel (benchmarks/arithmetic).
"""
_NATIVE_DECODE_SHARE = 0.85
"""The same where the native core computes whole layers."""
_ROUND_BYTES = 100_000_000
_CASES = {"1,024 tokens": (1024, 0), "16,384 tokens": (16384, 0), "an image of 1,024 tokens": (1088, 4096)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one model does with one codec in one budget; `None` where it is not measured, or the run is refused.

    Attributes:
        least_bytes: the least budget for a page and an answer; with less, the run is refused.
        whole_bytes: the budget with which a decode step reads nothing from the SSD.
        fits: a page and its answer are admitted; `in_memory`: and a decode step reads nothing.
        read_bytes_per_token: read from the SSD per token.
        limit: `SSD`, `memory` or `processor`.
        page_s: time to the first token about one page at detail `document`.
        measured: the times come from runs of this model on this machine, not from its kernels.
        tokens: prompt and answer whose keys and values fit in memory beside the weights; `pages`: as pages.
    """

    model: str
    codec: str
    budget_bytes: int
    least_bytes: int
    whole_bytes: int
    fits: bool
    in_memory: bool
    read_bytes_per_token: int
    tokens_per_s: float | None
    limit: str | None
    page_s: float | None
    measured: bool
    tokens: int
    pages: int


def page_grid() -> tuple[int, int, int]:
    """Return frame groups, rows and columns of patches of an A4 page at detail `document`."""
    pixels = DETAIL_PIXELS["document"]
    assert pixels is not None
    width = math.sqrt(pixels / _A4_RATIO)
    sides = (math.floor(extent / _MERGED_SIDE) * _MERGED_SIDE // _PATCH for extent in (width * _A4_RATIO, width))
    return (1, *sides)  # type: ignore[return-value]


def least_budgets(shape: ModelShape) -> dict[str, int]:
    """Return the minimum `ram_budget` for each prompt size; with less, a run is refused before its first token."""
    return {
        name: least_budget_bytes(
            build_config(shape, SpecialTokens()),
            prompt_tokens=tokens,
            new_tokens=_ANSWER_TOKENS,
            patches=patches,
            itemsize=fastest_dtype().itemsize,
        )
        for name, (tokens, patches) in _CASES.items()
    }


class Estimator:
    """Estimates one model with one codec.

    Rates come from runs on this machine where `rates.json` has them, else from its kernels: a share of the speed of
    one product for prompts and pictures, and for a decode step half of the kernel or of the memory bandwidth, whichever
    is slower.

    Args:
        shape, codec: of the model.
        machine: the measured rates.
        cache_dir: holds `rates.json`; `None`: the default.
    """

    def __init__(self, shape: ModelShape, codec: str, machine: Measurements, cache_dir: Path | None = None) -> None:
        self._shape, self._codec, self._machine, self._cache_dir = shape, codec, machine, cache_dir
        self._config, self._dtype = build_config(shape, SpecialTokens()), fastest_dtype()
        self._weights = encoded_bytes(shape.decoder_matrices(), codec)
        self._tower = encoded_bytes(shape.vision_matrices(), codec)
        self._page = page_grid()
        patches = math.prod(self._page)
        self._page_tokens = patches // _MERGED
        sizes: dict[str, Any] = {"new_tokens": _ANSWER_TOKENS, "patches": patches, "itemsize": self._dtype.itemsize}
        sizes["prompt_tokens"] = self._page_tokens + _QUESTION_TOKENS
        if codec == "none":  # keys and values stay as they are too
            sizes["token_bytes"] = 2 * 2 * shape.layers * KV_HEADS * HEAD_DIM
        self._needs: RunNeeds = run_needs(self._config, **sizes)
        self.least_bytes = least_budget_bytes(self._config, **sizes)
        self._token_bytes = self._needs.blocks_bytes / (sizes["prompt_tokens"] + _ANSWER_TOKENS - TAIL_TOKENS)

    @property
    def whole_bytes(self) -> int:
        """The budget, in whole 0.1 GB, with which a decode step after a page reads nothing."""
        needed = self._weights + self._beside_bytes()
        return max(_rounded(needed / _KERNEL_SHARE), _rounded(self.least_bytes))

    def row(self, budget_bytes: int) -> Row:
        """Estimate a budget."""
        fits = budget_bytes >= self.least_bytes
        room = max(0, int(budget_bytes * _KERNEL_SHARE) - self._beside_bytes())
        resident = min(self._weights, room)
        missing = self._weights - resident
        rates = self._rates(budget_bytes)
        rate, limit = self._decode(rates, resident) if fits else (None, None)
        page_s, measured = self._page_s(rates, missing, room) if fits else (None, False)
        spare = room - self._weights + self._needs.blocks_bytes
        tokens = min(_MOST_TOKENS, TAIL_TOKENS + int(spare / self._token_bytes)) if fits and not missing else 0
        return Row(
            model=self._shape.name,
            codec=self._codec,
            budget_bytes=budget_bytes,
            least_bytes=self.least_bytes,
            whole_bytes=self.whole_bytes,
            fits=fits,
            in_memory=fits and not missing,
            read_bytes_per_token=missing,
            tokens_per_s=rate,
            limit=limit,
            page_s=page_s,
            measured=measured and rates.knows(DECODE),
            tokens=tokens,
            pages=tokens // self._page_tokens,
        )

    def _beside_bytes(self) -> int:
        """Return what a run about a page needs beside the weights while it decodes."""
        needs = self._needs
        return PROCESS_BYTES + WORKSPACE_BYTES + STREAMED_BYTES + needs.pinned_bytes + needs.blocks_bytes

    def _rates(self, budget_bytes: int) -> RunRates:
        """Return the rates of earlier runs; those of a codec's other names count if it has none."""
        config = MemoryConfig(cache_dir=self._cache_dir, ram_budget=budget_bytes)
        # In the compute dtype a prompt reaches the usual share of its product; a codec changes the product alone.
        product, kernel = (self._machine.prompt[kind].per_s for kind in (self._dtype_name(), self._kind()))
        assumed = 1 / (1 / kernel + (1 / usual_share() - 1) / product)
        found = [
            RunRates(config, rates_name(self._config, name, self._dtype), assumed_ops_per_s=assumed)
            for name in _RECORDED_AS[self._codec]
        ]
        return next((each for each in found if each.knows(DECODE)), found[0])

    def _dtype_name(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    def _kind(self) -> str:
        return self._dtype_name() if self._codec == "none" else self._codec

    def _decode(self, rates: RunRates, resident_bytes: int) -> tuple[float | None, str | None]:
        """Return tokens/s and what limits them."""
        past = self._page_tokens
        ops = decode_ops(self._config, past)
        if rates.knows(DECODE):
            compute_s, _ = rates.seconds(DECODE, ops)
        else:
            product_s = max(ops / self._machine.decode[self._kind()].per_s, self._weights / self._machine.memory.per_s)
            native = self._codec != "none" and core() is not None
            compute_s = product_s / (_NATIVE_DECODE_SHARE if native else _DECODE_SHARE)
        ssd = self._machine.ssd
        if ssd is None:
            if resident_bytes < self._weights:
                return None, None
            use = DecodeUse(seconds=compute_s, steps=1, tokens=1, used_bytes=self._weights)
            return 1 / compute_s, judge(use, bandwidth=self._machine.memory.per_s).limit
        # A step that reads everything, of which the bytes that stay in memory are then taken off.
        reading_s = self._weights / ssd.per_s
        whole = _use(compute_s, reading_s, self._weights, self._weights)
        rate = tokens_per_s_with(whole, resident_bytes)
        missing = self._weights - resident_bytes
        left = _use(compute_s, missing / ssd.per_s, missing, self._weights)
        return rate, judge(left, bandwidth=self._machine.memory.per_s).limit

    def _page_s(self, rates: RunRates, missing_bytes: int, room_bytes: int) -> tuple[float | None, bool]:
        """Return the time to the first token about a page; weights that do not fit are read once per piece."""
        tokens = self._page_tokens + _QUESTION_TOKENS
        found = estimate_prompt(self._config, rates, [self._page], tokens)
        if found.measured or not missing_bytes:
            return found.seconds, found.measured
        if self._machine.ssd is None:
            return None, False
        pieces = math.ceil(tokens / _PIECE_TOKENS)
        read_bytes = pieces * missing_bytes + max(0, self._tower - room_bytes)
        return max(found.seconds, read_bytes / self._machine.ssd.per_s), False


def estimate_all(machine: Measurements, *, limit_bytes: int, exact: bool, cache_dir: Path | None) -> list[Row]:
    """Estimate each model and codec.

    Args:
        machine: the measured rates.
        limit_bytes: the most memory that may be used.
        exact: this budget alone; otherwise the least one, and the one with which everything fits if it is less.
        cache_dir: holds `rates.json`; `None`: the default.
    """
    rows = []
    for shape in MODELS:
        for codec in CODECS:
            estimator = Estimator(shape, codec, machine, cache_dir)
            budgets = {min(limit_bytes, estimator.whole_bytes)} | {min(limit_bytes, _rounded(estimator.least_bytes))}
            rows += [estimator.row(budget) for budget in ([limit_bytes] if exact else sorted(budgets))]
    return rows


def _use(compute_s: float, reading_s: float, read_bytes: int, used_bytes: int) -> DecodeUse:
    """Return a decode step whose reads go on beside its products; it waits for what they take longer."""
    stall_s = max(0.0, reading_s - compute_s)
    return DecodeUse(compute_s + stall_s, stall_s, reading_s, 1, 1, read_bytes, used_bytes)


def _rounded(n_bytes: float) -> int:
    return math.ceil(n_bytes / _ROUND_BYTES) * _ROUND_BYTES
