"""Follow what a model is computing: the vision tower, the prompt or the answer, with the time left.

Without torch, so that the command line can show its import.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

LOADING, PACKING, PICTURES, PROMPT, ANSWER = "loading", "packing", "pictures", "prompt", "answer"

_WINDOW_S = 5.0
"""Span of the live token rate; a shorter one would jump with each stall."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What is computed now, and how far it is.

    Attributes:
        phase: `loading`, `packing`, `pictures` (vision tower), `prompt` or `answer`.
        done: finished units; in `answer`, new tokens per sequence.
        total: units in total; in `answer`, the most that the call allows; `None`: unknown.
        unit: `bytes`, `blocks` or `tokens`.
        elapsed_s: time since the phase began.
        left_s: estimated time to the end of the phase; in `answer`, to the most tokens; `None`: unknown.
        tokens_per_s: in `answer`, tokens per sequence over the last five seconds, or since the first token.
        first_token_s: in `answer`, from the call to the first token.
    """

    phase: str
    done: int
    total: int | None
    unit: str
    elapsed_s: float
    left_s: float | None = None
    tokens_per_s: float | None = None
    first_token_s: float | None = None


@dataclass(slots=True)
class _Phase:
    """The current phase. `done` is written by the computing thread and read by others."""

    name: str
    unit: str
    start_s: float
    total: int | None
    done: float
    first_done: float
    thread: int
    advanced_s: float
    answer: _Answer | None = None


@dataclass(slots=True)
class _Answer:
    """The tokens of one `generate`, per sequence.

    Attributes:
        recent: (time, tokens) after each forward of the last few seconds, at least the last two.
    """

    start_s: float
    prompt_tokens: int | None
    most_tokens: int | None
    batch: int = 1
    tokens: int = 0
    forwards: int = 0
    first_s: float | None = None
    recent: deque[tuple[float, int]] = field(default_factory=deque)

    def rate(self, now_s: float) -> float | None:
        """Return tokens per second, or `None` before the second token. A token that is late lowers it."""
        if len(self.recent) < 2:
            return None
        (start_s, before), (last_s, tokens) = self.recent[0], self.recent[-1]
        if last_s <= start_s:
            return None
        return min((tokens - before) / (last_s - start_s), (tokens - before + 1) / max(now_s - start_s, 1e-9))


class ProgressTracker:
    """The phase of the computation in progress. An update takes a few microseconds; threads that wait make none.

    Args:
        timer: a monotonic clock in seconds.
    """

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self._timer = timer
        self._local = threading.local()
        self._phase: _Phase | None = None
        self._piece: tuple[int, float] | None = None  # cached tokens, and tokens per decoder layer

    def now(self) -> Progress | None:
        """Return what is computed now, or `None` if nothing is."""
        phase = self._phase
        if phase is None:
            return None
        now_s, answer = self._timer(), phase.answer
        elapsed_s, done = max(0.0, now_s - phase.start_s), phase.done
        if answer is not None and answer.first_s is not None:
            rate, done = answer.rate(now_s), answer.tokens
            first_token_s: float | None = answer.first_s - answer.start_s
            speed = rate
            waited_s = 0.0
        else:
            rate = first_token_s = None
            gained, in_s = done - phase.first_done, phase.advanced_s - phase.start_s
            speed = gained / in_s if gained > 0 and in_s > 0 else None
            waited_s = max(0.0, now_s - phase.advanced_s)  # on the unit in progress
        left = None if phase.total is None else phase.total - done
        left_s = None if left is None or not speed else max(0.0, left / speed - waited_s)
        return Progress(phase.name, int(done), phase.total, phase.unit, elapsed_s, left_s, rate, first_token_s)

    def new_tokens(self) -> int:
        """Return the tokens of the answer in progress, summed over its sequences."""
        phase = self._phase
        return 0 if phase is None or phase.answer is None else phase.answer.tokens * phase.answer.batch

    def call_tokens(self) -> int:
        """Return the new tokens per sequence of this thread's `generate` so far."""
        answer = getattr(self._local, "answer", None)
        return 0 if answer is None else int(answer.tokens)

    # --- recorded by the computing thread -----------------------------------------------------------------------------

    def begin(self, phase: str, unit: str, total: int | None, done: int = 0) -> None:
        """Begin a phase, `done` units of which need no work."""
        self._piece = None
        now_s = self._timer()
        self._phase = _Phase(phase, unit, now_s, total, done, done, threading.get_ident(), now_s)

    def advance(self, done: float) -> None:
        """Set the finished units of the current phase."""
        phase = self._phase
        if phase is not None:
            phase.done, phase.advanced_s = done, self._timer()

    def end(self) -> None:
        """Record that this thread computes nothing any more."""
        phase = self._phase
        if phase is not None and phase.thread == threading.get_ident():  # otherwise the next thread has begun
            self._phase = self._piece = None

    def call_begins(self, now_s: float, prompt_tokens: int | None, most_tokens: int | None) -> None:
        """Record that a `generate` begins in this thread.

        Args:
            now_s: time on the timer.
            prompt_tokens: per sequence; `None`: unknown until the first forward.
            most_tokens: most new tokens per sequence, if limited.
        """
        self._local.answer = _Answer(now_s, prompt_tokens, most_tokens)

    def call_ends(self) -> tuple[int, int]:
        """Record that this thread's `generate` ended; return its new tokens per sequence, and its sequences."""
        answer, self._local.answer = getattr(self._local, "answer", None), None
        if answer is None:
            return 0, 0
        self.end()
        return answer.tokens, answer.batch

    def forward_begins(self, batch: int, length: int, past: int) -> None:
        """Record that a forward begins.

        Args:
            batch: sequences.
            length: new tokens per sequence.
            past: cached tokens per sequence.
        """
        answer = getattr(self._local, "answer", None)
        self._local.prompt_tokens = past + length
        if answer is None:
            return
        if answer.prompt_tokens is None:
            answer.prompt_tokens = past + length
        answer.batch, answer.forwards = batch, answer.forwards + 1
        self._local.prompt_tokens = answer.prompt_tokens
        if answer.first_s is not None:  # a draft may have added several tokens since the last forward
            answer.tokens = max(answer.tokens, (past + 1 if past else length) - answer.prompt_tokens)
            answer.recent[-1] = (answer.recent[-1][0], answer.tokens)
        self._local.ends_prompt = past + length >= answer.prompt_tokens

    def block_ends(self, block: int) -> None:
        """Record that a block of the vision tower ended."""
        phase = self._phase
        if phase is not None and phase.name == PICTURES:
            self.advance(block + 1)

    def piece_begins(self, length: int, past: int, n_layers: int) -> None:
        """Record that the decoder begins with tokens of a prompt, or, after the first token, of the answer.

        Args:
            length: new tokens per sequence.
            past: cached tokens per sequence.
            n_layers: decoder layers.
        """
        answer = getattr(self._local, "answer", None)
        if answer is not None and answer.first_s is not None:
            return
        if self._phase is None or self._phase.name != PROMPT:
            self.begin(PROMPT, "tokens", getattr(self._local, "prompt_tokens", past + length), past)
        self.advance(past)
        self._piece = (past, length / n_layers)

    def layer_ends(self, layer: int) -> None:
        """Record that a decoder layer ended."""
        piece = self._piece
        if piece is not None:
            self.advance(piece[0] + piece[1] * (layer + 1))

    def forward_ended(self, now_s: float) -> None:
        """Record that a forward ended: a step of this thread's `generate`, or a computation of its own."""
        answer = getattr(self._local, "answer", None)
        if answer is None:
            self.end()
            return
        if not answer.forwards or (answer.first_s is None and not self._local.ends_prompt):
            return
        answer.tokens += 1
        if answer.first_s is None:
            self._piece = None
            answer.first_s = now_s
            self._phase = _Phase(
                ANSWER, "tokens", now_s, answer.most_tokens, 1, 1, threading.get_ident(), now_s, answer
            )
        recent = answer.recent
        recent.append((now_s, answer.tokens))
        while len(recent) > 2 and recent[1][0] <= now_s - _WINDOW_S:
            recent.popleft()
