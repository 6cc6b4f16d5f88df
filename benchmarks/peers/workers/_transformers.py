"""A model with the interface of transformers: this project's, the plain one and the one offloaded by accelerate."""

from __future__ import annotations

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.budget.measure import make_inputs
from benchmarks.peers.workers._measure import SHORT_PROMPT, OnToken


class TransformersModel:
    """Drives `generate` as a user would."""

    def __init__(self, model) -> None:
        self.model = model.eval()
        # Random weights may choose the end of the turn at any time.
        self.model.generation_config.eos_token_id = None

    def generate(self, prompt: list[int], tokens: int, on_token: OnToken) -> None:
        ids = torch.tensor([prompt])
        self._generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tokens, on_token)

    def answer(self, side_px: int, seed: int, on_token: OnToken) -> None:
        self._generate(make_inputs(self.model.config, side_px, SHORT_PROMPT, self.model.dtype, seed), 1, on_token)

    def describe(self) -> dict:
        return {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }

    def _generate(self, inputs: dict, tokens: int, on_token: OnToken) -> None:
        try:
            with torch.no_grad():
                self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=_Streamer(on_token))
        except _EnoughError:
            return


class _EnoughError(Exception):
    pass


class _Streamer(BaseStreamer):
    def __init__(self, on_token: OnToken) -> None:
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen and not self._on_token():
            raise _EnoughError
        self._prompt_seen = True

    def end(self) -> None:
        return
