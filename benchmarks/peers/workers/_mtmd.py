"""Images into llama.cpp: libmtmd encodes them, and the text decoder takes the result at its M-RoPE positions."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp
from llama_cpp._logger import llama_log_callback


class ImagePrompts:
    """Prompts of one image and some tokens, of a text decoder and its vision tower.

    Attributes:
        image_tokens: of the last image.
    """

    def __init__(self, llama: llama_cpp.Llama, tower: Path, threads: int) -> None:
        self._llama = llama
        mtmd_cpp.mtmd_helper_log_set(llama_log_callback, None)
        parameters = mtmd_cpp.mtmd_context_params_default()  # flash attention: where the backend has it
        parameters.use_gpu = False
        parameters.print_timings = False
        parameters.warmup = False  # it encodes an image of 1472x1472; the first of two passes warms up here
        parameters.n_threads = threads
        self._tower = mtmd_cpp.mtmd_init_from_file(str(tower).encode(), llama.model, parameters)
        if not self._tower:
            raise RuntimeError(f"{tower}: libmtmd does not load it")
        self.image_tokens = 0

    def prefill(self, pixels: np.ndarray, ids: list[int], *, all_logits: bool = False) -> np.ndarray:
        """Compute a prompt: an image between its two marks, then tokens.

        Args:
            pixels: (height, width, 3), `uint8`; sides that are multiples of 32 are not resized.
            ids: of the tokens.
            all_logits: of the image's end mark and all tokens, not of the last token alone.

        Returns:
            The logits, one row per position.
        """
        context = self._llama.ctx
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        position = llama_cpp.llama_pos(0)
        with self._chunks(pixels) as (start, image, end):
            for chunk in (start, image):
                _check(
                    mtmd_cpp.mtmd_helper_eval_chunk_single(
                        self._tower,
                        context,
                        chunk,
                        position,
                        0,
                        self._llama.n_batch,
                        False,
                        ctypes.byref(position),
                    ),
                    "mtmd_helper_eval_chunk_single",
                )
            self.image_tokens = mtmd_cpp.mtmd_input_chunk_get_n_tokens(image)
            count = ctypes.c_size_t()
            mark = mtmd_cpp.mtmd_input_chunk_get_tokens_text(end, ctypes.byref(count))[: count.value]
        return self._decode([*mark, *ids], position.value, all_logits)

    def embeddings(self, pixels: np.ndarray) -> np.ndarray:
        """Return what the text decoder gets for an image: (tokens, features), the main ones first, then DeepStack's."""
        with self._chunks(pixels) as (_, image, _):
            _check(mtmd_cpp.mtmd_encode_chunk(self._tower, image), "mtmd_encode_chunk")
            shape = mtmd_cpp.mtmd_input_chunk_get_n_tokens(image), llama_cpp.llama_model_n_embd_inp(self._llama.model)
            return np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(self._tower), shape).copy()

    @contextlib.contextmanager
    def _chunks(self, pixels: np.ndarray) -> Iterator[list]:
        """Give the chunks that libmtmd makes of an image: its start mark, itself, its end mark."""
        height, width, _ = pixels.shape
        data = np.ascontiguousarray(pixels).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd_cpp.mtmd_bitmap_init(width, height, data)
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        try:
            marker = mtmd_cpp.mtmd_default_marker()
            text = mtmd_cpp.mtmd_input_text(marker, len(marker), False, True)
            bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
            _check(mtmd_cpp.mtmd_tokenize(self._tower, chunks, ctypes.byref(text), bitmaps, 1), "mtmd_tokenize")
            count = mtmd_cpp.mtmd_input_chunks_size(chunks)
            yield [mtmd_cpp.mtmd_input_chunks_get(chunks, number) for number in range(count)]
        finally:
            mtmd_cpp.mtmd_input_chunks_free(chunks)
            mtmd_cpp.mtmd_bitmap_free(bitmap)

    def _decode(self, ids: list[int], position: int, all_logits: bool) -> np.ndarray:
        # Positions are given: after an image they are not the number of tokens so far.
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for index, token in enumerate(ids):
                batch.token[index] = token
                batch.pos[index] = position + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = all_logits or index == len(ids) - 1
            _check(llama_cpp.llama_decode(self._llama.ctx, batch), "llama_decode")
        finally:
            llama_cpp.llama_batch_free(batch)
        rows = range(len(ids)) if all_logits else [len(ids) - 1]
        size = (self._llama.n_vocab(),)
        found = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._llama.ctx, row), size) for row in rows]
        return np.stack(found)


def _check(status: int, call: str) -> None:
    if status != 0:
        raise RuntimeError(f"{call}: status {status}")
