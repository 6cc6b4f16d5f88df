import errno
import logging
import os

import pytest

from qwen3_vl_memory_optimizations.errors import InsufficientDiskSpaceError, ShortIOError, StorageError
from qwen3_vl_memory_optimizations.storage import DISK_BLOCK_BYTES, AlignedBuffer, DirectFile, direct_io


@pytest.fixture(params=["direct", "page cache"])
def mode(request, monkeypatch):
    """Run a test with direct I/O (where the disk has it) and with the fallback."""
    monkeypatch.setattr(direct_io, "_direct_by_device", {})
    if request.param == "page cache":
        monkeypatch.setattr(direct_io, "_set_direct", lambda fd, on: not on)
    return request.param


@pytest.fixture
def sample(tmp_path):
    path = tmp_path / "sample"
    path.write_bytes(os.urandom(3 * DISK_BLOCK_BYTES + 1234))
    return path


@pytest.mark.parametrize(
    ("offset", "n_bytes"),
    [(0, 1), (0, DISK_BLOCK_BYTES), (5, 10), (4090, 20), (1, 13000), (8192, 4096), (12288, 1234), (0, 13522)],
)
def test_read_into_gives_the_range_and_touches_only_whole_blocks_around_it(mode, sample, offset, n_bytes):
    content = sample.read_bytes()
    guard = DISK_BLOCK_BYTES
    with DirectFile(sample) as file, AlignedBuffer(8 * DISK_BLOCK_BYTES) as buffer:
        buffer.view[:] = b"\xee" * len(buffer.view)
        lead = offset % DISK_BLOCK_BYTES
        moved = file.read_into(buffer.address + guard + lead, offset, n_bytes)
        start = guard + lead
        assert bytes(buffer.view[start : start + n_bytes]) == content[offset : offset + n_bytes]
        end = guard + direct_io.round_up(lead + n_bytes)
        assert set(buffer.view[:guard]) == {0xEE}
        assert set(buffer.view[end:]) == {0xEE}
        assert lead + n_bytes <= moved <= direct_io.round_up(lead + n_bytes)
        assert file.size_bytes == len(content)


def test_read_bytes_gives_a_copy(mode, sample):
    with DirectFile(sample) as file:
        assert file.read_bytes(4000, 5000) == sample.read_bytes()[4000:9000]
        assert file.read_bytes(17, 0) == b""


@pytest.mark.parametrize(("offset", "n_bytes", "got"), [(0, 13523, 13522), (13000, 600, 522), (40960, 10, 0)])
def test_a_range_past_the_end_is_a_short_read_with_its_numbers(mode, sample, offset, n_bytes, got):
    with DirectFile(sample) as file, pytest.raises(ShortIOError) as caught:
        file.read_bytes(offset, n_bytes)
    assert f"{got} of {n_bytes} bytes" in str(caught.value)
    assert "13522" in str(caught.value)
    assert caught.value.path == sample


def test_read_into_refuses_an_address_that_is_not_aligned_like_the_offset(sample):
    with (
        DirectFile(sample) as file,
        AlignedBuffer(DISK_BLOCK_BYTES) as buffer,
        pytest.raises(StorageError, match="not aligned to blocks of 4096"),
    ):
        file.read_into(buffer.address + 1, 0, 1)


def test_partial_reads_are_taken_up_at_a_block_boundary(sample, monkeypatch):
    real = os.preadv
    asked = []

    def stingy(fd, buffers, offset):
        asked.append(offset)
        return (
            real(fd, [buffers[0][: DISK_BLOCK_BYTES + 512]], offset)
            if len(buffers[0]) > 6000
            else real(fd, buffers, offset)
        )

    monkeypatch.setattr(direct_io, "_set_direct", lambda fd, on: not on)
    monkeypatch.setattr(direct_io, "_direct_by_device", {})
    with DirectFile(sample) as file:
        monkeypatch.setattr(os, "preadv", stingy)
        assert file.read_bytes(0, 13522) == sample.read_bytes()
    assert asked == [0, 4096, 8192, 12288]


def test_write_and_read_back(mode, tmp_path):
    content = os.urandom(5 * DISK_BLOCK_BYTES)
    with DirectFile(tmp_path / "new", writable=True) as file, AlignedBuffer(len(content)) as buffer:
        buffer.view[:] = content
        file.write_from(buffer.address + DISK_BLOCK_BYTES, 2 * DISK_BLOCK_BYTES, 4 * DISK_BLOCK_BYTES)
        file.sync()
        assert file.size_bytes == 6 * DISK_BLOCK_BYTES
        assert file.read_bytes(2 * DISK_BLOCK_BYTES, 4 * DISK_BLOCK_BYTES) == content[DISK_BLOCK_BYTES:]
        with pytest.raises(StorageError, match="not aligned to blocks of 4096"):
            file.write_from(buffer.address, 0, 100)


def test_a_full_disk_says_what_is_needed_and_what_is_there(tmp_path, monkeypatch):
    def full(fd, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    with DirectFile(tmp_path / "new", writable=True) as file, AlignedBuffer(DISK_BLOCK_BYTES) as buffer:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(InsufficientDiskSpaceError, match="free some disk space") as caught:
            file.write_from(buffer.address, 0, DISK_BLOCK_BYTES)
    assert caught.value.required_bytes == DISK_BLOCK_BYTES
    assert caught.value.available_bytes > 0


def test_a_write_the_device_cuts_short_is_an_error(tmp_path, monkeypatch):
    with DirectFile(tmp_path / "new", writable=True) as file, AlignedBuffer(DISK_BLOCK_BYTES) as buffer:
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 100)
        with pytest.raises(ShortIOError, match="only 100 of 4096 bytes"):
            file.write_from(buffer.address, 0, DISK_BLOCK_BYTES)


def test_a_failing_device_is_a_storage_error(sample, monkeypatch):
    def broken(fd, buffers, offset):
        raise OSError(errno.EIO, "Input/output error")

    with DirectFile(sample) as file:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(StorageError, match="reading 10 bytes at offset 3 failed: Input/output error"):
            file.read_bytes(3, 10)


def test_what_cannot_be_opened_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="No such file"):
        DirectFile(tmp_path / "absent")
    with pytest.raises(StorageError, match="not a regular file"):
        DirectFile(tmp_path)


def test_without_direct_io_the_page_cache_is_used_and_it_is_said_once(sample, monkeypatch, caplog):
    monkeypatch.setattr(direct_io, "_direct_by_device", {})
    monkeypatch.setattr(direct_io, "_set_direct", lambda fd, on: not on)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            with DirectFile(sample) as file:
                assert not file.direct
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert str(sample) in caplog.text


def test_the_file_system_is_probed_once_with_a_real_read(sample, monkeypatch):
    monkeypatch.setattr(direct_io, "_direct_by_device", {})
    reads = []

    def refuse(fd, buffers, offset):
        reads.append(offset)
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        assert not DirectFile(sample).direct
        assert not DirectFile(sample).direct
    assert reads == [0]


def test_a_temporary_file_has_no_name_and_is_private(tmp_path):
    with DirectFile.temporary(tmp_path) as file:
        status = os.fstat(file.fileno())
        assert status.st_mode & 0o777 == 0o600
        assert status.st_nlink == 0
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="temporary file"):
        DirectFile.temporary(tmp_path / "absent")


def test_a_temporary_file_without_o_tmpfile(tmp_path, monkeypatch):
    real = os.open

    def without(path, flags, mode=0o777, **rest):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, mode, **rest)

    monkeypatch.setattr(os, "open", without)
    with DirectFile.temporary(tmp_path) as file:
        assert os.fstat(file.fileno()).st_mode & 0o777 == 0o600
        assert list(tmp_path.iterdir()) == []
