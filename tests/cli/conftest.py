import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

import qwen3_vl_memory_optimizations

ASSETS = Path(qwen3_vl_memory_optimizations.__file__).parent / "assets"


@pytest.fixture(scope="session")
def tiny() -> Path:
    return ASSETS / "tiny-qwen3vl"


@pytest.fixture(scope="session")
def demo_images() -> Path:
    return ASSETS / "demo"


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """Return one cache for all tests: the checkpoint is packed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(monkeypatch, cache_dir):
    """Run `qwen3vl-mem` with some arguments, on a terminal that is 80 columns wide."""
    from qwen3_vl_memory_optimizations.cli import app

    monkeypatch.setenv("QWEN3VL_MEM_CACHE", str(cache_dir))
    # None of the profiles of the person who runs the tests.
    monkeypatch.setenv("XDG_CONFIG_HOME", str(cache_dir / "config"))
    # The program itself sets this for its own process.
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", os.environ.get("TRANSFORMERS_VERBOSITY", "error"))
    runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"})
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])
