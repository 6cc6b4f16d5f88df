import errno
import json
import os
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qwen3_vl_memory_optimizations.errors import InsufficientDiskSpaceError, ShortIOError, StorageError
from qwen3_vl_memory_optimizations.storage import (
    DISK_BLOCK_BYTES,
    Checkpoint,
    PackedEntry,
    PackedLayout,
    PackedWriter,
    packed,
    read_header,
)

RNG = np.random.default_rng(0)
TENSORS = {
    "w": RNG.integers(0, 256, (100, 77), dtype=np.uint8),
    "empty": np.zeros((0, 3), np.float32),
    "scale": RNG.random(2048, dtype=np.float32),
    "scalar": np.array(3.5, np.float32),
}
DTYPES = {"w": "U8", "empty": "F32", "scale": "F32", "scalar": "F32"}
PAGES = {"w": 4096, "empty": 4096, "scale": 0, "scalar": 0}


def layout_of(names=tuple(TENSORS)):
    return PackedLayout(
        PackedEntry(name, DTYPES[name], TENSORS[name].shape, TENSORS[name].nbytes, PAGES[name]) for name in names
    )


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    return path


def write_all(final_dir, config, order=tuple(TENSORS), metadata=None):
    with PackedWriter(final_dir, layout_of(), metadata or {"source": "x"}) as writer:
        done = writer.open()
        for name in order:
            if name not in done:
                writer.append(name, [TENSORS[name].tobytes()])
        writer.finish([config])
    return final_dir / "model.safetensors"


def test_the_result_is_a_safetensors_file_in_order_and_on_block_boundaries(tmp_path, config):
    path = write_all(tmp_path / "out", config)
    with safe_open(path, "np") as file:
        for name, tensor in TENSORS.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor)
        assert file.metadata()["source"] == "x"
    header = read_header(path)
    assert header.data_start_bytes % DISK_BLOCK_BYTES == 0
    assert path.stat().st_size % DISK_BLOCK_BYTES == 0
    tensors = {name: e for name, e in header.tensors.items() if not name.startswith("__pad_")}
    assert list(tensors) == list(TENSORS)
    assert all(extent.offset_bytes % DISK_BLOCK_BYTES == 0 for extent in tensors.values())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "out"]


def test_checksums_are_xxh3_of_each_page(tmp_path, config):
    tensors = read_header(write_all(tmp_path / "out", config)).tensors
    for name, tensor in TENSORS.items():
        data, page = tensor.tobytes(), PAGES[name] or max(tensor.nbytes, 1)
        pages = [data[i : i + page] for i in range(0, len(data), page)] or [b""]
        assert tensors[name].checksums == tuple(xxhash.xxh3_64_intdigest(part) for part in pages)
        assert tensors[name].page_bytes == PAGES[name]


def test_the_order_of_writing_does_not_matter(tmp_path, config):
    first = write_all(tmp_path / "one", config)
    second = write_all(tmp_path / "two", config, order=tuple(reversed(TENSORS)))
    assert first.read_bytes() == second.read_bytes()


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 20_000), st.sampled_from([0, 1000, 4096, 8192])), max_size=5),
    st.lists(st.integers(1, 9000), min_size=1, max_size=4),
    st.sampled_from([4096, 12288]),
)
def test_any_sizes_pages_and_pieces_round_trip(sizes, piece_sizes, bounce_bytes):
    entries = [PackedEntry(f"t{i}", "U8", (n,), n, page) for i, (n, page) in enumerate(sizes)]
    data = {entry.name: os.urandom(entry.n_bytes) for entry in entries}

    def pieces(content):
        position, turn = 0, 0
        while position < len(content):
            size = piece_sizes[turn % len(piece_sizes)]
            yield memoryview(content)[position : position + size]
            position, turn = position + size, turn + 1

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(packed, "_BOUNCE_BYTES", bounce_bytes)
        final = Path(directory) / "out"
        (Path(directory) / "config.json").write_text("{}")
        with PackedWriter(final, PackedLayout(entries), {}) as writer:
            writer.open()
            for name, content in data.items():
                writer.append(name, pieces(content))
            writer.finish([Path(directory) / "config.json"])
        checkpoint = Checkpoint.open(final)
        checkpoint.check()
        with safe_open(final / "model.safetensors", "np") as file:
            assert {name: file.get_tensor(name).tobytes() for name in checkpoint.tensors} == data


def test_chunks_of_other_formats(tmp_path):
    with PackedWriter(tmp_path / "out", PackedLayout([PackedEntry("a", "F32", (4, 2), 32)]), {}) as writer:
        writer.open()
        content = np.arange(8, dtype=np.float32).reshape(4, 2)
        writer.append("a", [memoryview(content[:2]), memoryview(content[2:2]), bytearray(content[2:].tobytes())])
        writer.finish()
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("a"), content)


@pytest.mark.parametrize(("given_bytes", "said"), [(31, "31 bytes"), (33, "at least 33 bytes"), (9000, "at least")])
def test_a_wrong_number_of_bytes_is_refused_and_not_taken_for_written(tmp_path, given_bytes, said):
    layout = PackedLayout([PackedEntry("a", "U8", (32,), 32), PackedEntry("b", "U8", (8,), 8)])
    with PackedWriter(tmp_path / "out", layout, {}) as writer:
        writer.open()
        writer.append("b", [b"12345678"])
        with pytest.raises(ShortIOError, match=f"{said}.*'a'.*32"):
            writer.append("a", [bytes(given_bytes)])
    with PackedWriter(tmp_path / "out", layout, {}) as writer:
        assert writer.open() == {"b"}


def test_unfinished_work_is_never_taken_for_a_checkpoint(tmp_path, config):
    with PackedWriter(tmp_path / "out", layout_of(), {}) as writer:
        writer.open()
        for name in TENSORS:
            writer.append(name, [TENSORS[name].tobytes()])
    assert not (tmp_path / "out").exists()
    with pytest.raises(StorageError):
        read_header(tmp_path / "out.partial" / "model.safetensors")


def interrupted(tmp_path, count=2, metadata=None):
    with PackedWriter(tmp_path / "out", layout_of(), metadata or {"source": "x"}) as writer:
        writer.open()
        for name in list(TENSORS)[:count]:
            writer.append(name, [TENSORS[name].tobytes()])
    return tmp_path / "out.partial"


def test_taking_up(tmp_path, config):
    interrupted(tmp_path)
    with PackedWriter(tmp_path / "out", layout_of(), {"source": "x"}) as writer:
        assert writer.open() == {"w", "empty"}
    taken_up = write_all(tmp_path / "out", config)
    assert taken_up.read_bytes() == write_all(tmp_path / "whole", config).read_bytes()


@pytest.mark.parametrize("tail", [b'{"name":"scal', b'{"name":"scale"}\n', b"\0\0\0\n", b'{"name":"sc\n\n'])
def test_a_torn_last_line_of_the_journal_is_ignored_and_cut_off(tmp_path, config, tail):
    journal = interrupted(tmp_path) / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + tail)
    with PackedWriter(tmp_path / "out", layout_of(), {"source": "x"}) as writer:
        assert writer.open() == {"w", "empty"}
        assert journal.read_bytes() == whole
    assert write_all(tmp_path / "out", config).read_bytes() == write_all(tmp_path / "whole", config).read_bytes()


def test_every_cut_of_the_journal_leads_to_the_same_file(tmp_path, config):
    whole = write_all(tmp_path / "whole", config).read_bytes()
    journal_bytes = (interrupted(tmp_path, 4) / "journal.jsonl").read_bytes()
    for n_bytes in range(0, len(journal_bytes) + 1, 29):
        (interrupted(tmp_path, 4) / "journal.jsonl").write_bytes(journal_bytes[:n_bytes])
        out = write_all(tmp_path / "out", config)
        assert out.read_bytes() == whole
        for path in (tmp_path / "out").iterdir():
            path.unlink()


@pytest.mark.parametrize("change", ["metadata", "layout", "model missing", "model truncated", "journal missing"])
def test_what_cannot_be_taken_up_is_started_over(tmp_path, config, change):
    partial = interrupted(tmp_path)
    layout, metadata = layout_of(), {"source": "x"}
    if change == "metadata":
        metadata = {"source": "y"}
    elif change == "layout":
        layout = layout_of(("scale", "w", "empty", "scalar"))
    elif change == "model missing":
        (partial / "model.safetensors").unlink()
    elif change == "model truncated":
        os.truncate(partial / "model.safetensors", 5000)
    else:
        (partial / "journal.jsonl").unlink()
    with PackedWriter(tmp_path / "out", layout, metadata) as writer:
        assert writer.open() == set()
        for name in layout.entries:
            writer.append(name, [TENSORS[name].tobytes()])
        writer.finish([config])
    Checkpoint.open(tmp_path / "out").check()


def test_a_failure_while_finishing_can_be_taken_up(tmp_path, config):
    interrupted(tmp_path, 4)
    with PackedWriter(tmp_path / "out", layout_of(), {"source": "x"}) as writer:
        writer.open()
        with pytest.raises(StorageError, match="absent.*No such file"):
            writer.finish([config, tmp_path / "absent"])
    assert not (tmp_path / "out").exists()
    assert write_all(tmp_path / "out", config).read_bytes() == write_all(tmp_path / "whole", config).read_bytes()


def test_a_directory_that_is_there_already_is_left_alone(tmp_path, config):
    write_all(tmp_path / "out", config)
    with PackedWriter(tmp_path / "out", layout_of(), {}) as writer, pytest.raises(StorageError, match="exists already"):
        writer.open()
    assert not (tmp_path / "out.partial").exists()


def test_links_are_copied_as_files(tmp_path):
    (tmp_path / "blob").write_text('{"from": "blob"}')
    (tmp_path / "config.json").symlink_to("blob")
    write_all(tmp_path / "out", tmp_path / "config.json")
    copy = tmp_path / "out" / "config.json"
    assert not copy.is_symlink()
    assert json.loads(copy.read_text()) == {"from": "blob"}


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    real = os.statvfs

    def nearly_full(path):
        status = list(real(path))
        status[1], status[4] = 4096, 3  # fragment size, blocks for unprivileged users
        return os.statvfs_result(status)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    layout = PackedLayout([PackedEntry("a", "U8", (100_000,), 100_000)])
    with PackedWriter(tmp_path / "sub" / "out", layout, {}) as writer:
        with pytest.raises(InsufficientDiskSpaceError, match="12.3 kB.*free some disk space, or choose") as caught:
            writer.open()
    assert caught.value.available_bytes == 12288
    assert 100_000 < caught.value.required_bytes < 120_000
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_is_written_and_says_where(tmp_path, config, monkeypatch):
    def full(fd, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    interrupted(tmp_path)
    with PackedWriter(tmp_path / "out", layout_of(), {"source": "x"}) as writer:
        writer.open()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(InsufficientDiskSpaceError, match=r"run it again: it resumes .*out\.partial"):
                writer.append("scale", [TENSORS["scale"].tobytes()])
        writer.append("scale", [TENSORS["scale"].tobytes()])
    assert write_all(tmp_path / "out", config).read_bytes() == write_all(tmp_path / "whole", config).read_bytes()


def test_a_journal_line_that_does_not_fit_leaves_no_trace(tmp_path, config, monkeypatch):
    partial = interrupted(tmp_path)
    before = (partial / "journal.jsonl").read_bytes()
    real = os.write
    with PackedWriter(tmp_path / "out", layout_of(), {"source": "x"}) as writer:
        writer.open()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
            with pytest.raises(InsufficientDiskSpaceError):
                writer.append("scale", [TENSORS["scale"].tobytes()])
        assert (partial / "journal.jsonl").read_bytes() == before


def test_memory_stays_within_the_bounce_buffer(tmp_path):
    n_bytes = 40 << 20
    chunk = bytes(1 << 20)
    with PackedWriter(tmp_path / "out", PackedLayout([PackedEntry("a", "U8", (n_bytes,), n_bytes)]), {}) as writer:
        writer.open()
        tracemalloc.start()
        try:
            writer.append("a", (chunk for _ in range(40)))
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak_bytes < 1 << 20  # the buffer itself is mapped, not counted here
