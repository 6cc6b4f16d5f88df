"""llama.cpp through llama-cpp-python, weights mapped from the file (its default)."""

from __future__ import annotations

import llama_cpp

from benchmarks.peers.workers._measure import OnToken, Request, run

_UNIT = 256


class LlamaModel:
    """Drives `Llama.generate` with token ids, greedily."""

    def __init__(self, request: Request) -> None:
        self._llama = llama_cpp.Llama(
            str(request.layout.gguf(request.shape, request.variant)),
            n_ctx=-(-request.context // _UNIT) * _UNIT,
            n_threads=request.threads,
            n_threads_batch=request.threads,
            n_gpu_layers=0,
            verbose=False,
        )

    def generate(self, prompt: list[int], tokens: int, on_token: OnToken) -> None:
        self._llama.reset()
        for count, _ in enumerate(self._llama.generate(prompt, temp=0.0, repeat_penalty=1.0), 1):
            if not on_token() or count == tokens:
                return

    def describe(self) -> dict:
        system = llama_cpp.llama_print_system_info().decode()
        return {
            "instructions": " ".join(part.split("=")[0].strip() for part in system.split("|") if "= 1" in part),
            "threads": self._llama.n_threads,
        }


if __name__ == "__main__":
    run(LlamaModel)
