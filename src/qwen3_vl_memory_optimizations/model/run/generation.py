"""Run each `generate` of a model in steps: its turn, session, budget, draft, and reuse of known prompts."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from ...interrupts import deferrable, shield
from ...paging import Pager
from ..compat import CACHE_NAMES, MAKE_CACHE_METHOD, PREFILL_METHOD, attention_name, use_attention
from ..kv.attention import ATTENTION, register_attention
from ..kv.cache import ManagedKVCache
from ..reuse.prefix import PrefixReuse, Run
from .assisted import ChangeArguments
from .pieces import PieceRunner
from .response_times import ResponseTimes, count_new_tokens, prompt_and_most_tokens
from .run_budget import RunBudget
from .turns import Turns

logger = logging.getLogger(__name__)

_LEAST_MEASURED_TOKENS = 64
"""Below this many prompt tokens the per-token time is too high to predict what a hit saves."""


def attach_forward(
    model: Any, optimizer: Any, turn: Turns, make_cache: Callable[[], ManagedKVCache] | None, *, lowers: bool = True
) -> tuple[PieceRunner, RunBudget]:
    """Run each forward of a model within the budget, and a long prompt in pieces.

    Args:
        model: a transformers model.
        optimizer: owns the budget.
        turn: held during each forward.
        make_cache: returns an empty cache; `None`: the model manages keys and values itself, and prompts run whole.
        lowers: a pass that needs less memory than the one before returns the difference.
    """
    budget = RunBudget(model, optimizer, make_cache, lowers=lowers)
    runner = PieceRunner(model, make_cache, budget.choose, turn)
    runner.attach()
    budget.attach()
    return runner, budget


def cache_maker(model: Any, codec: str, pager: Pager | None, *, reuses: bool) -> Callable[[], ManagedKVCache] | None:
    """Make a model attend over a `ManagedKVCache`, and return the cache's factory.

    Args:
        model: must use `sdpa` with the same full attention in all layers; any other model is left unchanged.
        codec: encodes the blocks.
        pager: counts and moves the blocks.
        reuses: build blocks even where they save no memory, because other sequences may share them.

    Returns:
        `None` for an unsupported model.
    """
    config = model.config.get_text_config(decoder=True)
    if not hasattr(model, MAKE_CACHE_METHOD) or not _has_full_attention(config):
        return None
    register_attention()
    use_attention(config, ATTENTION)
    return lambda: ManagedKVCache(config, codec=codec, pager=pager, keeps_all=False if reuses else None)


def _has_full_attention(config: Any) -> bool:
    """Return whether every layer attends to all previous tokens, with the kernel that ours replaces."""
    types = getattr(config, "layer_types", None) or []
    windows = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return (
        attention_name(config) == "sdpa"
        and all(kind == "full_attention" for kind in types)
        and not (windows and not types)
        and getattr(config, "num_kv_shared_layers", None) in (None, 0)
        and not getattr(config, "is_encoder_decoder", False)
    )


class _Call:
    """A call of `generate`; its arguments stay as given unless a step changes them.

    Attributes:
        arguments: by name; those of `**kwargs` are among them.
    """

    def __init__(self, plain: Any, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._plain, self._args, self._kwargs = plain, args, kwargs
        bound = signature.bind_partial(*args, **kwargs).arguments
        self.arguments: dict[str, Any] = {**bound, **bound.get("kwargs", {})}
        self.arguments.pop("kwargs", None)

    @property
    def prompt(self) -> Any:
        """The ids of the prompt, or `None`."""
        first = self._args[0] if self._args else None
        return self._kwargs.get("input_ids", self._kwargs.get("inputs", first))

    def change(self, arguments: dict[str, Any]) -> None:
        """Let the call run with other arguments."""
        if arguments is not self.arguments:
            self.arguments, self._args, self._kwargs = arguments, (), arguments

    def run(self) -> Any:
        """Run it as transformers does."""
        return self._plain(*self._args, **self._kwargs)


class Generation:
    """The pipeline around `generate`, and the only replacement of it.

    A call is measured, waits for its turn, opens a session, is admitted, gets its draft, has its prompt looked up,
    runs, and leaves its keys and values behind. A call nested in another runs as written.

    Args:
        model: a transformers model.
        turn: held for the whole call: threads take turns.
        session: returns a context for one call.
        times: measures each call, the wait for its turn included; `None`: calls are not measured.
        change: returns the arguments to run with, by name, given those of the call (`assisted`); `None`: they stay.
        budget: rejects a call that cannot finish within it; `None`: no call is rejected.
        pieces: the model's forward; `None`: it runs whole.
        make_cache: returns an empty KV cache; `None`: `generate` uses the cache of transformers.
        reuse: looks prompts up and keeps their keys and values; `None`: nothing is kept.
    """

    def __init__(
        self,
        model: Any,
        *,
        turn: Turns,
        session: Callable[[], contextlib.AbstractContextManager[Any]],
        times: ResponseTimes | None,
        change: ChangeArguments | None,
        budget: RunBudget | None,
        pieces: PieceRunner | None,
        make_cache: Callable[[], ManagedKVCache] | None,
        reuse: PrefixReuse | None,
    ) -> None:
        self._model, self._turn, self._session, self._budget = model, turn, session, budget
        self._times, self._change = times, change
        self._pieces, self._make_cache, self._reuse = pieces, make_cache, reuse
        self._local = threading.local()
        self._seconds_per_token = 0.0

    def attach(self) -> None:
        """Replace `generate` and its cache construction; a model without `generate` is left unchanged."""
        if not hasattr(self._model, "generate"):
            return
        self._model.generate = self._around(self._model.generate)
        if self._make_cache is not None:
            plain = getattr(self._model, MAKE_CACHE_METHOD)
            setattr(self._model, MAKE_CACHE_METHOD, self._with_our_cache(plain))
        if hasattr(self._model, PREFILL_METHOD):
            setattr(self._model, PREFILL_METHOD, self._timed(getattr(self._model, PREFILL_METHOD)))

    def is_running(self) -> bool:
        """Return whether the calling thread is inside a `generate` of the model."""
        return getattr(self._local, "active", False)

    def _around(self, plain: Any) -> Any:
        signature = inspect.signature(plain)

        @functools.wraps(plain)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if self.is_running():
                return plain(*args, **kwargs)
            with deferrable():
                return self._measured(_Call(plain, signature, args, kwargs))

        return generate

    def _measured(self, call: _Call) -> Any:
        if self._times is None:
            return self._in_turn(call)
        n_tokens = length = 0
        try:
            self._times.begin(*prompt_and_most_tokens(self._model, call.prompt, call.arguments))
            result = self._in_turn(call)
            n_tokens, length = count_new_tokens(result, call.prompt)
            return result
        finally:
            with shield:
                self._times.end(n_tokens, length)

    def _in_turn(self, call: _Call) -> Any:
        depth, session, has_session = self._turn.depth, self._session(), False
        try:
            self._turn.__enter__()  # released below, after everything that belongs to the call has ended
            with shield:
                session.__enter__()
                has_session = True
            self._local.active, self._local.run = True, None
            return self._run(call)
        except KeyboardInterrupt as error:
            with shield:  # free the interrupted call's caches now, not when the caller drops the error
                _forget_frames(error)
            raise
        finally:
            with shield:
                if has_session:
                    session.__exit__(None, None, None)
                if self._turn.depth > depth:
                    self._ended()
                    self._turn.give_back(depth)

    def _run(self, call: _Call) -> Any:
        with shield:
            if self._budget is not None:
                self._budget.admit(call.arguments)  # before the call takes over a resting tail
            if self._change is not None:
                call.change(self._change(call.arguments))
            run = self._local.run = None if self._reuse is None else self._reuse.begin(call.arguments)
            if run is not None and run.past and self._reuse is not None:
                call.change(self._reuse.behind(run, call.arguments))
                if self._pieces is not None:
                    self._pieces.skipped = run.skipped
        result = call.run()
        if run is not None:
            with shield:
                self._keep(run, result)
        return result

    def _keep(self, run: Run, result: Any) -> None:
        """Store the finished sequence. A failure here never loses the answer."""
        assert self._reuse is not None
        try:
            self._reuse.keep(run, result, self._seconds_per_token)
        except Exception as error:
            logger.warning("keys and values were not kept: %s: %s", type(error).__name__, str(error))

    def _ended(self) -> None:
        self._local.active, self._local.run = False, None
        if self._budget is not None:
            self._budget.ended()
        if self._pieces is not None:
            self._pieces.skipped = {}

    def _with_our_cache(self, plain: Any) -> Any:
        from transformers import DynamicCache

        make_cache = self._make_cache
        assert make_cache is not None

        @functools.wraps(plain)
        def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            given = any(model_kwargs.get(name) is not None for name in CACHE_NAMES)
            result = plain(generation_config, model_kwargs, *args, **kwargs)
            if not given and generation_config.cache_implementation is None:
                run = getattr(self._local, "run", None)
                for name in CACHE_NAMES:
                    if type(model_kwargs.get(name)) is DynamicCache:
                        fresh = run is None or run.handed_out
                        model_kwargs[name] = make_cache() if fresh or run is None else run.cache
                if run is not None:
                    run.handed_out = True
            return result

        return prepare

    def _timed(self, plain: Any) -> Any:
        """Measure the prefill time per prompt token, which a hit saves."""

        @functools.wraps(plain)
        def prefill(*args: Any, **kwargs: Any) -> Any:
            run = getattr(self._local, "run", None)
            start_s = time.perf_counter()
            result = plain(*args, **kwargs)
            n_tokens = 0 if run is None else len(run.ids) - run.past
            if n_tokens >= _LEAST_MEASURED_TOKENS:
                self._seconds_per_token = (time.perf_counter() - start_s) / n_tokens
            return result

        return prefill


def _forget_frames(error: BaseException | None) -> None:
    """Release what the frames of an error, and of the errors in its context chain, hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
