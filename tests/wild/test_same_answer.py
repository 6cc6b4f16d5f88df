"""The same input gives the same answer: bit by bit, whatever is resident, in this process and in the next."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.compression import kernels
from qwen3_vl_memory_optimizations.config import MemoryConfig
from qwen3_vl_memory_optimizations.model.checkpoint.compute_dtype import MACHINE_FILE, recall_bf16_cost
from qwen3_vl_memory_optimizations.model.checkpoint.skeleton import compute_dtype

from ..model import tiny

CODECS = ("int8", "int4", "int8_rotated", "auto")
DTYPES = (torch.float32, torch.bfloat16)
HALF_BYTES = 1_400_000  # of the weights in INT8
FORWARDS = 40


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def load(shared_cache):
    """Return a function that loads the tiny model; all are closed after the test."""
    models = []

    def load(codec, dtype, **settings):
        settings = {"codec": codec, "cache_dir": shared_cache, **settings}
        models.append(create_optimized_model(tiny.DIRECTORY, settings, dtype=dtype))
        return models[-1]

    yield load
    for model in models:
        model.memory_optimizer.close()


@pytest.fixture
def unmeasured(monkeypatch):
    """A process that has not measured this machine."""
    monkeypatch.setattr(kernels._bf16_cost, "value", None)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()


@torch.no_grad()
def answers(model, case: str, n_forwards: int) -> set[str]:
    """Return the digests of the different logits that a model gives for one input."""
    inputs = tiny.cases()[case]
    return {digest(model(**inputs).logits) for _ in range(n_forwards)}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_one_input_has_one_answer(load, codec, dtype):
    resident, streamed = load(codec, dtype), load(codec, dtype, tensor_budget=HALF_BYTES, kv_codec="none")
    without_cache = load(codec, dtype, enable_cache_hierarchy=False)
    for case in ("text", "image"):  # an image is encoded once, and found from then on
        found = answers(resident, case, FORWARDS)
        assert len(found) == 1
        assert answers(streamed, case, FORWARDS) == found
        assert answers(without_cache, case, 2) == found


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("settings", [{}, {"tensor_budget": HALF_BYTES}], ids=["unlimited", "half of the weights"])
def test_generate_says_the_same_again(load, codec, settings):
    model, inputs = load(codec, torch.bfloat16, prefix_reuse="off", **settings), tiny.cases()["image"]

    def generated():
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        return [digest(out.sequences), *map(digest, out.logits)]

    assert generated() == generated()


_PROCESS = """
import sys, torch
from tests.wild.test_same_answer import answers, create_optimized_model, tiny
torch.set_num_threads(int(sys.argv[2]))
model = create_optimized_model(tiny.DIRECTORY, {"codec": "auto", "cache_dir": sys.argv[1]}, dtype=torch.bfloat16)
print(*answers(model, "image", 2))
model.memory_optimizer.close()
"""


def test_the_next_process_says_the_same(tmp_path):
    outputs = {
        subprocess.run(
            [sys.executable, "-c", _PROCESS, str(tmp_path), n_threads],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for n_threads in ("2", "1")
    }
    assert len(outputs) == 1 and len(outputs.pop().split()) == 1


def test_what_was_measured_of_the_machine_is_kept(tmp_path, unmeasured, monkeypatch, caplog):
    path, config = tmp_path / MACHINE_FILE, MemoryConfig(cache_dir=tmp_path)
    assert compute_dtype("float32", None, config) == torch.float32 and not path.exists()  # nothing was asked
    compute_dtype("bfloat16", None, config)
    stored = json.loads(path.read_text())["bf16_cost"]
    assert list(stored.values()) == [kernels.bf16_cost()]
    for cost, expected in ((9.0, torch.float32), (0.1, torch.bfloat16)):
        path.write_text(json.dumps({"bf16_cost": {**dict.fromkeys(stored, cost), "another machine": 3.0}}))
        monkeypatch.setattr(kernels._bf16_cost, "value", None)
        assert compute_dtype("bfloat16", None, config) == expected
    assert not caplog.records and [entry.name for entry in tmp_path.iterdir()] == [MACHINE_FILE]


@pytest.mark.parametrize("damaged", ["{", "[]", '{"bf16_cost": {"a": "b"}}', "null", '{"bf16_cost": 1}'])
def test_a_damaged_file_is_made_again(tmp_path, unmeasured, caplog, damaged):
    path = tmp_path / MACHINE_FILE
    path.write_text(damaged)
    recall_bf16_cost(MemoryConfig(cache_dir=tmp_path))
    assert "writing a new one" in caplog.text
    assert list(json.loads(path.read_text())["bf16_cost"].values()) == [kernels.bf16_cost()]


def test_where_nothing_may_be_written(tmp_path, unmeasured, caplog):
    recall_bf16_cost(MemoryConfig(cache_dir=tmp_path / "private", private=True))
    assert not (tmp_path / "private").exists() and not caplog.records
    (tmp_path / "file").write_text("")
    recall_bf16_cost(MemoryConfig(cache_dir=tmp_path / "file" / "below"))
    assert "not stored" in caplog.text
    assert kernels.bf16_cost() > 0
