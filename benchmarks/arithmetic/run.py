"""INT8 against plain bf16 transformers, both in memory, interleaved in one process: decode and prefill of the 2B shape.

With `--avx2` the libraries are held to AVX2, which is what the target processor has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--cache-dir", default=None)
    parser.add_argument("--avx2", action="store_true", help="hold torch, oneDNN, MKL and FBGEMM to AVX2")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--decode-tokens", type=int, default=8)
    parser.add_argument("--prefill-tokens", type=int, default=256)
    arguments = parser.parse_args()
    if arguments.avx2 and "ATEN_CPU_CAPABILITY" not in os.environ:
        os.environ.update(AVX2)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # the libraries read these when they load
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch
    from transformers import AutoModelForImageTextToText

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from qwen3_vl_memory_optimizations import create_optimized_model

    plain = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    ours = create_optimized_model(
        arguments.model, {"codec": "int8_rotated", "cache_dir": arguments.cache_dir, "enable_cache_hierarchy": False}
    )
    ids = torch.randint(1000, 100_000, (1, arguments.prefill_tokens), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, dict[str, list[float]]] = {"plain bf16": {}, "int8": {}}
    with torch.no_grad():
        for round_number in range(arguments.repeat + 1):
            for name, model in (("plain bf16", plain), ("int8", ours)):
                start = time.perf_counter()
                output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
                prefill = time.perf_counter() - start
                token, cache, steps = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values, []
                for _ in range(arguments.decode_tokens):
                    start = time.perf_counter()
                    output = model(input_ids=token, past_key_values=cache, use_cache=True)
                    token = output.logits[:, -1].argmax(-1, keepdim=True)
                    steps.append(time.perf_counter() - start)
                if round_number:  # the first round warms up, and measures kernels
                    seconds[name].setdefault("prefill", []).append(prefill)
                    seconds[name].setdefault("decode", []).extend(steps)
    result = {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "compute_dtype": str(ours.dtype),
        "kernels": {
            str(key): {"chosen": choice.name, **{f"{k}_ns_a_row": round(v * 1e9) for k, v in choice.seconds.items()}}
            for key, choice in kernel_choices(ours).items()
        },
    }
    for work, unit in (("decode", 1), ("prefill", arguments.prefill_tokens)):
        rates = {name: unit / statistics.median(times[work]) for name, times in seconds.items()}
        result[work] = {name: f"{rate:.2f} token/s" for name, rate in rates.items()}
        pairs = zip(seconds["plain bf16"][work], seconds["int8"][work], strict=True)
        result[f"{work}_ratio"] = round(statistics.median(a / b for a, b in pairs), 2)
    print(json.dumps(result, indent=1))


def kernel_choices(model) -> dict:
    """Return what the codec measured and chose."""
    entry = next(entry for entry in model.memory_optimizer.pager.entries.values() if entry.codec.name == "int8_rotated")
    return entry.codec.kernels.choices()


if __name__ == "__main__":
    main()
