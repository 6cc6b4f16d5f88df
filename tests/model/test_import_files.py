"""The list of files that importing transformers reads."""

import json
import subprocess
import sys

import pytest

from qwen3_vl_memory_optimizations.model.checkpoint.import_files import ImportFiles

from . import tiny


@pytest.fixture
def files(tmp_path):
    (tmp_path / "cache").mkdir()
    return ImportFiles(tmp_path / "cache")


def test_without_a_list_nothing_happens(files, tmp_path):
    files.read_ahead()
    files.drop()
    assert not list((tmp_path / "cache").iterdir())


def test_no_list_is_kept_where_nothing_is(tmp_path):
    ImportFiles(tmp_path / "cache").record()
    assert not (tmp_path / "cache").exists()


def test_a_list_is_kept_once_and_only_of_libraries(files, tmp_path):
    files._loaded = set()
    files.record()
    [kept] = (tmp_path / "cache").iterdir()
    names = kept.read_text().splitlines()
    assert "transformers/models/qwen3_vl/modeling_qwen3_vl.py" in names
    assert not any(name.startswith(("/", "..")) for name in names)
    assert all(path.is_file() for path in files._listed())
    kept.write_text("transformers/__init__.py")
    files.record()
    assert kept.read_text() == "transformers/__init__.py"


def test_a_damaged_list_does_no_harm(files, tmp_path):
    files.record()
    [kept] = (tmp_path / "cache").iterdir()
    kept.write_text("../../../etc/passwd\n../outside.py\nsomething/gone.py\ntransformers\n\n")
    assert [path.name for path in files._listed()] == ["gone.py"]
    files.read_ahead()
    files.drop()
    kept.write_bytes(b"\xff\xfe")
    assert files._listed() == []


def test_where_no_list_can_be_written_the_model_loads_all_the_same(files, monkeypatch):
    monkeypatch.setattr("tempfile.mkstemp", _full)
    files.record()
    assert files._listed() == []


def _full(**where):
    raise OSError(28, "No space left on device")


def test_starting_imports_transformers_only_for_a_model_and_while_its_weights_are_read(tmp_path):
    code = f"""
import sys, json
from qwen3_vl_memory_optimizations import create_optimized_model
assert "transformers" not in sys.modules
stats = []
for _ in range(2):
    model = create_optimized_model({str(tiny.DIRECTORY)!r}, {{"cache_dir": {str(tmp_path)!r}, "codec": "int8"}})
    optimizer = model.memory_optimizer
    from qwen3_vl_memory_optimizations.paging import PageState
    stats.append(sum(any(page.state is not PageState.SWAPPED for page in entry.pages)
                     for entry in optimizer.pager.entries.values()))
    optimizer.close()
print(json.dumps(stats))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = json.loads(done.stdout)
    assert first == 0 and second > 0, "the second time it was packed, and reading began with the import"
    [kept] = tmp_path.glob("packed/imports-*.txt")
    assert any(name.startswith("transformers/") and name.endswith(".pyc") for name in kept.read_text().splitlines())
