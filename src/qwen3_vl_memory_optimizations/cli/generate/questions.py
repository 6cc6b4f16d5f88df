"""Ask the questions of a run one after the other, about the same pictures."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .show import Figures

if TYPE_CHECKING:
    from ...energy import EnergyMeter
    from ...model.inputs.processor import Processor
    from ...model.run.estimate import Estimate

STANDARD_INPUT = "-"


def read_questions(prompts: Sequence[str]) -> list[str]:
    """Return the questions; `-` is the whole of standard input, as one question.

    Raises:
        InputError: a question is empty.
    """
    from ...errors import InputError

    questions = []
    for prompt in prompts:
        question = prompt
        if prompt == STANDARD_INPUT:
            # Bytes that are not UTF-8 are reported by the processor.
            question = sys.stdin.read().strip() if sys.stdin is not None else ""
        if not question.strip():
            where = "standard input" if prompt == STANDARD_INPUT else "the prompt"
            again = "; it can be read only once" if prompts.count(STANDARD_INPUT) > 1 else ""
            raise InputError(f"{where} is empty{again}; pass a question: -p 'What is this?'")
        questions.append(question)
    return questions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer and what it took.

    Attributes:
        interrupted: Ctrl-C ended it.
        prompt_tokens: of the whole prompt.
        estimate: the time to the first token expected before.
        memory: figures of the optimizer afterwards.
    """

    question: str
    text: str
    interrupted: bool
    prompt_tokens: int
    estimate: Estimate
    figures: Figures
    memory: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the answer ready for JSON, without `memory`."""
        return {
            "question": self.question,
            "answer": self.text,
            "interrupted": self.interrupted,
            "prompt_tokens": self.prompt_tokens,
            "estimated_first_token_s": self.estimate.seconds,
            **dataclasses.asdict(self.figures),
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Generates answers.

    Attributes:
        model: from `create_optimized_model`.
        options: keyword arguments of `generate`.
        meter: measures energy; `None`: not asked for.
        seed: of the random numbers of each answer; `None`: random.
    """

    model: Any
    processor: Processor
    options: Mapping[str, Any]
    meter: EnergyMeter | None
    seed: int | None = None

    def inputs_of(self, question: str, before: Mapping[str, Any], system: str | None) -> dict[str, Any]:
        """Return the arguments of `generate` for a further question about the pictures of a prepared one."""
        if any(name.endswith("grid_thw") for name in before):
            return self.processor.ask_again(question, before)
        return self.processor.prepare(question, (), None, system)

    def ask(
        self, question: str, inputs: Mapping[str, Any], estimate: Estimate, on_text: Callable[[str], None]
    ) -> Answer:
        """Generate an answer, passing on its text as it comes. Ctrl-C ends it and keeps the text so far."""
        from ...energy import Cost

        if self.seed is not None:
            import torch

            torch.manual_seed(self.seed)
        optimizer = self.model.memory_optimizer
        pieces: list[str] = []

        def take(text: str) -> None:
            pieces.append(text)
            on_text(text)

        streamer, interrupted = self.processor.streamer(take), False
        read_before = optimizer.get_memory_efficiency_stats()["paging"]["bytes_read"]
        start_s, before = time.perf_counter(), Cost.now(self.meter)
        try:
            self.model.generate(**inputs, **self.options, streamer=streamer)
        except KeyboardInterrupt:
            interrupted = True
            streamer.end()  # flush the last, incomplete word
        after = Cost.now(self.meter)
        memory = optimizer.get_memory_efficiency_stats()
        costs = before.per_token(after, streamer.n_tokens)
        return Answer(
            question=question,
            text="".join(pieces).strip(),
            interrupted=interrupted,
            prompt_tokens=inputs["input_ids"].shape[1],
            estimate=estimate,
            figures=Figures.of(streamer, start_s, memory, read_before, costs),
            memory=memory,
        )
