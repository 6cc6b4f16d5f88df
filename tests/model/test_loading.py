"""What `create_optimized_model` takes, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from qwen3_vl_memory_optimizations import (
    CheckpointError,
    ConfigurationError,
    CorruptDataError,
    InsufficientDiskSpaceError,
    ManagedTensor,
    MemoryBudgetExceeded,
    create_optimized_model,
)
from qwen3_vl_memory_optimizations.config import MemoryConfig
from qwen3_vl_memory_optimizations.model.checkpoint.packed_encodings import PackedEncodings
from qwen3_vl_memory_optimizations.model.checkpoint.packing import pack_checkpoint
from qwen3_vl_memory_optimizations.model.layers.forward_memory import vision_bytes
from qwen3_vl_memory_optimizations.model.run.pieces import forward_size
from qwen3_vl_memory_optimizations.storage import Checkpoint

from . import tiny


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    copy = tmp_path / "model"
    shutil.copytree(tiny.DIRECTORY, copy)
    return copy


def settings(tmp_path, **more):
    return {"cache_dir": tmp_path / "cache", **more}


@torch.no_grad()
def test_takes_over_a_loaded_model(tmp_path):
    from transformers import Qwen3VLForConditionalGeneration

    loaded = Qwen3VLForConditionalGeneration.from_pretrained(tiny.DIRECTORY, dtype=torch.float32).eval()
    model = create_optimized_model(loaded, settings(tmp_path, codec="none", tensor_budget="3.6MB"))
    inputs = tiny.cases()["image"]
    for _ in range(2):
        assert torch.equal(model(**inputs).logits, tiny.reference()(**inputs).logits)
    stats = model.memory_optimizer.get_memory_efficiency_stats()
    assert stats["paging"]["swap_writes"] > 0  # no file holds these weights: they went to the swap file
    model.memory_optimizer.close()
    with pytest.raises(ConfigurationError, match="already optimized"):
        create_optimized_model(model)


@torch.no_grad()
def test_takes_a_configuration(tmp_path):
    from transformers import Qwen3VLConfig

    config = Qwen3VLConfig.from_pretrained(tiny.DIRECTORY)
    with create_optimized_model(config, settings(tmp_path)).memory_optimizer as optimizer:
        assert {use.codec for use in optimizer.pager.usage()} == {"int8_rotated"}
    torch.manual_seed(1)
    model = create_optimized_model(config, settings(tmp_path, codec="none"))
    logits = model(**tiny.cases()["image"]).logits
    assert torch.isfinite(logits).all() and logits.std() > 0
    model.memory_optimizer.close()


@torch.no_grad()
def test_takes_a_hub_id(tmp_path, monkeypatch):
    """The real code path, on a hub cache laid out as `huggingface_hub` does."""
    cache = tmp_path / "hub"
    folder = cache / "models--someone--tiny-qwen3vl"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(tiny.DIRECTORY, folder / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(cache))
    model = create_optimized_model("someone/tiny-qwen3vl", settings(tmp_path, codec="none"))
    inputs = tiny.cases()["text"]
    assert torch.equal(model(**inputs).logits, tiny.reference()(**inputs).logits)
    model.memory_optimizer.close()
    with pytest.raises(CheckpointError, match="someone/else"):
        create_optimized_model("someone/else", settings(tmp_path))


def test_only_large_matrices_are_managed_and_tied_weights_are_one(tmp_path):
    model = create_optimized_model(tiny.DIRECTORY, settings(tmp_path))
    head, embedding = model.lm_head.weight, model.get_input_embeddings().weight
    assert isinstance(head, ManagedTensor) and head is embedding
    assert not isinstance(model.model.language_model.norm.weight, ManagedTensor)
    assert head.dtype == model.dtype == torch.float32
    model.memory_optimizer.close()


def test_the_packed_checkpoint_is_valid_safetensors_and_complete(tmp_path):
    packed = pack_checkpoint(tiny.DIRECTORY, config=MemoryConfig(cache_dir=tmp_path))
    assert {"config.json", "tokenizer.json", "preprocessor_config.json"} <= {path.name for path in packed.iterdir()}
    original = tiny.reference().state_dict()
    with safe_open(packed / "model.safetensors", "pt") as file:
        for name in file.keys():
            if name.endswith(".scale"):
                weight = name.removesuffix(".scale")
                decoded = file.get_tensor(weight).float() * file.get_tensor(name)[:, None]
                error = (decoded.view(original[weight].shape) - original[weight]).norm() / original[weight].norm()
                assert error < 0.01, (weight, error)
    for extent in Checkpoint.open(packed).tensors.values():
        assert extent.offset_bytes % 4096 == 0
    # A second call does nothing, and the packed directory is a model directory of its own.
    before = (packed / "model.safetensors").stat().st_mtime_ns
    assert pack_checkpoint(tiny.DIRECTORY, config=MemoryConfig(cache_dir=tmp_path)) == packed
    assert (packed / "model.safetensors").stat().st_mtime_ns == before
    model = create_optimized_model(packed, settings(tmp_path, tensor_budget="2MB"))
    model.memory_optimizer.close()


def test_nothing_is_written_without_a_lossy_codec(tmp_path):
    model = create_optimized_model(tiny.DIRECTORY, settings(tmp_path, codec="none"))
    model.memory_optimizer.close()
    assert not (tmp_path / "cache" / "packed").exists()


def test_refuses_a_process_budget_that_cannot_work(tmp_path):
    with pytest.raises(MemoryBudgetExceeded, match="at least") as caught:
        create_optimized_model(tiny.DIRECTORY, settings(tmp_path, ram_budget="300MB"))
    assert caught.value.requested_bytes > caught.value.budget_bytes == 300_000_000
    assert not (tmp_path / "cache").exists()


def test_refuses_a_tensor_budget_that_cannot_work(tmp_path):
    with pytest.raises(MemoryBudgetExceeded) as caught:
        create_optimized_model(tiny.DIRECTORY, settings(tmp_path, tensor_budget="200kB"))
    assert caught.value.budget_bytes == 200_000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: os.truncate(d / "model.safetensors", 5_000_000), "incomplete|shorter|damaged"),
        (lambda d: (d / "model.safetensors").write_bytes(b"not safetensors at all"), "damaged|not"),
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "model.safetensors").unlink(), "safetensors"),
        (
            lambda d: (d / "config.json").write_text(
                json.dumps({"model_type": "bert", "architectures": ["BertModel"]})
            ),
            "does not generate text",
        ),
        (lambda d: (d / "config.json").write_text('{"model_type": "no-such-model"}'), "no-such-model"),
    ],
    ids=["truncated", "garbage", "no config", "no weights", "wrong architecture", "unknown architecture"],
)
def test_an_unusable_checkpoint_is_a_clear_error(checkpoint, tmp_path, damage, message):
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        create_optimized_model(checkpoint, settings(tmp_path))


def test_a_missing_directory_is_a_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        create_optimized_model(tmp_path / "nowhere", settings(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_directory_is_a_clear_error(checkpoint, tmp_path):
    checkpoint.chmod(0)
    try:
        with pytest.raises(CheckpointError):
            create_optimized_model(checkpoint, settings(tmp_path))
    finally:
        checkpoint.chmod(0o700)


def test_a_missing_tensor_is_named(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.visual.blocks.0.attn.qkv.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="blocks.0.attn.qkv.weight"):
        create_optimized_model(checkpoint, settings(tmp_path))


@torch.no_grad()
def test_a_damaged_packed_file_is_reported_and_never_an_answer(tmp_path):
    packed = pack_checkpoint(tiny.DIRECTORY, config=MemoryConfig(cache_dir=tmp_path))
    extent = Checkpoint.open(packed).tensors["model.language_model.layers.2.mlp.up_proj.weight"]
    with open(extent.path, "r+b") as file:
        file.seek(extent.offset_bytes + 1000)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    model = create_optimized_model(packed, settings(tmp_path))
    for _ in range(2):
        with pytest.raises(CorruptDataError, match="layers.2.mlp.up_proj"):
            model(**tiny.cases()["text"])
    model.memory_optimizer.close()


@pytest.mark.parametrize("name", ["model.language_model.norm.weight", "model.visual.blocks.1.attn.qkv.weight.scale"])
def test_a_damaged_small_tensor_is_reported_at_loading(tmp_path, name):
    packed = pack_checkpoint(tiny.DIRECTORY, config=MemoryConfig(cache_dir=tmp_path))
    extent = Checkpoint.open(packed).tensors[name]
    with open(extent.path, "r+b") as file:
        file.seek(extent.offset_bytes + 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CorruptDataError, match=name):
        create_optimized_model(packed, settings(tmp_path))


def test_a_disk_without_room_is_a_clear_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen3_vl_memory_optimizations.storage.packed.free_disk_bytes", lambda path: 1_000_000)
    with pytest.raises(InsufficientDiskSpaceError) as caught:
        create_optimized_model(tiny.DIRECTORY, settings(tmp_path))
    assert caught.value.available_bytes == 1_000_000 < caught.value.required_bytes


PACK = """
import sys
from qwen3_vl_memory_optimizations.config import MemoryConfig
from qwen3_vl_memory_optimizations.model.checkpoint import packing
if sys.argv[3] == "slow":
    import time
    encode = packing._encoded_chunks
    def slow(*arguments):
        for chunk in encode(*arguments):
            time.sleep(0.02)
            yield chunk
    packing._encoded_chunks = slow
print(packing.pack_checkpoint(sys.argv[1], config=MemoryConfig(cache_dir=sys.argv[2])))
"""


def start_packing(cache, pace="slow"):
    return subprocess.Popen(
        [sys.executable, "-c", PACK, tiny.DIRECTORY, cache, pace], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def journal_lines(cache):
    files = list((cache / "packed").glob("*.partial/journal.jsonl"))
    return len(files[0].read_bytes().splitlines()) if files else 0


def test_a_packing_killed_midway_is_taken_up_again(tmp_path):
    whole = pack_checkpoint(tiny.DIRECTORY, config=MemoryConfig(cache_dir=tmp_path / "whole"))
    killed = tmp_path / "killed"
    process = start_packing(killed)
    deadline = time.monotonic() + 60
    while journal_lines(killed) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert journal_lines(killed) >= 10
    assert not list((killed / "packed").glob("*-int8"))
    resumed = pack_checkpoint(tiny.DIRECTORY, config=MemoryConfig(cache_dir=killed))
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert PackedEncodings.load(resumed).errors == PackedEncodings.load(whole).errors != {}


def test_two_processes_pack_the_same_model_once(tmp_path):
    processes = [start_packing(tmp_path, "fast") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    packed = outputs[0][0].decode().strip()
    Checkpoint.open(packed).check()


@torch.no_grad()
def test_an_interrupted_generation_leaves_a_usable_model(tmp_path):
    from transformers.generation.streamers import BaseStreamer

    class Interrupting(BaseStreamer):
        def __init__(self):
            self.count = 0

        def put(self, value):
            self.count += 1
            if self.count == 4:
                raise KeyboardInterrupt

        def end(self):
            return

    model = create_optimized_model(tiny.DIRECTORY, settings(tmp_path, codec="none", tensor_budget="3.6MB"))
    inputs = tiny.cases()["image"]
    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, max_new_tokens=18, min_new_tokens=18, do_sample=False, streamer=Interrupting())
    model.memory_optimizer.pager.debit("test", 0)  # runs what finalizers queued while another thread held the lock
    assert not any(page.pins for entry in model.memory_optimizer.pager.entries.values() for page in entry.pages)
    assert torch.equal(model(**inputs).logits, tiny.reference()(**inputs).logits)
    model.memory_optimizer.close()


@torch.no_grad()
def test_memory_is_set_aside_for_the_vision_tower_where_generate_runs_it(tmp_path):
    """`generate` encodes images before the forward of the model, which sets aside what its own inputs need."""
    model = create_optimized_model(tiny.DIRECTORY, settings(tmp_path, codec="none", ram_budget="4GB"))
    optimizer, reserved = model.memory_optimizer, []
    model.model.visual.register_forward_hook(
        lambda *_: reserved.append(optimizer.pager.ledger.held_bytes("activations"))
    )
    inputs = tiny.cases()["two images"]
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    patches = inputs["pixel_values"].shape[0]
    needed = vision_bytes(model.config, patches=patches, itemsize=4)
    assert reserved and min(reserved) >= needed > vision_bytes(model.config, patches=0, itemsize=4)
    model.memory_optimizer.close()


@torch.no_grad()
def test_cached_tokens_count_in_what_is_set_aside(tmp_path):
    sizes = []
    model = create_optimized_model(tiny.DIRECTORY, settings(tmp_path, codec="none"))
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(forward_size(args, kwargs)), with_kwargs=True
    )
    inputs = tiny.cases()["text"]
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    prompt = inputs["input_ids"].numel()
    assert sizes == [(1, prompt, 0), (1, 1, prompt), (1, 1, prompt + 1)]
    model.memory_optimizer.close()
