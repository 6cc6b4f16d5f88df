"""Instructions of the native core's kernels, counted by valgrind: they repeat where times do not.

Counted with AVX2, which valgrind knows and every processor of interest has. A compiler decides how many they are, so
counts are kept for each; those of an unknown one are only printed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import qwen3_vl_memory_optimizations
from qwen3_vl_memory_optimizations.native import core

HERE = Path(__file__).resolve().parent
COMMITTED = HERE / "instructions.json"
NATIVE = Path(qwen3_vl_memory_optimizations.__file__).parent / "native"
MOST_SHARE = 1.05
"""A kernel fails above this share of its committed count: of the same compiler, counts differ by less than 0.1 %."""
KERNELS = {  # the function that is counted, and what the count is divided by
    "rows_1": ("qm_linear", 1 * 512 * 2048, "product"),
    "rows_4": ("qm_linear", 4 * 512 * 2048, "product"),
    "rows_16": ("qm_linear", 16 * 512 * 2048, "product"),
    "rows_64": ("qm_linear", 64 * 512 * 2048, "product"),
    "codes_1": ("qm_linear", 1 * 512 * 2048, "product with 4-bit rows"),
    "codes_4": ("qm_linear", 4 * 512 * 2048, "product with 4-bit rows"),
    "codes_64": ("qm_linear", 64 * 512 * 2048, "product with 4-bit rows"),
    "quantize": ("qm_quantize", 16 * 6144, "value"),
    "attention": ("qm_attend", 8 * 2 * (8 * 256 + 64) * 128, "key or value"),
    "full_attention": ("qm_attend_all", 4 * 576 * 576, "pair of tokens"),
}


def unavailable_reason() -> str | None:
    """Return why instructions cannot be counted here, or `None`."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if shutil.which("c++") is None:
        return "no C++ compiler (c++) was found"
    native = core()
    if native is None or native.isa in ("portable", "dotprod"):
        return "the native core has no AVX2 kernels here"
    return None


def compiler_name() -> str:
    """Return the compiler's name and version, without what a distribution adds."""
    first = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    version = re.search(r"\d+\.\d+", first)
    return f"{'clang' if 'clang' in first else 'gcc'} {version[0] if version else 'unknown'}"


def count() -> dict[str, float]:
    """Return the instructions of each kernel, per product, value, key or pair (see `KERNELS`)."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "kernels"
        include = f"-I{NATIVE / 'core'}"
        compiling = ["c++", "-std=c++17", "-O1", include, str(HERE / "kernels.cpp"), "-o", str(program), "-ldl"]
        subprocess.run(compiling, check=True, capture_output=True)
        for name, (function, n, _) in KERNELS.items():
            counting = [
                "valgrind",
                "--tool=callgrind",
                "--callgrind-out-file=/dev/null",
                f"--toggle-collect={function}",
            ]
            ran = subprocess.run(
                [*counting, str(program), str(NATIVE / "libcore.so"), "avx2", name],
                capture_output=True,
                text=True,
                check=True,
            )
            collected = re.search(r"Collected : (\d+)", ran.stderr)
            assert collected is not None, ran.stderr
            found[name] = round(int(collected[1]) / n, 4)
    return found


def compare(counted: dict[str, float], committed: dict[str, float] | None) -> list[str]:
    """Print both, and return the names of the kernels that need more instructions than committed."""
    failed = []
    for name, value in counted.items():
        expected = None if committed is None else committed.get(name)
        ok = expected is None or value <= MOST_SHARE * expected
        label = f"{name}: instructions per {KERNELS[name][2]}"
        print(f"{'ok  ' if ok else 'FAIL'} {label:<55} {value:7.3f}   committed {expected or 'none'}")
        if not ok:
            failed.append(name)
    return failed


def check(*, commit: bool) -> list[str]:
    """Count, print, and return the names of the kernels that became longer; `commit`: keep the counts."""
    reason = unavailable_reason()
    if reason is not None:
        print(f"instructions are not counted: {reason}")
        return []
    counted, committed, compiler = count(), json.loads(COMMITTED.read_text()), compiler_name()
    if commit:
        committed[compiler] = counted
        COMMITTED.write_text(json.dumps(committed, indent=1) + "\n")
    elif compiler not in committed:
        print(f"no counts of {compiler} are committed, only of {', '.join(committed)}")
    return compare(counted, committed.get(compiler))
