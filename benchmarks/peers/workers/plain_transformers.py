"""transformers as it is: the whole model in memory at one dtype."""

from __future__ import annotations

from benchmarks.peers.workers._measure import Request, run


def load(request: Request):
    """Load the model with `from_pretrained`."""
    import torch
    from transformers import AutoModelForImageTextToText

    from benchmarks.peers.workers._transformers import TransformersModel

    torch.set_num_threads(request.threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[request.variant]
    directory = request.layout.checkpoint(request.shape)
    return TransformersModel(AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype))


if __name__ == "__main__":
    run(load)
