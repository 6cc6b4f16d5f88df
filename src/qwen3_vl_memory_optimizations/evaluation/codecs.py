"""Every codec on one checkpoint, each beside the model as transformers loads it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.generation.streamers import BaseStreamer

from ..compression import codec_names, create_codec
from ..config import MemoryConfig
from ..factory import create_optimized_model
from ..model.checkpoint.formats import needs_packing, open_checkpoint
from ..model.checkpoint.packing import Progress
from ..model.run.needs import PROCESS_BYTES, WORKSPACE_BYTES, run_needs
from ..paging import ManagedTensor
from ..profiles import configure
from .comparison import AccuracyImpact, evaluate_accuracy_impact

BASELINE_PLAIN = "plain transformers"
BASELINE_NONE = "codec none, within the same budget"

_HALF_BYTES = 2
_ASKED_TOKENS, _ANSWER_TOKENS, _TIMED_TOKENS = 32, 20, 16

Watch = Callable[[Any, str], contextlib.AbstractContextManager[Any]]
"""Called with an optimised model and the name of its codec."""


class Batches(Sized, Protocol):
    """Batches for `evaluate_accuracy_impact` that can be counted, and read several times."""

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True, slots=True)
class Task:
    """What a model is asked: a name for people, and the batches."""

    name: str
    batches: Batches


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecResult:
    """What one codec costs and saves.

    Attributes:
        codec: its name, or `auto`.
        baseline: what it was compared with: `plain transformers`, or where a budget was set, codec `none` within it
            (bit-identical, but in less memory).
        weight_bytes: all weights as they are stored, scales and small tensors included.
        half_bytes: the same weights at 16 bits each.
        stored_as: codec -> how many weights it encodes; a codec leaves some as they are.
        impacts: name of a task -> figures.
        seconds: how long comparing took, both models together.
        tokens_per_s: of an answer, measured after the comparison.
        whole_bytes: the `ram_budget` in which an answer about 1,024 tokens reads nothing from the SSD.
    """

    codec: str
    baseline: str
    weight_bytes: int
    half_bytes: int
    stored_as: dict[str, int]
    impacts: dict[str, AccuracyImpact]
    seconds: float
    tokens_per_s: float
    whole_bytes: int

    @property
    def bits(self) -> float:
        """Stored bits per weight, all in."""
        return 8 * _HALF_BYTES * self.share_of_half

    @property
    def share_of_half(self) -> float:
        """Stored bytes over those of 16 bits a weight."""
        return self.weight_bytes / self.half_bytes


def evaluate_codecs(
    directory: Path,
    codecs: Iterable[str],
    tasks: Iterable[Task],
    *,
    config: MemoryConfig | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Iterator[CodecResult]:
    """Yield a result for each codec, in turn; one optimised model is loaded at a time, beside the baseline.

    Args:
        directory: a checkpoint.
        codecs: names of codecs, or `auto`.
        tasks: what to ask.
        config: settings of the optimised models; `codec` is replaced. With a `tensor_budget` the baseline too is read
            within it, so that a model that does not fit can be evaluated.
        progress: called with a description, what is done and what there is: bytes while loading, batches after.
        watch: entered with each optimised model and its codec for as long as it is asked.

    Raises:
        ConfigurationError: no such codec; raised before anything is loaded.
        InputError: a task without batches.
    """
    config, report = configure(config), progress or (lambda description, done, total: None)
    configs = [dataclasses.replace(config, codec=codec) for codec in _checked(codecs)]
    tasks = list(tasks)
    baseline: Any = None
    try:
        for each in configs:
            model = create_optimized_model(directory, each, progress=progress)
            try:
                if baseline is None:
                    baseline = _baseline(directory, model, config)
                start = time.perf_counter()
                with contextlib.nullcontext() if watch is None else watch(model, each.codec):
                    impacts = {
                        task.name: evaluate_accuracy_impact(
                            model, baseline, _reported(task.batches, f"{each.codec}: {task.name}", report)
                        )
                        for task in tasks
                    }
                    seconds = time.perf_counter() - start
                    tokens_per_s = _tokens_per_s(model)
                stored_bytes = weight_bytes(model)
                yield CodecResult(
                    codec=each.codec,
                    baseline=BASELINE_PLAIN if _is_plain(directory, config) else BASELINE_NONE,
                    weight_bytes=stored_bytes,
                    half_bytes=sum(parameter.numel() for parameter in model.parameters()) * _HALF_BYTES,
                    stored_as=_stored_as(model),
                    impacts=impacts,
                    seconds=seconds,
                    tokens_per_s=tokens_per_s,
                    whole_bytes=_whole_bytes(model, stored_bytes),
                )
            finally:
                model.memory_optimizer.close()
                del model
    finally:
        if hasattr(baseline, "memory_optimizer"):
            baseline.memory_optimizer.close()


def weight_bytes(model: Any) -> int:
    """Return the bytes of a model's weights as they are stored: encoded forms with their scales, and small tensors."""
    return sum(
        sum(segment.nbytes for segment in parameter.entry.encoded(0, parameter.entry.rows).values())
        if isinstance(parameter, ManagedTensor)
        else parameter.nbytes
        for parameter in model.parameters()
    )


class _Clock(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _tokens_per_s(model: Any) -> float:
    """Return the rate of a short answer, without its first tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(_ASKED_TOKENS)[None] * 7 % vocabulary
    clock = _Clock()
    options = {"max_new_tokens": _ANSWER_TOKENS, "min_new_tokens": _ANSWER_TOKENS, "do_sample": False}
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
    times = clock.times[-_TIMED_TOKENS - 1 :]
    return (len(times) - 1) / (times[-1] - times[0])


def _whole_bytes(model: Any, stored_bytes: int) -> int:
    needs = run_needs(model.config, prompt_tokens=1024, new_tokens=256, itemsize=model.dtype.itemsize)
    return PROCESS_BYTES + WORKSPACE_BYTES + needs.memory_bytes + needs.blocks_bytes + stored_bytes


def _checked(codecs: Iterable[str]) -> list[str]:
    names = list(dict.fromkeys(codecs)) or list(codec_names())
    for name in names:
        if name != "auto":
            create_codec(name)
    return names


def _baseline(directory: Path, model: Any, config: MemoryConfig) -> Any:
    """Return the model without optimisations, computing in the same dtype."""
    if not _is_plain(directory, config):
        return create_optimized_model(directory, dataclasses.replace(config, codec="none"), dtype=model.dtype)
    return type(model).from_pretrained(directory, dtype=model.dtype, local_files_only=True).eval()


def _is_plain(directory: Path, config: MemoryConfig) -> bool:
    """Whether transformers loads the baseline: it is not read within a budget, nor decoded by this library."""
    return config.tensor_budget is None and not needs_packing(open_checkpoint(directory))


def _reported(batches: Batches, description: str, report: Progress) -> Iterator[Any]:
    for index, batch in enumerate(batches):
        report(description, index, len(batches))
        yield batch
    report(description, len(batches), len(batches))


def _stored_as(model: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for parameter in model.parameters():
        if isinstance(parameter, ManagedTensor) and torch.is_floating_point(parameter):
            counts[parameter.codec] = counts.get(parameter.codec, 0) + 1
    return dict(sorted(counts.items()))
