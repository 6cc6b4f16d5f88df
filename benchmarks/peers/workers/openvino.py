"""OpenVINO through openvino-genai, from the same GGUF file, converted beforehand to its own format."""

from __future__ import annotations

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.workers._measure import OnToken, Request, run


class OpenVinoModel:
    """Drives `LLMPipeline.generate` with token ids, greedily."""

    def __init__(self, request: Request) -> None:
        self._threads = request.threads
        directory = request.layout.gguf(request.shape, request.variant).parent
        self._pipeline = openvino_genai.LLMPipeline(str(directory), "CPU", INFERENCE_NUM_THREADS=request.threads)

    def generate(self, prompt: list[int], tokens: int, on_token: OnToken) -> None:
        config = openvino_genai.GenerationConfig(max_new_tokens=tokens, do_sample=False, ignore_eos=True)
        ids = np.array([prompt], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        self._pipeline.generate(inputs, config, _Streamer(on_token))

    def describe(self) -> dict:
        kinds = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return {"instructions": " ".join(kinds), "threads": self._threads}


class _Streamer(openvino_genai.StreamerBase):
    def __init__(self, on_token: OnToken) -> None:
        super().__init__()
        self._on_token = on_token

    def write(self, tokens) -> openvino_genai.StreamingStatus:
        # Several at once come only where nothing is measured between them.
        wanted = [self._on_token() for _ in (tokens if isinstance(tokens, list) else [tokens])]
        return openvino_genai.StreamingStatus.RUNNING if all(wanted) else openvino_genai.StreamingStatus.STOP

    def end(self) -> None:
        return


if __name__ == "__main__":
    run(OpenVinoModel)
