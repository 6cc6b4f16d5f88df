"""What all workers share: the command line, the clock and the one line of JSON. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from benchmarks.peers.layout import Layout

SHORT_PROMPT = 32
PIXELS_PER_TOKEN = 32
"""Side of the square of pixels that becomes one token."""
SKIPPED_TOKENS = 4
"""Tokens after the first that are not counted: kernels are chosen and schedules learnt in them."""

OnToken = Callable[[], bool]
"""Called as each new token is there; false: no more are wanted."""


class Model(Protocol):
    """A loaded model as the measurement sees it."""

    def generate(self, prompt: list[int], tokens: int, on_token: OnToken) -> None:
        """Decode greedily `tokens` tokens after a prompt that was not seen before."""

    def describe(self) -> dict:
        """Return what tells which code ran: dtype, instruction set."""


class ModelWithVision(Model, Protocol):
    """A model that also takes images."""

    def answer(self, side_px: int, seed: int, on_token: OnToken) -> None:
        """Give the first token after a random square image and a short text."""


class Request(argparse.Namespace):
    """What the worker is asked for.

    Attributes:
        work: `decode-TOKENS`, `prefill-TOKENS` or `image-SIDE`.
        limit: bytes the process may use; 0: no limit.
        soft_limit_s: seconds after the start of the process from which no optional part begins.
    """

    layout: Layout
    shape: str
    variant: str
    work: str
    limit: int
    threads: int
    soft_limit_s: float

    @property
    def kind(self) -> str:
        """The kind of work."""
        return self.work.split("-")[0]

    @property
    def size(self) -> int:
        """Tokens, or pixels of a side."""
        return int(self.work.split("-")[1])

    @property
    def context(self) -> int:
        """Tokens that prompt and answer have together, with some room."""
        tokens = {
            "prefill": self.size,
            "decode": SHORT_PROMPT + self.size + SKIPPED_TOKENS,
            "image": (self.size // PIXELS_PER_TOKEN) ** 2 + SHORT_PROMPT,
        }
        return tokens[self.kind] + 8


def parse() -> Request:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bench-dir", type=Path, required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--soft-limit-s", type=float, default=480)
    request = parser.parse_args(namespace=Request())
    request.layout = Layout(request.bench_dir.resolve())
    return request


def run(load: Callable[[Request], Model]) -> None:
    """Load a model, measure what is asked for, print it; an exception is printed as an error and exits with 1."""
    request = parse()
    start_s = time.perf_counter() - _age_s()
    try:
        model = load(request)
        figures = {"loaded_after_s": round(time.perf_counter() - start_s, 3)}
        figures |= measure(model, request, start_s)
        figures |= {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        figures |= model.describe()
    except Exception as error:  # whatever a peer raises is its result
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]}), flush=True)
        _leave(1)
    print(json.dumps(figures), flush=True)
    _leave(0)


def measure(model: Model, request: Request, start_s: float) -> dict:
    """Return the figures of one work item; `value` is the one of the tables."""
    if request.kind == "decode":
        return _measure_decode(model, request, start_s)
    times: list[float] = []
    reads: list[int] = []
    # The second pass is the steady one; it has other tokens and another image, so nothing can be reused.
    for seed in (1, 2):
        if times and time.perf_counter() - start_s + times[-1] > request.soft_limit_s:
            break
        prompt = random_ids(request.size, seed)
        read, before = _read_bytes(), time.perf_counter()
        clock = Clock()
        if request.kind == "image":
            model.answer(request.size, seed, clock)
        else:
            model.generate(prompt, 1, clock)
        times.append(clock.times[0] - before)
        reads.append(_read_bytes() - read)
        if len(times) == 1:
            since_start = clock.times[0] - start_s
    is_prefill = request.kind == "prefill"
    return {
        "value": round(request.size / times[-1], 3) if is_prefill else round(times[-1], 3),
        "unit": "token/s" if is_prefill else "s",
        "start_to_first_token_s": round(since_start, 3),
        "first_token_s": [round(seconds, 3) for seconds in times],
        "read_bytes": reads,
    }


def _measure_decode(model: Model, request: Request, start_s: float) -> dict:
    clock = Clock(start_s + request.soft_limit_s)
    before = time.perf_counter()
    model.generate(random_ids(SHORT_PROMPT, 1), 1 + SKIPPED_TOKENS + request.size, clock)
    gaps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    if not gaps:
        raise TimeoutError("no token after the first within the time limit")
    # A decode cut short by the clock counts its last tokens.
    skipped = min(SKIPPED_TOKENS, len(gaps) - 1)
    counted = gaps[skipped:]
    return {
        "value": round(len(counted) / sum(counted), 4),
        "unit": "token/s",
        "start_to_first_token_s": round(clock.times[0] - start_s, 3),
        "first_token_s": [round(clock.times[0] - before, 3)],
        "counted_tokens": len(counted),
        "token_s": [round(gap, 4) for gap in gaps],
        "read_bytes_per_token": (clock.reads[-1] - clock.reads[skipped]) // len(counted),
        "cpu_s_per_token": round((clock.cpu_s[-1] - clock.cpu_s[skipped]) / len(counted), 4),
    }


class Clock:
    """Notes when each token came, and asks for no more once `deadline_s` is over."""

    def __init__(self, deadline_s: float = float("inf")) -> None:
        self.times: list[float] = []
        self.reads: list[int] = []
        self.cpu_s: list[float] = []
        self._deadline_s = deadline_s

    def __call__(self) -> bool:
        self.times.append(time.perf_counter())
        self.reads.append(_read_bytes())
        self.cpu_s.append(time.process_time())
        return self.times[-1] < self._deadline_s


def random_ids(count: int, seed: int) -> list[int]:
    """Return ids of ordinary tokens, the same for every peer."""
    source = random.Random(seed)
    return [source.randrange(1000, 100_000) for _ in range(count)]


def _age_s() -> float:
    """Return for how long this process has existed."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    return up_s - ticks / os.sysconf("SC_CLK_TCK")


def _read_bytes() -> int:
    """Return what this process has had read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def _leave(code: int) -> None:
    """End without tearing the model down: what comes after the result is not measured, and may take long."""
    sys.stdout.flush()
    os._exit(code)
