"""The other side of the demonstration: the same questions, asked of transformers alone, in a process of its own.

Run as `python -m qwen3_vl_memory_optimizations.cli.demo.plain_transformers MODEL QUESTIONS`; prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

MAX_NEW_TOKENS = 20


def answer_all(model: Any, processor: Any, questions: list[dict[str, str]], images: Path) -> list[str]:
    """Return a greedy answer to each question, computed by one thread.

    The products of this model are so small that several threads would mostly wait for each other.
    """
    import torch

    answers = []
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for question in questions:
            inputs = processor.prepare(question["question"], [images / question["image"]])
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
            answers.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :]))
    finally:
        torch.set_num_threads(n_threads)
    return answers


def _run(directory: Path, questions_file: Path) -> dict[str, Any]:
    from transformers import AutoModelForImageTextToText

    from ...model.inputs.processor import load_processor

    start = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto", local_files_only=True)
    questions = json.loads(questions_file.read_text(encoding="utf-8"))
    answers = answer_all(model.eval(), load_processor(directory), questions, questions_file.parent)
    return {
        "answers": answers,
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "seconds": time.perf_counter() - start,
    }


if __name__ == "__main__":
    print(json.dumps(_run(Path(sys.argv[1]), Path(sys.argv[2]))))
