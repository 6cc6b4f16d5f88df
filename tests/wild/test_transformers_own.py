"""transformers' own tests of models, with each model optimised after it is constructed.

They come from the source package of the installed version, which has those that all models share; `QWEN3VL_MEM_MODES`
(`none half int8 auto`) says with which settings they run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

HERE = Path(__file__).parent / "transformers_tests"
MODES = {
    "none": {"codec": "none"},
    "half": {"codec": "none", "share": 0.5},
    "int8": {"codec": "int8"},
    "auto": {"codec": "auto"},
}
CHOSEN = os.environ.get("QWEN3VL_MEM_MODES", "half int8").split()
_VOCABULARY = "the vocabulary of managed weights keeps its size"
_ROUNDS = "compares results bit by bit or at 1e-5, and INT8 rounds weights and activations"
EXPECTED = {
    "test_bc_cache_name_forward": "fails with the plain model too",
    "test_resize_tokens_embeddings": _VOCABULARY,
    "test_resize_embeddings_untied": _VOCABULARY,
    "test_resize_embeddings_untied_no_reinit_on_post_init": _VOCABULARY,
    "test_load_contiguous_weights": "a weight that is encoded, or may leave memory, says that it is not contiguous",
    "test_retain_grad_hidden_states_attentions": "trains all weights; managed ones are frozen",
}
"""Tests that may fail in every mode, and why. `docs/compatibility.md` has the same list."""
EXPECTED_WITH_LOSS = {
    "test_batching_equivalence": _ROUNDS,
    "test_can_init_all_missing_weights": _ROUNDS,
    "test_save_load": _ROUNDS,
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The tests of the source package, as a package with what they import besides."""
    pytest.importorskip("parameterized")
    root = tmp_path_factory.mktemp("transformers")
    wanted = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "download", wanted, "--no-binary", "transformers", "--no-deps"]
    done = subprocess.run([*pip, "--no-build-isolation", "-q", "-d", root], capture_output=True, text=True)
    archive = next(root.glob("*.tar.gz"), None)
    if archive is None:
        pytest.skip(f"the source package of {wanted} cannot be had: {done.stderr.strip()[-200:]}")
    tests = root / "tests"
    with tarfile.open(archive) as members:
        for member in members:
            if re.fullmatch(r"[^/]+/tests/test_\w+\.py", member.name):
                member.name = Path(member.name).name
                members.extract(member, tests)
    for part, text in {
        "exporters/test_export.py": "class ExportTesterMixin: pass\n",
        "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
        "models/qwen3_vl/__init__.py": "",
    }.items():
        (tests / part).parent.mkdir(parents=True)
        (tests / part).write_text(text)
    for directory in ("", "exporters", "generation", "models"):
        (tests / directory / "__init__.py").touch()
    shutil.copy(HERE / "qwen3_vl.py", tests / "models/qwen3_vl/test_modeling_qwen3_vl.py")
    shutil.copy(HERE / "optimised.py", root / "conftest.py")
    (root / "src").mkdir()  # where the tests look for the sources
    (root / "src/transformers").symlink_to(Path(transformers.__file__).parent)
    return root


def test_the_page_lists_what_fails():
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in (*EXPECTED, *EXPECTED_WITH_LOSS))


@pytest.mark.parametrize("mode", CHOSEN)
def test_they_pass(package, mode):
    environment = {**os.environ, "SETTINGS": json.dumps(MODES[mode])}
    arguments = ["tests/models/qwen3_vl/test_modeling_qwen3_vl.py", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "--tb=line"],
        cwd=package,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    failed = set(re.findall(r"FAILED\S* .*::(\w+?)(?:_\d+\w*)?(?: |$)", done.stdout, re.MULTILINE))
    expected = EXPECTED if MODES[mode]["codec"] == "none" else EXPECTED | EXPECTED_WITH_LOSS
    assert failed <= expected.keys(), done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 90, done.stdout[-2000:]
