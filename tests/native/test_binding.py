"""Loading the native core, and what happens where it is absent, old or wrong."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from qwen3_vl_memory_optimizations.errors import ConfigurationError
from qwen3_vl_memory_optimizations.native import ISA_VARIABLE, binding, core

needs_core = pytest.mark.skipif(core() is None, reason="the native core is not built")


@pytest.fixture
def fresh(monkeypatch):
    """Loads the core again, and puts the process's choice back afterwards."""
    before = core()
    binding.core.cache_clear()
    yield monkeypatch
    binding.core.cache_clear()
    if before is not None:
        before.select(before.isa)


def test_torch_can_be_asked_for(fresh):
    fresh.setenv(ISA_VARIABLE, "torch")
    assert core() is None


@needs_core
def test_an_instruction_set_can_be_asked_for(fresh):
    fresh.setenv(ISA_VARIABLE, "Portable")
    assert core().isa == "portable"
    core().select("")


@pytest.mark.parametrize("isa", ["sse9", "avx2" if "dotprod" in binding._SETS else "dotprod"])
def test_an_instruction_set_that_is_unknown_or_of_another_processor_is_named(fresh, isa):
    fresh.setenv(ISA_VARIABLE, isa)
    known = ", ".join(binding._SETS)
    with pytest.raises(ConfigurationError, match=rf"QWEN3VL_MEM_ISA: '{isa}' is not one of torch, {known}"):
        core()


def test_without_the_library_torch_is_used(fresh, tmp_path, caplog):
    fresh.setattr(binding.Core.__init__, "__defaults__", (tmp_path / "libcore.so", ""))
    with caplog.at_level(logging.INFO):
        assert core() is None
    assert "torch's kernels are used" in caplog.text


@needs_core
def test_a_library_of_another_version_is_not_used(fresh):
    fresh.setattr(binding, "_ABI", -1)
    assert core() is None


@needs_core
def test_wrong_kernels_are_found_and_not_used(fresh, caplog):
    if core().isa == "portable":
        pytest.skip("this processor has portable kernels only")
    binding.core.cache_clear()
    found = (torch.full((1,), float(number)) for number in range(10))
    fresh.setattr(binding.Core, "linear", lambda *args: next(found))
    assert core().isa == "portable"
    assert "are wrong on this processor" in caplog.text
    core().select("")


@needs_core
def test_a_forked_process_computes_too():
    script = (
        "import os, torch\n"
        "from qwen3_vl_memory_optimizations.native import core\n"
        "c = core(); torch.set_num_threads(2)\n"
        "x = torch.randn(2, 2048); w = torch.ones(2000, 2048, dtype=torch.int8); s = torch.ones(2000)\n"
        "run = lambda: c.linear(c.quantize(x), w, s, torch.float32)\n"
        "expected = run()\n"
        "child = os.fork()\n"
        "if not child: os._exit(0 if all(torch.equal(run(), expected) for _ in range(50)) else 1)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env={**os.environ}
    )
    assert ran.stdout.strip() == "0", ran.stderr
