"""Limit decode steps to as many threads as there are processors free of other load.

After each product all threads wait for the slowest, and a decode step has over a hundred products. If another process
keeps one of two cores busy, a decode step of the 2B shape takes 164 ms with two threads and 71 ms with one
(undisturbed, with two: 66 ms). Passes of many tokens keep all threads: their products are long, and half a processor
helps.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...process import read_lines

_EVERY_S = 0.5
_WORTH_A_THREAD = 0.6
"""A thread is dropped if less than 0.4 of a processor is left for it: next to two threads on two processors, another
process gets two thirds of one.
"""
_FEW_TOKENS = 16
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""Fields of `/proc/stat`: user, nice, system, irq, softirq and steal; excludes idle and iowait."""


def busy_seconds(processors: frozenset[int], *, root: str | os.PathLike[str] = "/") -> float | None:
    """Return the busy time of these processors since boot, in seconds; `None` if the system does not report it."""
    ticks, found = 0, 0
    for line in read_lines(Path(root) / "proc/stat"):
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in processors:
            ticks += sum(int(fields[index]) for index in _BUSY_FIELDS if index < len(fields))
            found += 1
    return ticks / os.sysconf("SC_CLK_TCK") if found else None


class FreeProcessors:
    """Estimates how many processors other processes have recently left to this one.

    Args:
        processors: that this process may use.
        busy_s: returns their busy seconds, for all processes; `None`: unknown.
        own_s: returns their busy seconds for this process.
        timer: a monotonic clock in seconds.
    """

    def __init__(
        self,
        processors: frozenset[int] | None = None,
        *,
        busy_s: Callable[[frozenset[int]], float | None] = busy_seconds,
        own_s: Callable[[], float] = time.process_time,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._processors = processors or frozenset(_allowed_processors())
        self._busy_s, self._own_s, self._timer = busy_s, own_s, timer
        self._lock = threading.Lock()
        self._before: tuple[float, float, float] | None = None
        self._free = self._free_before = float(len(self._processors))

    def free(self) -> float:
        """Return the larger mean of the last two spans of at least half a second; samples again when a span is over.

        Short bursts (the end of a read, another process) are not worth a change.
        """
        with self._lock:
            now_s = self._timer()
            if self._before is not None and now_s - self._before[0] < _EVERY_S:
                return max(self._free, self._free_before)
            busy_s, own_s = self._busy_s(self._processors), self._own_s()
            if busy_s is None:
                return self._free
            if self._before is not None:
                then_s, busy_then_s, own_then_s = self._before
                others = (busy_s - busy_then_s - (own_s - own_then_s)) / (now_s - then_s)
                self._free_before, self._free = self._free, len(self._processors) - max(0.0, others)
            self._before = (now_s, busy_s, own_s)
            return max(self._free, self._free_before)


def attach_decode_threads(model: Any, processors: FreeProcessors) -> None:
    """Run each pass of a few tokens with at most as many threads as there are free processors, and at least one."""
    local = threading.local()

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        after(module, args, None)  # torch skips the hook after Ctrl-C in a notebook, though not after an error
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if given is None or given.shape[0] * given.shape[1] > _FEW_TOKENS:
            return
        most = torch.get_num_threads()
        n_threads = max(1, min(most, int(processors.free() + _WORTH_A_THREAD)))
        if n_threads < most:
            local.most = most
            torch.set_num_threads(n_threads)

    def after(module: Any, args: Any, output: Any) -> None:
        most = getattr(local, "most", None)
        if most is not None:
            local.most = None
            torch.set_num_threads(most)

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, always_call=True)


def _allowed_processors() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
