"""llama.cpp through llama-cpp-python, weights mapped from the file (its default); images through its libmtmd."""

from __future__ import annotations

import llama_cpp
import numpy as np

from benchmarks.peers.layout import FAST_TOWER, SMALL_TOWER
from benchmarks.peers.workers._measure import SHORT_PROMPT, OnToken, Request, random_ids, run

_UNIT = 256


class LlamaModel:
    """Drives `Llama.generate` with token ids, greedily, and libmtmd with pixels."""

    def __init__(self, request: Request) -> None:
        is_image = request.kind == "image"
        place = request.layout.vision_gguf if is_image else request.layout.gguf
        self._llama = llama_cpp.Llama(
            str(place(request.shape, request.variant)),
            n_ctx=-(-request.context // _UNIT) * _UNIT,
            n_threads=request.threads,
            n_threads_batch=request.threads,
            n_gpu_layers=0,
            flash_attn=is_image,
            verbose=False,
        )
        self._images = None
        if is_image:
            from benchmarks.peers.workers._mtmd import ImagePrompts

            # Unlike the decoder's, the tower's weights are copied into memory.
            self._tower_type = SMALL_TOWER if request.limit else FAST_TOWER
            tower = request.layout.mmproj(request.shape, self._tower_type)
            self._images = ImagePrompts(self._llama, tower, request.threads)

    def generate(self, prompt: list[int], tokens: int, on_token: OnToken) -> None:
        self._llama.reset()
        for count, _ in enumerate(self._llama.generate(prompt, temp=0.0, repeat_penalty=1.0), 1):
            if not on_token() or count == tokens:
                return

    def answer(self, side_px: int, seed: int, on_token: OnToken) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
        self._images.prefill(pixels, random_ids(SHORT_PROMPT, seed))[-1].argmax()
        on_token()

    def describe(self) -> dict:
        system = llama_cpp.llama_print_system_info().decode()
        figures = {
            "instructions": " ".join(part.split("=")[0].strip() for part in system.split("|") if "= 1" in part),
            "threads": self._llama.n_threads,
        }
        if self._images is not None:
            figures |= {"tower": self._tower_type, "image_tokens": self._images.image_tokens}
        return figures


if __name__ == "__main__":
    run(LlamaModel)
