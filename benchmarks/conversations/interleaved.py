"""Twelve conversations in turns, above memory: what each setting of the memory systems moves, and what it finds.

The tiny model, whose keys and values do not fit beside its weights: `python benchmarks/conversations/interleaved.py`.
Each row is a run of the same conversations with one setting changed. *Found in memory*: of the bytes of keys and values
that turns went on with, those that were in memory. Belady is replayed on the uses that were recorded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks.eviction.replay import TraceRecorder, replay, replay_belady  # noqa: E402
from qwen3_vl_memory_optimizations import create_optimized_model  # noqa: E402
from qwen3_vl_memory_optimizations.runtime_policy.swapping import create_swapping_algorithm  # noqa: E402
from tests.model import tiny  # noqa: E402

PERIODS = (5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27)
"""Of each conversation, in turns of all: each has a rhythm of its own."""
FIRST_TOKENS, MORE_TOKENS, ANSWER_TOKENS = 500, 24, 8
MOST_TOKENS = 900
BUDGET = 6 << 20
VARIANTS: dict[str, dict[str, Any]] = {
    "default (predictive)": {},
    "swap_algorithm=lru": {"swap_algorithm": "lru"},
    "swap_algorithm=clock": {"swap_algorithm": "clock"},
    "swap_pressure_threshold=0.3": {"swap_pressure_threshold": 0.3},
    "enable_swapping=False": {"enable_swapping": False},
    "enable_tiering=False": {"enable_tiering": False},
    "tier_migration_interval=0.05": {"tier_migration_interval": 0.05, "swap_pressure_threshold": 0.6},
    "enable_predictive_gc=False": {"enable_predictive_gc": False},
}


def schedule(turns: int) -> list[int]:
    """Return whose turn it is, each time."""
    due = [float(number) for number in range(len(PERIODS))]
    order = []
    for _ in range(turns):
        who = min(range(len(due)), key=lambda number: due[number])
        order.append(who)
        due[who] += PERIODS[who]
    return order


@torch.no_grad()
def run(settings: dict[str, Any], turns: int) -> tuple[dict[str, Any], TraceRecorder]:
    """Hold the conversations once; return what moved, and the uses of keys and values."""
    recorder = TraceRecorder()
    with tempfile.TemporaryDirectory() as directory:
        given = {"codec": "int8", "tensor_budget": BUDGET, "cache_dir": directory, "private": True, **settings}
        model = create_optimized_model(tiny.DIRECTORY, given)
        optimizer = model.memory_optimizer

        def note(tensor_id: str, n_bytes: int, kind: str) -> None:
            if kind == "kv_cache":
                recorder(tensor_id, n_bytes, kind)

        optimizer.pager.listen(note)
        draw = torch.Generator().manual_seed(0)
        talks: list[torch.Tensor | None] = [None] * len(PERIODS)
        start_s = time.perf_counter()
        for who in schedule(turns):
            ids = talks[who]
            if ids is None or ids.shape[1] > MOST_TOKENS:
                ids = torch.randint(7, 60, (1, FIRST_TOKENS), generator=draw)
            else:
                ids = torch.cat([ids, torch.randint(7, 60, (1, MORE_TOKENS), generator=draw)], dim=1)
            options = {"max_new_tokens": ANSWER_TOKENS, "min_new_tokens": ANSWER_TOKENS, "do_sample": False}
            talks[who] = model.generate(input_ids=ids, **options)
        wall_s = time.perf_counter() - start_s
        stats = optimizer.get_memory_efficiency_stats()
        optimizer.pager.check()
        optimizer.close()
    kv, paging, tiers, gc = stats["kv"], stats["paging"], stats["tiers"], stats["gc"]
    return {
        "found": kv["resident_bytes"] / kv["wanted_bytes"],
        "reused_share": kv["reused_tokens"] / kv["prompt_tokens"],
        "swap_writes": paging["swap_writes"],
        "swap_reads": paging["swap_reads"],
        "ahead_bytes": 0 if optimizer.swapping is None else optimizer.swapping.swapped_ahead_bytes,
        "migrations": tiers["migrations"],
        "migrations_used": tiers["migrations_used"],
        "collected": None if gc is None else gc["swapped"] + gc["freed"],
        "wall_s": wall_s,
    }, recorder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=240)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = {}
    trace = None
    print(
        "| setting | found in memory | reused | swapped out / in | prefetched | promoted (used) | collected | time, s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.only:
        row, recorder = run(VARIANTS[name], arguments.turns)
        trace = trace or recorder.trace()
        rows[name] = row
        print(
            f"| {name} | {row['found']:.3f} | {row['reused_share']:.3f} | {row['swap_writes']} / {row['swap_reads']} "
            f"| {row['ahead_bytes'] / 1e6:.1f} MB | {row['migrations']} ({row['migrations_used']}) "
            f"| {row['collected']} | {row['wall_s']:.0f} |",
            flush=True,
        )
    if trace is not None:
        print("\n| memory, share of all bytes | lru | clock | predictive | Belady |\n|---|---|---|---|---|")
        for share in (0.1, 0.25, 0.5):
            capacity = int(share * trace.total_bytes)
            found = [
                replay(trace, create_swapping_algorithm(name), capacity).byte_hit_rate
                for name in ("lru", "clock", "predictive")
            ]
            cells = [*found, replay_belady(trace, capacity).byte_hit_rate]
            print(f"| {share:.0%} | " + " | ".join(f"{each:.3f}" for each in cells) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
