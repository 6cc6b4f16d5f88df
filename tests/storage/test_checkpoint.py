import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from qwen3_vl_memory_optimizations.errors import CheckpointError, CorruptDataError
from qwen3_vl_memory_optimizations.storage import Checkpoint, PackedEntry, PackedLayout, PackedWriter

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.arange(5, dtype=np.int8)


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "qwen3_vl"}')
    return directory


@pytest.fixture
def single(directory):
    save_file({"a": A, "b": B}, directory / "model.safetensors", {"format": "pt"})
    return directory


def write_index(directory, file_of):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


@pytest.fixture
def sharded(directory):
    # The second shard holds an older "a" too: the index decides.
    save_file({"a": A}, directory / "model-00001-of-00002.safetensors")
    save_file({"a": A + 1, "b": B}, directory / "model-00002-of-00002.safetensors")
    write_index(directory, {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"})
    return directory


@pytest.fixture
def packed(tmp_path, directory):
    layout = PackedLayout([PackedEntry("b", "I8", (5,), 5), PackedEntry("a", "U8", (9000,), 9000, 4096)])
    with PackedWriter(tmp_path / "packed", layout, {"codec": "none"}) as writer:
        writer.open()
        writer.append("b", [B.tobytes()])
        writer.append("a", [os.urandom(9000)])
        writer.finish([directory / "config.json"])
    return tmp_path / "packed"


def read(extent):
    return extent.path.read_bytes()[extent.offset_bytes : extent.offset_bytes + extent.n_bytes]


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_open(kind, request):
    directory = request.getfixturevalue(kind)
    checkpoint = Checkpoint.open(str(directory))
    assert checkpoint.directory == directory
    assert checkpoint.config == {"model_type": "qwen3_vl"}
    assert {name: read(extent) for name, extent in checkpoint.tensors.items()} == {
        "a": A.tobytes(),
        "b": B.tobytes(),
    }
    assert checkpoint.total_bytes == A.nbytes + B.nbytes
    assert not checkpoint.packed
    checkpoint.check()


def test_metadata(single):
    assert Checkpoint.open(single).metadata == {"format": "pt"}


def test_a_packed_checkpoint_hides_its_padding_and_brings_its_checksums(packed):
    checkpoint = Checkpoint.open(packed)
    assert checkpoint.packed
    assert list(checkpoint.tensors) == ["b", "a"]
    assert checkpoint.total_bytes == 9005
    assert checkpoint.metadata["codec"] == "none"
    assert checkpoint.tensors["a"].page_bytes == 4096
    assert len(checkpoint.tensors["a"].checksums) == 3
    assert len(checkpoint.tensors["b"].checksums) == 1
    checkpoint.check()


def test_check_names_the_page_that_is_not_what_was_written(packed):
    checkpoint = Checkpoint.open(packed)
    extent = checkpoint.tensors["a"]
    status = extent.path.stat()
    with open(extent.path, "r+b") as file:
        file.seek(extent.offset_bytes + 5000)
        file.write(bytes([read(extent)[5000] ^ 1]))
    os.utime(extent.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CorruptDataError, match="page 1 of 'a'.*delete this packed checkpoint") as caught:
        checkpoint.check()
    assert caught.value.path == extent.path


def test_check_notices_files_that_were_exchanged(single):
    checkpoint = Checkpoint.open(single)
    save_file({"a": A, "b": B, "c": B}, single / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed since they were opened"):
        checkpoint.check()


def test_the_fingerprint_follows_config_headers_and_files_but_not_the_place(single, tmp_path):
    first = Checkpoint.open(single).fingerprint()
    assert first == Checkpoint.open(single).fingerprint()
    single.rename(tmp_path / "elsewhere")
    single = tmp_path / "elsewhere"
    assert Checkpoint.open(single).fingerprint() == first
    seen = {first}

    def changed():
        fingerprint = Checkpoint.open(single).fingerprint()
        is_new = fingerprint not in seen
        seen.add(fingerprint)
        return is_new

    model = single / "model.safetensors"
    os.utime(model, ns=(1, 1))
    assert changed()
    save_file({"a": A, "z": B}, model, {"format": "pt"})
    os.utime(model, ns=(1, 1))
    assert changed()
    (single / "config.json").write_text("{}")
    assert changed()


def test_links_into_a_download_cache(single, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for number, path in enumerate(list(single.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../blobs/{number}")
    checkpoint = Checkpoint.open(snapshot)
    assert read(checkpoint.tensors["a"]) == A.tobytes()
    for blob in blobs.iterdir():
        blob.unlink()
    with pytest.raises(CheckpointError, match="No such file.*download"):
        Checkpoint.open(snapshot)


def test_not_a_directory(single, tmp_path):
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint.open(single / "model.safetensors")
    with pytest.raises(CheckpointError, match="No such file"):
        Checkpoint.open(tmp_path / "absent")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_without_permission(single):
    single.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match="Permission denied; ask for read permission"):
            Checkpoint.open(single)
    finally:
        os.seteuid(0)


def test_no_configuration(single):
    (single / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(single)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_damaged_configuration(single, text):
    (single / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json.*JSON"):
        Checkpoint.open(single)


def test_no_weights(directory):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_weights_that_must_be_converted(directory, name):
    (directory / name).touch()
    with pytest.raises(CheckpointError, match=f"{name}.*save_pretrained"):
        Checkpoint.open(directory)


def test_a_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 files.*'model-00002-of-00002.safetensors'.*download"):
        Checkpoint.open(sharded)


def test_a_shard_outside_the_directory(sharded):
    write_index(sharded, {"a": "../model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match="missing"):
        Checkpoint.open(sharded)


def test_a_tensor_the_index_places_in_a_shard_that_lacks_it(sharded):
    write_index(sharded, {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"1 of 2 tensors.*'b' \(in model-00001-of-00002.safetensors\)"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{"])
def test_a_damaged_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json.*download"):
        Checkpoint.open(sharded)


def test_a_truncated_shard(sharded):
    path = sharded / "model-00001-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="download it again"):
        Checkpoint.open(sharded)
