"""Compare the GGUF files with transformers in fp32 on the same token ids: is it the same model?

llama.cpp on a file in fp16 must agree almost exactly: that proves the file. Random weights magnify small errors from
layer to layer, so the quantised files are to be read beside what bf16 alone does to transformers' own logits, and
OpenVINO beside llama.cpp on the same file. Needs memory for the model in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks.peers.layout import PEERS, Layout, Peer, worker_environment  # noqa: E402
from benchmarks.peers.workers._measure import random_ids  # noqa: E402

PROMPTS = 8
PROMPT_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="2B")
    parser.add_argument("--bench-dir", type=Path, default=ROOT / ".bench")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--child", choices=("plain_transformers", "llama_cpp", "openvino"), help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    layout = Layout(arguments.bench_dir.resolve())
    if arguments.child:
        prompts = [random_ids(PROMPT_TOKENS, seed) for seed in range(PROMPTS)]
        np.save(arguments.out, _CHILDREN[arguments.child](layout, arguments, prompts))
        return
    f16 = layout.gguf(arguments.shape, "F16")
    if not f16.exists():
        f16.parent.mkdir(parents=True, exist_ok=True)
        script = str(ROOT / "benchmarks" / "peers" / "write_gguf.py")
        checkpoint = str(layout.checkpoint(arguments.shape))
        subprocess.run([str(layout.python), script, checkpoint, str(f16), "--type", "F16"], check=True)
    true = _in_process(layout, arguments, PEERS["transformers fp32"])
    compared = {
        "transformers bf16": PEERS["transformers bf16"],
        "llama.cpp F16": replace(PEERS["llama.cpp Q8_0"], variant="F16"),
        **{name: peer for name, peer in PEERS.items() if peer.worker in ("llama_cpp", "openvino")},
    }
    results, of_llama = {}, {}
    for name, peer in compared.items():
        found = _in_process(layout, arguments, peer)
        results[f"{name}, transformers fp32"] = agreement(found, true)
        if peer.worker == "llama_cpp":
            of_llama[peer.variant] = found
        if peer.worker == "openvino":
            results[f"{name}, llama.cpp {peer.variant}"] = agreement(found, of_llama[peer.variant])
    f16.unlink()
    print(json.dumps(results, indent=1))


def agreement(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Return how far the logits of two models agree at each position."""
    found, expected = (logits.reshape(-1, logits.shape[-1]) for logits in (found, expected))
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(found, expected, strict=True)]
    return {
        "same_first_choice": round(float((found.argmax(-1) == expected.argmax(-1)).mean()), 4),
        "correlation": round(float(np.mean(correlations)), 5),
        "least_correlation": round(float(np.min(correlations)), 5),
        "positions": len(correlations),
    }


def _in_process(layout: Layout, arguments: argparse.Namespace, peer: Peer) -> np.ndarray:
    python = str(layout.python) if peer.needs else sys.executable
    with tempfile.TemporaryDirectory() as directory:
        out = os.path.join(directory, "logits.npy")
        command = [
            python,
            __file__,
            "--shape",
            arguments.shape,
            "--bench-dir",
            str(layout.bench),
            "--child",
            peer.worker,
        ]
        command += ["--variant", peer.variant, "--out", out, "--threads", str(arguments.threads)]
        subprocess.run(command, check=True, env=worker_environment(layout, peer, "native", arguments.threads))
        return np.load(out)


def _transformers(layout: Layout, arguments: argparse.Namespace, prompts: list[list[int]]) -> np.ndarray:
    import torch
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(arguments.threads)
    directory = layout.checkpoint(arguments.shape)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.variant]
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(prompts)).logits.float().numpy()


def _llama_cpp(layout: Layout, arguments: argparse.Namespace, prompts: list[list[int]]) -> np.ndarray:
    import llama_cpp

    path = str(layout.gguf(arguments.shape, arguments.variant))
    llama = llama_cpp.Llama(path, n_ctx=256, n_threads=arguments.threads, logits_all=True, verbose=False)
    found = []
    for prompt in prompts:
        llama.reset()
        llama.eval(prompt)
        found.append(np.array(llama.scores[: len(prompt)]))
    return np.stack(found)


def _openvino(layout: Layout, arguments: argparse.Namespace, prompts: list[list[int]]) -> np.ndarray:
    import openvino

    path = layout.gguf(arguments.shape, arguments.variant).with_name("openvino_model.xml")
    settings = {"INFERENCE_NUM_THREADS": arguments.threads}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    found = []
    for prompt in prompts:
        request.reset_state()
        ids = np.array([prompt], dtype=np.int64)
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(len(prompt))[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        found.append(np.array(request.infer(inputs)["logits"][0]))
    return np.stack(found)


_CHILDREN = {"plain_transformers": _transformers, "llama_cpp": _llama_cpp, "openvino": _openvino}


if __name__ == "__main__":
    main()
