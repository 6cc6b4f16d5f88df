"""Compiles the native core (docs/native.md). Without a compiler the package installs all the same and uses torch."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CORE = Path("src/qwen3_vl_memory_optimizations/native/core")
NAME = "qwen3_vl_memory_optimizations.native.libcore"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]
# A product and a sum must not become one operation: each instruction set would round in its own way.
FLAGS += ["-ffp-contract=off", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512VNNI = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"]
X86 = {
    "avx2": AVX2,
    "avxvnni": [*AVX2, "-mavxvnni"],
    "avx512vnni": AVX512VNNI,
    "amx": [*AVX512VNNI, "-mamx-tile", "-mamx-int8"],
}
ARM = {"dotprod": ["-march=armv8.2-a+dotprod"]}
FLAGS_OF = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}
"""Flags of the sources of one instruction set; the others are compiled for any processor."""
PLAIN = {"avxvnni": [*AVX2, "-DQM_PLAIN"], "amx": []}
"""Flags for compilers and assemblers from before 2021, which do not know these instructions."""


def compiler() -> list[str] | None:
    """Return the command of a C++ compiler: CXX, one on the PATH, or the one in the wheel `ziglang`."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    try:
        import ziglang  # noqa: F401
    except ImportError:
        return None
    return [sys.executable, "-m", "ziglang", "c++"]


class BuildCore(build_ext):
    """Compiles a shared library with a plain C interface: it needs no headers of Python, and serves every version."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file's name without the version of Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile each source with the flags of its instruction set, and link them."""
        if not sys.platform.startswith(("linux", "darwin")):
            self.warn("the native core is built on Linux and macOS only; products use torch")
            return
        command = compiler()
        if command is None:
            self.warn("no C++ compiler found (CXX, c++, g++, clang++, the wheel ziglang); products use torch")
            return
        try:
            self._compile(command, ext)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"the native core could not be compiled ({error}); products use torch")

    def _compile(self, command: list[str], ext: Extension) -> None:
        objects = []
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        flags_of = FLAGS_OF.get(platform.machine().lower(), {})
        for source in map(Path, ext.sources):
            target = folder / f"{source.stem}.o"
            flags = flags_of.get(source.stem, [])
            compiling = [*command, *FLAGS, "-c", str(source), "-o", str(target)]
            try:
                subprocess.run([*compiling, *flags], check=True)
            except subprocess.CalledProcessError:
                if not flags or source.stem not in PLAIN:
                    raise
                self.warn(f"{source.stem}: this compiler is too old for these instructions; the core goes without them")
                subprocess.run([*compiling, *PLAIN[source.stem]], check=True)
            objects.append(str(target))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        unused = ["-Wl,--as-needed"] if sys.platform.startswith("linux") else []
        # Under another name first: a process may have the old one loaded.
        built = library.with_name(f".{library.name}.{os.getpid()}")
        subprocess.run([*command, "-shared", *unused, "-o", str(built), *objects, "-lpthread"], check=True)
        os.replace(built, library)


class CoreWheel(bdist_wheel):
    """One wheel per platform, for every version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the wheel's tag."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(NAME, sorted(str(source) for source in CORE.glob("*.cpp")), optional=True)],
    cmdclass={"build_ext": BuildCore, "bdist_wheel": CoreWheel},
)
