"""Measure one way to get memory, in a process of its own (the C library's allocator has one state for each process).

Prints figures as JSON in the last line; started by `run.py`, with the variables that set the allocator up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from qwen3_vl_memory_optimizations import MemoryConfig, MemoryOptimizer  # noqa: E402
from qwen3_vl_memory_optimizations.paging import BlockSpace  # noqa: E402
from qwen3_vl_memory_optimizations.paging.records.entry import alias_memory  # noqa: E402
from qwen3_vl_memory_optimizations.pools import UNIT_BYTES, AdvancedMemoryPool, FramePool, round_up  # noqa: E402
from qwen3_vl_memory_optimizations.process import rss_bytes, tame_allocator  # noqa: E402

TRACE = Path(__file__).parent / "trace.npz"
SIZES = [4**step * 2**16 for step in range(7)]
MOST_HELD_BYTES = 512 * 2**20
_PAGE = 4096
_SAMPLE_EVENTS = 16
_COMPACTION_INTERVAL_S = MemoryConfig().pool_compaction_interval
_IN_USE_LEAST_BYTES = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("speed", *REPLAYS))
    parser.add_argument("--tamed", action="store_true", help="set the C library's allocator as this library does")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.tamed:
        tame_allocator()
    if arguments.what == "speed":
        print(json.dumps(list(speeds(arguments.repeats))))
    else:
        print(json.dumps(replay(REPLAYS[arguments.what]())))


# --- allocation and first touch ---


def speeds(repeats: int) -> Iterator[dict]:
    """Time each way to get a tensor at each size: one at a time, and a request's worth that is dropped together.

    In CPU time of one thread, that of the kernel included: others who use the machine do not disturb it.
    """
    torch.set_num_threads(1)
    with MemoryOptimizer(memory_config=MemoryConfig(enable_cache_hierarchy=False)) as optimizer:
        space = BlockSpace(optimizer.pager, "general")
        ways: dict[str, Callable[[int], object]] = {
            "empty": lambda n_bytes: touched(torch.empty(n_bytes, dtype=torch.uint8)),
            "zeros": lambda n_bytes: touched(torch.zeros(n_bytes, dtype=torch.uint8)),
            "ours, zeroed": lambda n_bytes: optimizer.allocate_tensor(n_bytes, torch.uint8),
            "ours": lambda n_bytes: blocks_touched(space.allocate(n_bytes)),
        }
        for n_bytes in SIZES:
            for pattern in ("one", "request"):
                count = 1 if pattern == "one" else max(2, min(64, MOST_HELD_BYTES // 2 // n_bytes))
                runs: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(repeats + 1):
                    for name, way in ways.items():
                        start_s = time.thread_time()
                        held = [way(n_bytes) for _ in range(count)]
                        runs[name].append((time.thread_time() - start_s) / count)
                        held.clear()
                for name, found in runs.items():
                    warm = found[1:]
                    yield {
                        "n_bytes": n_bytes,
                        "pattern": pattern,
                        "way": name,
                        "us": round(1e6 * statistics.median(warm), 2),
                        "us_all": [round(1e6 * each, 2) for each in warm],
                    }
                optimizer.pager.trim()


def touched(tensor: torch.Tensor) -> torch.Tensor:
    """Write a byte of each page."""
    tensor[::_PAGE] = 1
    return tensor


def blocks_touched(block) -> object:
    """Write a byte of each page of a block."""
    touched(block.data)
    return block


# --- fragmentation ---


class Plain:
    """`torch.empty`, whose memory is the C library's."""

    def __init__(self) -> None:
        self.tensors: dict[int, torch.Tensor] = {}

    def clock(self, now_s: float) -> None:
        """Nothing goes by time."""

    def end_request(self) -> None:
        """Nothing is given back."""

    def allocate(self, number: int, n_bytes: int) -> None:
        self.tensors[number] = touched(torch.empty(n_bytes, dtype=torch.uint8))

    def free(self, number: int) -> None:
        del self.tensors[number]


class Pools:
    """The pools and page frames of this library, as the Pager uses them; the clock is that of the trace.

    Args:
        compaction_interval_s: free frames that nobody took for so long go back.
        sessions: each request is a session, at whose end free frames go back.
    """

    def __init__(self, compaction_interval_s: float, sessions: bool = False) -> None:
        self.interval_s, self.sessions = compaction_interval_s, sessions
        self.now_s = self.compacted_s = 0.0
        self.pool = AdvancedMemoryPool(1 << 36).pools["general"]
        self.frames = FramePool(1 << 40, timer=lambda: self.now_s)
        self.blocks: dict[int, tuple[int, int]] = {}

    def clock(self, now_s: float) -> None:
        self.now_s = now_s
        if now_s - self.compacted_s >= self.interval_s:
            self.compacted_s = now_s
            self.frames.compact(self.interval_s)

    def end_request(self) -> None:
        if self.sessions:
            self.frames.trim()

    def allocate(self, number: int, n_bytes: int) -> None:
        address, size = self.pool.allocate(n_bytes), round_up(n_bytes)
        self.frames.forget(address, size, keep=range(address, address + size, UNIT_BYTES))
        self.frames.back(address, size, owner="general")
        touched(alias_memory(address, n_bytes))
        self.blocks[number] = address, size

    def free(self, number: int) -> None:
        address, size = self.blocks.pop(number)
        self.frames.release(address, size)
        self.pool.free(address)


REPLAYS: dict[str, Callable[[], Plain | Pools]] = {
    "plain": Plain,
    "pools": lambda: Pools(_COMPACTION_INTERVAL_S),
    "pools-1s": lambda: Pools(1.0),
    "pools-sessions": lambda: Pools(_COMPACTION_INTERVAL_S, sessions=True),
}


def replay(memory: Plain | Pools) -> dict:
    """Replay the trace; compare what the process holds with what the tensors use."""
    trace = np.load(TRACE)
    tensors, sizes = trace["tensor"].tolist(), trace["n_bytes"].tolist()
    times, requests = (trace["at_ms"] / 1000).tolist(), trace["request"].tolist()
    of_tensor: dict[int, int] = {}
    in_use = peak_use = peak_held = 0
    use_sum = held_sum = weight = sampled_s = last_s = 0.0
    after: list[tuple[int, int]] = []  # in use, held at the end of each request
    base_bytes = rss_bytes()
    torch.set_num_threads(1)
    start_s = time.thread_time()
    for index, (tensor, n_bytes, now_s) in enumerate(zip(tensors, sizes, times, strict=True)):
        memory.clock(now_s)
        if n_bytes:
            memory.allocate(tensor, n_bytes)
            of_tensor[tensor] = n_bytes
            in_use += n_bytes
        else:
            memory.free(tensor)
            in_use -= of_tensor.pop(tensor)
        ends = index + 1 == len(tensors) or requests[index + 1] != requests[index]
        if ends:
            memory.end_request()
        if index % _SAMPLE_EVENTS == 0 or ends:
            sample_s = time.thread_time()
            held = rss_bytes() - base_bytes
            use_sum += in_use * (now_s - last_s)
            held_sum += held * (now_s - last_s)
            weight += now_s - last_s
            last_s, peak_use, peak_held = now_s, max(peak_use, in_use), max(peak_held, held)
            if ends:
                after.append((in_use, held))
            sampled_s += time.thread_time() - sample_s
    seconds = time.thread_time() - start_s - sampled_s
    idle = [(use, held) for use, held in after if use >= _IN_USE_LEAST_BYTES]
    return {
        "requests": len(after),
        "events": len(tensors),
        "s": round(seconds, 3),
        "in_use_mean_bytes": round(use_sum / weight),
        "held_mean_bytes": round(held_sum / weight),
        "in_use_peak_bytes": peak_use,
        "held_peak_bytes": peak_held,
        "in_use_end_bytes": after[-1][0],
        "held_end_bytes": after[-1][1],
        "in_use_between_bytes": round(statistics.mean(use for use, _ in idle)),
        "held_between_bytes": round(statistics.mean(held for _, held in idle)),
    }


if __name__ == "__main__":
    main()
