import os

import pytest

from qwen3_vl_memory_optimizations.errors import InsufficientDiskSpaceError, StorageError
from qwen3_vl_memory_optimizations.storage import (
    DirectFile,
    direct_io,
    measure_read_bandwidth,
    measure_scratch_bandwidth,
)

MIB = 1 << 20


class Clock:
    """Half a second passes between two looks."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        self.now_s += 0.5
        return self.now_s


@pytest.fixture
def reads(monkeypatch):
    seen = []
    real = DirectFile.read_into

    def record(self, address, offset_bytes, n_bytes):
        seen.append((offset_bytes, n_bytes))
        return real(self, address, offset_bytes, n_bytes)

    monkeypatch.setattr(DirectFile, "read_into", record)
    return seen


def test_a_small_file_is_read_once_as_a_whole(tmp_path, reads):
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * MIB + 5))
    assert measure_read_bandwidth(path, request_bytes=MIB, clock=Clock()) == (3 * MIB + 5) / 0.5
    assert sorted(reads) == [(0, MIB), (MIB, MIB), (2 * MIB, MIB), (3 * MIB, 5)]


def test_of_a_large_file_parts_at_random_are_read(tmp_path, reads):
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 64 * MIB)
    assert measure_read_bandwidth(path, request_bytes=MIB, total_bytes=4 * MIB, clock=Clock()) == 4 * MIB / 0.5
    offsets = [offset for offset, _ in reads]
    assert len(set(offsets)) == 4
    assert all(offset % MIB == 0 for offset in offsets)
    assert sorted(offsets) != [0, MIB, 2 * MIB, 3 * MIB]


def test_without_direct_io(tmp_path, monkeypatch):
    monkeypatch.setattr(direct_io, "_direct_by_device", {})
    monkeypatch.setattr(direct_io, "_set_direct", lambda fd, on: not on)
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    assert measure_read_bandwidth(path, clock=Clock()) == 200


def test_what_cannot_be_measured(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(StorageError, match="nothing to measure"):
        measure_read_bandwidth(tmp_path / "empty")
    with pytest.raises(StorageError, match="No such file"):
        measure_read_bandwidth(tmp_path / "absent")


def test_scratch_leaves_nothing_behind(tmp_path):
    assert measure_scratch_bandwidth(tmp_path, request_bytes=MIB, total_bytes=4 * MIB) > 0
    assert list(tmp_path.iterdir()) == []


def test_scratch_needs_room(tmp_path):
    with pytest.raises(InsufficientDiskSpaceError):
        measure_scratch_bandwidth(tmp_path, total_bytes=1 << 60)
    assert list(tmp_path.iterdir()) == []
