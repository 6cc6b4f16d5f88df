"""The core under sanitizers, with AVX512 emulated, for ARM under QEMU, and built by each way of building it."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import qwen3_vl_memory_optimizations

CORE = Path(qwen3_vl_memory_optimizations.__file__).parent / "native" / "core"
CHECK = Path(__file__).with_name("check.cpp")
FLAGS = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-Wno-psabi", "-pthread"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"]
FLAGS_OF = {"avx2": AVX2, "avxvnni": AVX2, "avx512vnni": AVX512, "amx": [*AVX512, "-mamx-tile", "-mamx-int8"]}
ARM, ARM_COMPILER = {"dotprod": ["-march=armv8.2-a+dotprod"]}, "aarch64-linux-gnu-g++"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler was found")


def build(folder: Path, *options: str, emulated: bool = False, compiler: str = "g++", flags_of=FLAGS_OF) -> Path:
    """Compile the check and the core; returns the program."""

    def compiled(source: Path) -> str:
        flags = flags_of.get(source.stem, [])
        if emulated and flags:
            flags = AVX2
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *FLAGS, *flags, *options, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:  # sanitizers make this take a minute
        objects = list(pool.map(compiled, sorted(CORE.glob("*.cpp"))))
    program = folder / "check"
    include = f"-I{CORE}"
    subprocess.run([compiler, *FLAGS, *options, include, str(CHECK), *objects, "-o", str(program)], check=True)
    return program


def run(program: Path, *through: str) -> str:
    ran = subprocess.run([*through, str(program)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    return ran.stdout


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(tmp_path, sanitizer):
    program = build(tmp_path, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    assert "same bits" in run(program)


@pytest.mark.skipif(not Path("/usr/include/simde").is_dir(), reason="SIMDe (libsimde-dev) is not installed")
def test_avx512_has_the_same_bits_where_it_is_emulated(tmp_path):
    program = build(tmp_path, "-DQM_EMULATED", "-DQM_PLAIN", emulated=True)
    assert run(program) == "avx512vnni: same bits\n"


@pytest.mark.skipif(
    shutil.which(ARM_COMPILER) is None or shutil.which("qemu-aarch64") is None,
    reason="a compiler for ARM (g++-aarch64-linux-gnu) or QEMU (qemu-user) is not installed",
)
def test_arm_has_the_same_bits_under_qemu(tmp_path):
    program = build(tmp_path, "-O2", "-static", compiler=ARM_COMPILER, flags_of=ARM)
    assert run(program, "qemu-aarch64") == "dotprod: same bits\n"
    assert run(program, "qemu-aarch64", "-cpu", "cortex-a57") == "portable: same bits\n"
