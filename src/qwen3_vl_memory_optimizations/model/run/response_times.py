"""Measure response times: of each `generate`, and of each forward outside one."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...paging import PagingStats
from .decode_steps import DecodeSteps
from .progress import ProgressTracker

_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Response:
    """One `generate`, or one forward outside `generate`.

    Attributes:
        generated: whether it was a `generate`.
        ended_s: end time on the clock of the `ResponseTimes`.
        wall_s: from call to end; `cpu_s`: CPU time of all threads of the process in between.
        first_token_s: from the call to the end of the first forward.
        new_tokens: summed over all sequences.
        decode_s: from the end of the first forward to the end of the last; `decode_steps`: tokens per sequence in it.
        decode_bytes: encoded bytes of managed tensors used in it.
    """

    generated: bool
    ended_s: float
    wall_s: float
    cpu_s: float
    first_token_s: float | None
    new_tokens: int
    decode_s: float
    decode_steps: int
    decode_bytes: int


@dataclass(slots=True)
class _Run:
    """A `generate` in progress in a thread."""

    start_s: float
    start_cpu_s: float
    first_s: float | None = None
    first_bytes: int = 0
    last_s: float = 0.0
    last_bytes: int = 0


class ResponseTimes:
    """The latest responses, and totals.

    Args:
        used_bytes: returns the bytes of managed tensors used so far.
        timer: a monotonic clock in seconds.
        cpu_timer: CPU-seconds of the process.
        paging: counters of the Pager, for `steps`.

    Attributes:
        responses, tokens, seconds: number of responses, new tokens and wall time since the start.
        progress: what is computed now.
        steps: what recent decode steps took.
    """

    def __init__(
        self,
        used_bytes: Callable[[], int],
        *,
        timer: Callable[[], float] = time.perf_counter,
        cpu_timer: Callable[[], float] = time.process_time,
        paging: PagingStats | None = None,
    ) -> None:
        self.timer = timer
        self.progress = ProgressTracker(timer)
        self.steps = DecodeSteps(paging or PagingStats())
        self.responses = 0
        self.tokens = 0
        self.seconds = 0.0
        self._used_bytes = used_bytes
        self._cpu_timer = cpu_timer
        self._lock = threading.Lock()
        self._local = threading.local()
        self._recent: deque[Response] = deque(maxlen=_REMEMBERED)
        self._running: dict[int, float] = {}  # thread -> start

    def recent(self) -> list[Response]:
        """Return the last 64 responses, newest last."""
        with self._lock:
            return list(self._recent)

    def running_s(self) -> float | None:
        """Return the elapsed time of the oldest response in progress, or `None` if there is none."""
        with self._lock:
            return self.timer() - min(self._running.values()) if self._running else None

    # --- recorded by `Generation` and the hooks -----------------------------------------------------------------------

    def begin(self, prompt_tokens: int | None = None, most_tokens: int | None = None) -> None:
        """Record that a `generate` begins in this thread. Precondition: it is not nested in another.

        Args:
            prompt_tokens: per sequence; `None`: unknown.
            most_tokens: the most new tokens per sequence; `None`: not limited.
        """
        self._local.run = _Run(self.timer(), self._cpu_timer())
        self.progress.call_begins(self._local.run.start_s, prompt_tokens, most_tokens)
        with self._lock:
            self._running[threading.get_ident()] = self._local.run.start_s

    def end(self, new_tokens: int = 0, length: int = 0) -> None:
        """Record that this thread's `generate` ended.

        Args:
            new_tokens: summed over all sequences; an interrupted call has those counted so far.
            length: new tokens of the longest sequence.
        """
        counted, batch = self.progress.call_ends()
        new_tokens, length = max(new_tokens, counted * batch), max(length, counted)
        run, self._local.run = getattr(self._local, "run", None), None
        if run is None:  # interrupted before it began
            return
        now_s = self.timer()
        decoded = run.first_s is not None and length > 1
        self._keep(
            Response(
                True,
                now_s,
                now_s - run.start_s,
                self._cpu_timer() - run.start_cpu_s,
                None if run.first_s is None else run.first_s - run.start_s,
                new_tokens,
                run.last_s - run.first_s if decoded else 0.0,
                length - 1 if decoded else 0,
                run.last_bytes - run.first_bytes if decoded else 0,
            )
        )

    def forward_begins(self) -> None:
        """Record that a forward begins in this thread."""
        if getattr(self._local, "run", None) is None:
            self._local.forward = (self.timer(), self._cpu_timer())
            with self._lock:
                self._running[threading.get_ident()] = self._local.forward[0]

    def forward_ended(self, *, failed: bool = False) -> None:
        """Record that a forward ended; a failed one is not a response."""
        run = getattr(self._local, "run", None)
        if failed:  # possibly in an earlier hook, before it began
            if run is None:
                self.progress.end()
                with self._lock:
                    self._running.pop(threading.get_ident(), None)
            return
        if run is None:
            start_s, start_cpu_s = self._local.forward
            now_s = self.timer()
            self.progress.forward_ended(now_s)
            self._keep(Response(False, now_s, now_s - start_s, self._cpu_timer() - start_cpu_s, None, 0, 0.0, 0, 0))
            return
        run.last_s, run.last_bytes = self.timer(), self._used_bytes()
        self.progress.forward_ended(run.last_s)
        if run.first_s is None:
            run.first_s, run.first_bytes = run.last_s, run.last_bytes
            self.steps.begin(run.last_s, self.progress.call_tokens())
        else:
            self.steps.end_step(run.last_s, self.progress.call_tokens())

    def _keep(self, response: Response) -> None:
        with self._lock:
            self._running.pop(threading.get_ident(), None)
            self._recent.append(response)
            self.responses += 1
            self.tokens += response.new_tokens
            self.seconds += response.wall_s


def attach_response_times(model: Any, times: ResponseTimes) -> None:
    """Record each forward of a model. Adds a few microseconds to each. `Generation` records each `generate`."""

    def before(module: Any, args: Any) -> None:
        times.forward_begins()

    def after(module: Any, args: Any, output: Any) -> None:
        times.forward_ended(failed=output is None)

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after, always_call=True)


def count_new_tokens(result: Any, prompt: Any) -> tuple[int, int]:
    """Return the new tokens of all sequences, and of the longest.

    Args:
        result: of `generate`.
        prompt: its ids, `[sequences, tokens]`; anything else: the result has no prompt.
    """
    sequences = getattr(result, "sequences", result)
    given = prompt.shape[-1] if isinstance(prompt, torch.Tensor) else 0
    length = max(0, int(sequences.shape[-1]) - given)
    return length * int(sequences.shape[0]), length


def prompt_and_most_tokens(model: Any, prompt: Any, arguments: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return the prompt's tokens and the most new ones per sequence of a `generate`; `None`: unknown, or no limit.

    Args:
        model: whose `generation_config` holds the defaults.
        prompt: its ids, `[sequences, tokens]`; anything else: unknown.
        arguments: of the call, by name.
    """
    given = int(prompt.shape[-1]) if isinstance(prompt, torch.Tensor) else None
    settings = (arguments.get("generation_config"), getattr(model, "generation_config", None))
    for name, before in (("max_new_tokens", 0), ("max_length", given or 0)):
        values = [arguments.get(name), *(getattr(each, name, None) for each in settings)]
        most = next((value for value in values if isinstance(value, int)), None)
        if most is not None:
            return given, max(0, most - before)
    return given, None
