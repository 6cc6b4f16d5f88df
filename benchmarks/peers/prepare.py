"""Make what the peers need: an environment, two builds of llama.cpp, checkpoints, packed and GGUF files.

A step whose result is there is not done again. A step that fails is kept with its reason, and the peers that need it
are reported as failed for that reason. Building llama.cpp needs a C++ compiler and takes minutes each.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.peers.layout import FAST_TOWER, HERE, ISAS, SHAPES, SMALL_TOWER, Layout  # noqa: E402

PACKAGES = ("gguf>=0.17", "diskcache", "matplotlib>=3.8")
OPENVINO_PACKAGES = ("openvino>=2026.4", "openvino-genai>=2026.4")
LLAMA_PACKAGE = "llama-cpp-python==0.3.36"
CMAKE_ARGUMENTS = {
    # Without AMX: this version dies with an illegal instruction (tiles are not configured in each of its threads).
    "native": "-DGGML_NATIVE=ON -DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8",
    "avx2": "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX_VNNI=OFF "
    "-DGGML_AVX512=OFF -DGGML_AVX512_VBMI=OFF -DGGML_AVX512_VNNI=OFF -DGGML_AVX512_BF16=OFF",
}
QUANTIZATIONS = ("Q8_0", "Q4_0")

_CONVERT_TO_OPENVINO = (
    "import sys, openvino_genai; openvino_genai.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["2B"])
    parser.add_argument("--bench-dir", type=Path, default=ROOT / ".bench")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time")
    arguments = parser.parse_args()
    layout = Layout(arguments.bench_dir.resolve())
    layout.peers.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}

    def attempt(step: str, make: Callable[[], None]) -> None:
        try:
            make()
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if line.strip()]
            failures[step] = " | ".join(lines[-4:])[-1000:]
            print(f"{step}: failed: {failures[step]}", flush=True)

    make_environment(layout)
    for isa in ISAS:
        attempt(f"llama-{isa}", lambda isa=isa: build_llama(layout, isa, arguments.jobs))
    attempt("openvino", lambda: install(layout, "openvino_genai", OPENVINO_PACKAGES))
    for shape in arguments.shapes:
        make_checkpoint(layout, shape)
        attempt("gguf", lambda shape=shape: make_gguf(layout, shape))
        if "openvino" not in failures and "gguf" not in failures:
            attempt("openvino", lambda shape=shape: convert_to_openvino(layout, shape))
    layout.write_failures(failures)


def make_environment(layout: Layout) -> None:
    """Make an environment that sees this one's packages, torch among them, and has the peers' besides."""
    if not layout.python.exists():
        _run([sys.executable, "-m", "venv", str(layout.python.parents[1])])
        purelib = _run([str(layout.python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
        Path(purelib, "base.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    install(layout, "gguf", PACKAGES)


def install(layout: Layout, module: str, packages: tuple[str, ...]) -> None:
    """Install packages into the peers' environment, unless `module` is there; torch stays the one there is."""
    found = subprocess.run([str(layout.python), "-c", f"import {module}, matplotlib"], capture_output=True)
    if found.returncode == 0:
        return
    print("installing", *packages, flush=True)
    constraints = layout.peers / "constraints.txt"
    names = ("torch", "transformers", "numpy")
    code = f"import importlib.metadata as m\nfor n in {names}: print(n + '==' + m.version(n).split('+')[0])"
    constraints.write_text(_run([sys.executable, "-c", code]))
    _run([str(layout.python), "-m", "pip", "install", "-c", str(constraints), *packages])


def build_llama(layout: Layout, isa: str, jobs: int) -> None:
    """Build llama-cpp-python, with all of llama.cpp, for an instruction set."""
    target = layout.llama(isa)
    if (target / "llama_cpp" / "__init__.py").exists():
        return
    print(f"building {LLAMA_PACKAGE} for {isa}: minutes", flush=True)
    environment = os.environ | {"CMAKE_ARGS": CMAKE_ARGUMENTS[isa], "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}
    # A wheel that pip kept may be the build for the other instruction set.
    options = ["--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python", "--target", str(target)]
    _run([str(layout.python), "-m", "pip", "install", *options, LLAMA_PACKAGE], environment)


def make_checkpoint(layout: Layout, shape: str) -> None:
    """Write the checkpoint of random weights and pack it."""
    checkpoint = layout.checkpoint(shape)
    if not (checkpoint / "config.json").exists():
        print(f"writing {checkpoint}", flush=True)
        _run([sys.executable, str(ROOT / "benchmarks" / "make_checkpoint.py"), shape, str(checkpoint)])
    code = "import sys; from qwen3_vl_memory_optimizations.cli import main; main()"
    pack = ["pack", str(checkpoint), "--codec", "auto", "--cache-dir", str(layout.cache), "--json"]
    _run([sys.executable, "-c", code, *pack], os.environ | {"PYTHONPATH": str(ROOT / "src")})


def make_gguf(layout: Layout, shape: str) -> None:
    """Write the text decoder in each quantisation, without and with images, and the vision tower as GGUF."""
    for quantization in QUANTIZATIONS:
        write_gguf(layout, shape, layout.gguf(shape, quantization), quantization, "qwen3")
        write_gguf(layout, shape, layout.vision_gguf(shape, quantization), quantization, "qwen3vl")
    for tower_type in (FAST_TOWER, SMALL_TOWER):
        write_mmproj(layout, shape, tower_type)


def write_gguf(layout: Layout, shape: str, out: Path, quantization: str, architecture: str) -> None:
    """Write a text decoder unless it is there."""
    _write(layout, shape, out, "write_gguf.py", "--type", quantization, "--architecture", architecture)


def write_mmproj(layout: Layout, shape: str, tower_type: str) -> None:
    """Write a vision tower unless it is there."""
    _write(layout, shape, layout.mmproj(shape, tower_type), "write_mmproj.py", "--type", tower_type)


def _write(layout: Layout, shape: str, out: Path, script: str, *options: str) -> None:
    if not out.exists():
        print(f"writing {out}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        _run([str(layout.python), str(HERE / script), str(layout.checkpoint(shape)), str(out), *options])


def convert_to_openvino(layout: Layout, shape: str) -> None:
    """Let OpenVINO read each GGUF file and keep it in its own format beside it."""
    for quantization in QUANTIZATIONS:
        source = layout.gguf(shape, quantization)
        if (source.parent / "openvino_detokenizer.xml").exists():
            continue
        print(f"converting {source} for OpenVINO", flush=True)
        _run([str(layout.python), "-c", _CONVERT_TO_OPENVINO, str(source)])


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    return subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
