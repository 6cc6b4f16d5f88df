"""Where the benchmark's large files lie, and which peers there are."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import machine_name

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SHAPES = ("2B", "4B", "8B")
WORKS = ("decode-32", "prefill-256", "prefill-1024", "image-448", "image-1024")
ISAS = ("native", "avx2")
FAST_TOWER, SMALL_TOWER = "F16", "Q8_0"
"""Types of llama.cpp's vision tower: F16 encodes in a tenth less time, Q8_0 has half the bytes."""

AVX2_ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "QWEN3VL_MEM_ISA": "avx2",  # the native core reads none of the others
    "OV_CPU_MAX_ISA": "AVX2",  # OpenVINO's own kernels; it reads no other of these
}


def results_path(cpu: str) -> Path:
    """Return where the results of a machine are kept."""
    return HERE / f"results-{machine_name(cpu)}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One line of the tables.

    Attributes:
        worker: module below `workers`.
        variant: what the worker is told: a codec, a dtype or a quantisation.
        vision: it has the vision tower.
        needs: steps of `prepare.py` without which it cannot run; `{isa}` stands for the instruction set.
    """

    worker: str
    variant: str
    vision: bool = False
    needs: tuple[str, ...] = ()


PEERS = {
    "ours int8": Peer(worker="ours", variant="int8_rotated", vision=True),
    "ours int4": Peer(worker="ours", variant="int4", vision=True),
    "ours none": Peer(worker="ours", variant="none", vision=True),
    "transformers bf16": Peer(worker="plain_transformers", variant="bf16", vision=True),
    "transformers fp32": Peer(worker="plain_transformers", variant="fp32", vision=True),
    "accelerate bf16": Peer(worker="accelerate_offload", variant="bf16", vision=True),
    "llama.cpp Q8_0": Peer(worker="llama_cpp", variant="Q8_0", vision=True, needs=("llama-{isa}", "gguf")),
    "llama.cpp Q4_0": Peer(worker="llama_cpp", variant="Q4_0", vision=True, needs=("llama-{isa}", "gguf")),
    "OpenVINO Q8_0": Peer(worker="openvino", variant="Q8_0", needs=("gguf", "openvino")),
    "OpenVINO Q4_0": Peer(worker="openvino", variant="Q4_0", needs=("gguf", "openvino")),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """The files below one directory that git ignores."""

    bench: Path

    def checkpoint(self, shape: str) -> Path:
        """Return the Hugging Face directory of random weights."""
        return self.bench / shape

    @property
    def cache(self) -> Path:
        """Return where this project's packed checkpoints lie."""
        return self.bench / "cache"

    @property
    def peers(self) -> Path:
        """Return the directory of what only peers need."""
        return self.bench / "peers"

    @property
    def python(self) -> Path:
        """Return the interpreter that sees the peers' packages besides those of this project's environment."""
        return self.peers / "venv" / "bin" / "python"

    def llama(self, isa: str) -> Path:
        """Return the directory into which llama-cpp-python was built for an instruction set."""
        return self.peers / f"llama-{isa}"

    def gguf(self, shape: str, quantization: str) -> Path:
        """Return the GGUF file of the text decoder; what OpenVINO makes of it lies beside it."""
        return self.peers / "gguf" / f"{shape}-{quantization}" / "model.gguf"

    def vision_gguf(self, shape: str, quantization: str) -> Path:
        """Return the GGUF file of the text decoder that takes images."""
        return self.peers / "gguf" / f"{shape}-vision" / f"model-{quantization}.gguf"

    def mmproj(self, shape: str, tower_type: str) -> Path:
        """Return the GGUF file of the vision tower."""
        return self.peers / "gguf" / f"{shape}-vision" / f"mmproj-{tower_type}.gguf"

    @property
    def offload(self) -> Path:
        """Return where accelerate may write."""
        return self.peers / "offload"

    def failures(self) -> dict[str, str]:
        """Return which steps of `prepare.py` failed, and how."""
        path = self.peers / "failures.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write_failures(self, failures: dict[str, str]) -> None:
        """Keep what `failures` returns."""
        (self.peers / "failures.json").write_text(json.dumps(failures, indent=1))


def worker_environment(layout: Layout, peer: Peer, isa: str, threads: int) -> dict[str, str]:
    """Return the environment of a worker's process."""
    paths = [str(ROOT / "src"), str(ROOT)]
    if peer.worker == "llama_cpp":
        paths.insert(0, str(layout.llama(isa)))
    environment = {key: value for key, value in os.environ.items() if key not in AVX2_ENVIRONMENT}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    return environment | (AVX2_ENVIRONMENT if isa == "avx2" else {})
