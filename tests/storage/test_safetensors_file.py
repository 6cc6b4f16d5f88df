import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from qwen3_vl_memory_optimizations.errors import CheckpointError
from qwen3_vl_memory_optimizations.storage import TensorExtent, read_header

NUMPY_DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "I8": np.int8,
    "U8": np.uint8,
    "I64": np.int64,
    "BOOL": np.bool_,
}


def write_raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(dtype="U8", shape=(4,), span=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(NUMPY_DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
)
def test_what_the_safetensors_library_writes_is_read_back(shapes, metadata):
    tensors = {
        name: np.frombuffer(os.urandom(8 * 125), NUMPY_DTYPES[dtype])[: int(np.prod(shape))].reshape(shape)
        for name, (dtype, shape) in shapes.items()
    }
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "t.safetensors"
        save_file(tensors, path, metadata or None)
        header = read_header(path)
        content = path.read_bytes()
    assert header.metadata == metadata
    assert header.tensors.keys() == tensors.keys()
    for name, extent in header.tensors.items():
        assert (extent.name, extent.dtype, list(extent.shape)) == (name, *shapes[name])
        assert content[extent.offset_bytes : extent.offset_bytes + extent.n_bytes] == tensors[name].tobytes()
        assert (extent.checksums, extent.page_bytes) == (None, 0)


def test_offsets_count_from_the_start_of_the_file_and_tensors_come_in_their_order(tmp_path):
    path = write_raw(tmp_path / "f", {"b": entry(span=(4, 8)), "a": entry(span=(0, 4))}, bytes(8))
    header = read_header(path)
    start = path.stat().st_size - 8
    assert header.data_start_bytes == start
    assert list(header.tensors.values()) == [
        TensorExtent(path, "a", "U8", (4,), start, 4),
        TensorExtent(path, "b", "U8", (4,), start + 4, 4),
    ]


def test_types_smaller_than_a_byte(tmp_path):
    path = write_raw(tmp_path / "f", {"a": entry("F4", (8,), (0, 4)), "b": entry("F6_E2M3", (4,), (4, 7))}, bytes(7))
    assert [extent.n_bytes for extent in read_header(path).tensors.values()] == [4, 3]


BAD_HEADERS = {
    "not JSON": (b"{nope", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "too deep": (b"[" * 100_000, "not valid JSON"),
    "twice the same name": (b'{"a": 1, "a": 2}', "same name twice"),
    "a list": ([], "not a JSON object"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, "__metadata__"),
    "no fields": ({"a": 7}, "no usable dtype"),
    "negative offset": ({"a": entry(span=(-4, 0))}, "no usable dtype"),
    "true for a number": ({"a": entry(shape=(True,), span=(0, 1))}, "no usable dtype"),
    "far too many dimensions": ({"a": entry(shape=(2**62,) * 10_000)}, "no usable dtype"),
    "enormous": ({"a": entry(shape=(2**62,) * 40)}, "4 bytes"),
    "unknown type": ({"a": entry("Q7")}, "'Q7'.*Convert"),
    "end before start": ({"a": entry(span=(4, 0))}, "bytes 4 to 0"),
    "past the end": ({"a": entry(shape=(9,), span=(0, 9))}, "bytes 0 to 9.*8 bytes of data"),
    "size and shape differ": ({"a": entry(shape=(3,))}, r"4 bytes, but \[3\] of U8 needs 3"),
    "overlap": ({"a": entry(), "b": entry(span=(2, 6))}, "'a' ends at byte .* start of 'b'"),
    "nested": ({"a": entry(shape=(8,), span=(0, 8)), "b": entry(span=(2, 6))}, "'a' ends at byte"),
}


@pytest.mark.parametrize(("header", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_a_header_that_cannot_be_is_refused(tmp_path, header, message):
    path = write_raw(tmp_path / "bad.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert caught.value.path == path


@pytest.mark.parametrize("content", [b"", b"\1\0\0", (2**63).to_bytes(8, "little") + b"{}", (50).to_bytes(8, "little")])
def test_a_file_too_short_for_its_header_is_refused(tmp_path, content):
    path = tmp_path / "short"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"the file has {len(content)} bytes.*download it again"):
        read_header(path)


def test_every_truncation_of_a_file_is_noticed(tmp_path):
    save_file({"a": np.arange(10, dtype=np.float32), "b": np.ones((3, 3), np.int8)}, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    cut = tmp_path / "cut"
    for n_bytes in range(len(content)):
        cut.write_bytes(content[:n_bytes])
        with pytest.raises(CheckpointError):
            read_header(cut)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "absent")


def packed(**changes):
    metadata = {"qwen3vl_mem_format": "1", "page_bytes": '{"a":2}', "checksums": '{"a":["00ff","1"]}'}
    return {"__metadata__": metadata | changes, "a": entry(), "__pad_0": entry(span=(4, 8))}


def test_checksums_and_page_sizes_of_a_packed_file(tmp_path):
    header = read_header(write_raw(tmp_path / "f", packed(), bytes(8)))
    assert (header.tensors["a"].checksums, header.tensors["a"].page_bytes) == ((255, 1), 2)
    assert header.tensors["__pad_0"].checksums is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qwen3vl_mem_format": "2"}, "format '2', but this version reads '1'"),
        ({"checksums": "{}"}, "checksums cannot be read"),
        ({"checksums": '{"a":["00"]}'}, "1 checksums"),
        ({"checksums": '{"a":["xx","1"]}'}, "checksums cannot be read"),
        ({"checksums": '{"a":5}'}, "checksums cannot be read"),
        ({"page_bytes": '{"a":-1}'}, "checksums cannot be read"),
        ({"page_bytes": "[]"}, "checksums cannot be read"),
    ],
)
def test_a_packed_file_with_unusable_checksums_is_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message + ".*packed again"):
        read_header(write_raw(tmp_path / "f", packed(**changes), bytes(8)))
