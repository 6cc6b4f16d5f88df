"""The codecs keep their contract with AVX2 alone, the instruction set of the small machines.

Torch's products sum in another order with it, and its INT8 product saturates.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "QWEN3VL_MEM_ISA": "avx2",
}


@pytest.mark.skipif(os.environ.get("ATEN_CPU_CAPABILITY") == "avx2", reason="this is the run with AVX2")
@pytest.mark.parametrize("name", ["test_codecs.py", "test_int8.py", "test_kernels.py", "test_int4.py"])
def test_passes_with_avx2(name):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(name))],
        env={**os.environ, **AVX2},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-4000:]
