"""accelerate's offload: what the limit has room for stays in memory, the rest is read from the disk at each use.

Without a limit everything is on the disk.
"""

from __future__ import annotations

import json
import tempfile

from benchmarks.peers.workers._measure import Request, run

_LIBRARIES_BYTES = 600_000_000
"""What interpreter, torch, transformers and activations are given of the limit."""


def load(request: Request):
    """Load the model with a device map for memory and disk."""
    import torch
    from transformers import AutoModelForImageTextToText

    from benchmarks.peers.workers._transformers import TransformersModel

    class Offloaded(TransformersModel):
        def describe(self) -> dict:
            places = list(self.model.hf_device_map.values())
            return super().describe() | {"modules_on_disk": places.count("disk"), "modules": len(places)}

    torch.set_num_threads(request.threads)
    directory = request.layout.checkpoint(request.shape)
    text = json.loads((directory / "config.json").read_text())["text_config"]
    # The largest tensor comes and goes beside what stays.
    largest_bytes = text["vocab_size"] * text["hidden_size"] * 2
    room = max(0, request.limit - _LIBRARIES_BYTES - largest_bytes)
    request.layout.offload.mkdir(parents=True, exist_ok=True)
    model = AutoModelForImageTextToText.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": room},
        offload_folder=tempfile.mkdtemp(dir=request.layout.offload),
    )
    return Offloaded(model)


if __name__ == "__main__":
    run(load)
