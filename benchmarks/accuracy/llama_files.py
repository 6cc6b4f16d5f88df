"""Compare 4-bit files of llama.cpp with this project's, on the same weights, text and predictions.

Builds llama.cpp's tools from the source of llama-cpp-python (minutes), converts SmolLM2 with shuffled channels,
collects an importance matrix on the text that `int4` is calibrated on, quantises, and lets transformers predict
with the dequantised weights, as it does for the unquantised model.

    python benchmarks/accuracy/llama_files.py        # after run.py has fetched SmolLM2
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.accuracy.prepare import prepare  # noqa: E402

SOURCE = "llama-cpp-python==0.3.36"
KINDS = ("Q4_0", "IQ4_XS", "Q4_K_M")
WINDOW, TOKENS = 512, 20_992


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work-dir", type=Path, default=ROOT / ".bench" / "accuracy", help="for what is fetched and made"
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, help="to predict, in windows of 512")
    arguments = parser.parse_args()
    *_, model = prepare(arguments.work_dir)
    work = arguments.work_dir / "llama.cpp"
    tools = build(work)
    files = quantise(tools, work, model)
    print(json.dumps(compare(model, files, arguments.tokens), indent=1))


def build(work: Path) -> Path:
    """Return the directory of the tools; the source lies in `work / "source"`."""
    tools = work / "build" / "bin"
    if (tools / "llama-imatrix").exists() and (tools / "llama-quantize").exists():
        return tools
    work.mkdir(parents=True, exist_ok=True)
    download = ["download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(work), SOURCE]
    subprocess.run([sys.executable, "-m", "pip", *download], check=True)
    unpacked = work / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(next(work.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(unpacked, filter="data")
    source = next(unpacked.glob("*/vendor/llama.cpp"))
    (work / "source").unlink(missing_ok=True)
    (work / "source").symlink_to(source.resolve())
    options = ["-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DGGML_AMX_INT8=OFF"]
    subprocess.run(["cmake", "-S", str(source), "-B", str(work / "build"), *options], check=True)
    targets = ["--target", "llama-imatrix", "llama-quantize"]
    subprocess.run(["cmake", "--build", str(work / "build"), "-j", str(os.cpu_count()), *targets], check=True)
    return tools


def quantise(tools: Path, work: Path, model: Path) -> dict[str, Path]:
    """Return the quantised files by kind."""
    from qwen3_vl_memory_optimizations.model.checkpoint.calibration import shipped_text

    plain, importance, text = work / "f32.gguf", work / "imatrix.gguf", work / "calibration.txt"
    if not plain.exists():
        packages = work / "packages"  # the converter's, of which this project needs none
        install = ["install", "--quiet", "--no-deps", "--target", str(packages), "sentencepiece"]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True)
        environment = os.environ | {"PYTHONPATH": str(packages)}
        convert = [str(work / "source" / "convert_hf_to_gguf.py"), str(model), "--outtype", "f32", "--outfile"]
        subprocess.run([sys.executable, *convert, str(plain)], env=environment, check=True)
    text.write_text(shipped_text(), encoding="utf-8")
    if not importance.exists():
        collect = ["-m", str(plain), "-f", str(text), "-o", str(importance), "-c", str(WINDOW)]
        subprocess.run([str(tools / "llama-imatrix"), *collect], check=True)
    files = {}
    for kind in KINDS:
        files[kind] = work / f"{kind}.gguf"
        if not files[kind].exists():
            command = [str(tools / "llama-quantize"), "--imatrix", str(importance), str(plain), str(files[kind]), kind]
            subprocess.run(command, check=True)
    return files


def compare(directory: Path, files: dict[str, Path], tokens: int) -> list[dict]:
    """Return perplexity, divergence and bits of each file beside the model as it is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from qwen3_vl_memory_optimizations.evaluation.data import SHIPPED_TEXT

    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(directory)(SHIPPED_TEXT.read_text(encoding="utf-8"))["input_ids"][:tokens]
    windows = [torch.tensor(ids[start : start + WINDOW])[None] for start in range(0, len(ids), WINDOW)]
    weights = sum(parameter.numel() for parameter in plain.parameters())
    rows = []
    for kind, path in files.items():
        options = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
        model = AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()
        lost = before = divergence = 0.0
        same = count = 0
        with torch.inference_mode():
            for window in windows:
                one, other = (each(window).logits[0, :-1].log_softmax(-1) for each in (plain, model))
                right = window[0, 1:, None]
                before -= float(one.gather(1, right).sum())
                lost -= float(other.gather(1, right).sum())
                divergence += float((one.exp() * (one - other)).sum())
                same += int((one.argmax(-1) == other.argmax(-1)).sum())
                count += len(right)
        rows.append(
            {
                "file": kind,
                "bits_per_weight": 8 * path.stat().st_size / weights,
                "predictions": count,
                "perplexity": math.exp(lost / count),
                "baseline": math.exp(before / count),
                "perplexity_change": math.exp((lost - before) / count) - 1,
                "kl_divergence": divergence / count,
                "top1_agreement": same / count,
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
