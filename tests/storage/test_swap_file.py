import os
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from qwen3_vl_memory_optimizations.errors import InsufficientDiskSpaceError, StorageError
from qwen3_vl_memory_optimizations.storage import DISK_BLOCK_BYTES, AlignedBuffer, SwapFile
from qwen3_vl_memory_optimizations.storage.disks import memory_file_system
from qwen3_vl_memory_optimizations.storage.swap_file import ExtentAllocator


class AllocatorMachine(RuleBasedStateMachine):
    """Any sequence of `allocate` and `free`, against a plain list of what is handed out."""

    live = Bundle("live")

    def __init__(self):
        super().__init__()
        self.allocator = ExtentAllocator()
        self.model = {}

    @rule(target=live, n_bytes=st.integers(1, 40))
    def allocate(self, n_bytes):
        before, growth = self.allocator.end_bytes, self.allocator.growth_bytes(n_bytes)
        offset = self.allocator.allocate(n_bytes)
        assert all(offset + n_bytes <= o or o + n <= offset for o, n in self.model.items())
        assert self.allocator.end_bytes == before + growth
        self.model[offset] = n_bytes
        return offset

    @rule(offset=consumes(live))
    def free(self, offset):
        assert self.allocator.size_of(offset) == self.model.pop(offset)
        self.allocator.free(offset)

    @invariant()
    def holds(self):
        self.allocator.check()
        assert self.allocator.used_bytes == sum(self.model.values())


AllocatorMachine.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestAllocator = AllocatorMachine.TestCase


def test_the_best_fitting_gap_is_taken():
    allocator = ExtentAllocator()
    offsets = [allocator.allocate(n) for n in (10, 1, 4, 1, 6, 1)]
    for index in (0, 2, 4):
        allocator.free(offsets[index])
    assert allocator.allocate(5) == offsets[4]
    assert allocator.allocate(4) == offsets[2]
    assert allocator.end_bytes == 23


def test_neighbours_are_joined():
    allocator = ExtentAllocator()
    offsets = [allocator.allocate(5) for _ in range(4)]
    for index in (0, 2, 1):
        allocator.free(offsets[index])
    assert allocator.allocate(15) == 0
    assert allocator.end_bytes == 20


def test_the_last_gap_grows():
    allocator = ExtentAllocator()
    allocator.allocate(5)
    allocator.free(allocator.allocate(5))
    assert allocator.allocate(8) == 5
    assert allocator.end_bytes == 13


@pytest.fixture
def swap(tmp_path):
    with SwapFile(tmp_path / "swap", 64 * DISK_BLOCK_BYTES) as swap:
        yield swap
        swap.check()


def test_what_is_written_is_read_back(swap):
    content = os.urandom(3 * DISK_BLOCK_BYTES)
    with AlignedBuffer(len(content)) as buffer, AlignedBuffer(len(content)) as other:
        buffer.view[:] = content
        other_offset = swap.allocate(DISK_BLOCK_BYTES)
        offset = swap.allocate(9000)
        swap.write(offset, buffer.address, 9000)
        swap.write(other_offset, other.address, DISK_BLOCK_BYTES)
        assert 9000 <= swap.read(offset, other.address, 9000) <= len(content)
        assert bytes(other.view[:9000]) == content[:9000]
    assert swap.used_bytes == 4 * DISK_BLOCK_BYTES
    swap.free(offset)
    assert swap.used_bytes == DISK_BLOCK_BYTES


def test_nothing_exists_before_the_first_extent_and_nothing_has_a_name(tmp_path):
    swap = SwapFile(tmp_path / "swap", 1 << 20)
    assert not (tmp_path / "swap").exists()
    swap.check()
    swap.allocate(1)
    assert list((tmp_path / "swap").iterdir()) == []
    status = os.fstat(swap._file.fileno())
    assert (status.st_mode & 0o777, status.st_nlink) == (0o600, 0)
    swap.close()
    swap.close()


def test_the_limit_is_kept_and_nothing_changes_when_it_is_reached(swap):
    offsets = [swap.allocate(16 * DISK_BLOCK_BYTES) for _ in range(4)]
    with pytest.raises(InsufficientDiskSpaceError, match="raise swap_size") as caught:
        swap.allocate(1)
    assert (caught.value.required_bytes, caught.value.available_bytes) == (DISK_BLOCK_BYTES, 0)
    swap.free(offsets[1])
    with pytest.raises(InsufficientDiskSpaceError) as caught:
        swap.allocate(17 * DISK_BLOCK_BYTES)
    assert caught.value.available_bytes == 16 * DISK_BLOCK_BYTES
    assert swap.allocate(16 * DISK_BLOCK_BYTES) == offsets[1]


def test_a_disk_without_room_is_noticed_before_anything_changes(swap, monkeypatch):
    swap.allocate(DISK_BLOCK_BYTES)
    real = os.statvfs

    def full(path):
        status = list(real(path))
        status[4] = 0  # blocks for unprivileged users
        return os.statvfs_result(status)

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", full)
        with pytest.raises(InsufficientDiskSpaceError, match="free some disk space, or set swap_dir"):
            swap.allocate(DISK_BLOCK_BYTES)
    assert swap.used_bytes == DISK_BLOCK_BYTES
    assert swap.allocate(DISK_BLOCK_BYTES) == DISK_BLOCK_BYTES


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be created"):
        SwapFile(tmp_path / "file" / "swap", 1 << 20).allocate(1)


def test_threads_keep_their_extents_apart(tmp_path):
    failures = []
    with SwapFile(tmp_path, 256 * DISK_BLOCK_BYTES) as swap:

        def work(number):
            with AlignedBuffer(3 * DISK_BLOCK_BYTES) as buffer:
                for turn in range(25):
                    n_bytes = DISK_BLOCK_BYTES * (1 + (number + turn) % 3)
                    mark = bytes([(number * 25 + turn) % 256]) * n_bytes
                    offset = swap.allocate(n_bytes)
                    buffer.view[:n_bytes] = mark
                    swap.write(offset, buffer.address, n_bytes)
                    buffer.view[:n_bytes] = bytes(n_bytes)
                    swap.read(offset, buffer.address, n_bytes)
                    if bytes(buffer.view[:n_bytes]) != mark:
                        failures.append((number, turn))
                    swap.free(offset)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert swap.used_bytes == 0
        swap.check()


# --- where it lies, and how large it may become -------------------------------------------------------------------


def with_free_disk(monkeypatch, n_bytes):
    real = os.statvfs

    def statvfs(path):
        status = list(real(path))
        status[1], status[4] = 1, n_bytes() if callable(n_bytes) else n_bytes
        return os.statvfs_result(status)

    monkeypatch.setattr(os, "statvfs", statvfs)


def test_the_directory_is_private(tmp_path):
    with SwapFile(tmp_path / "a" / "swap", 1 << 20) as swap:
        swap.allocate(1)
    assert (tmp_path / "a" / "swap").stat().st_mode & 0o777 == 0o700


def test_the_next_directory_is_used_with_one_warning_where_one_refuses(tmp_path, caplog):
    (tmp_path / "file").touch()
    refusing, good = tmp_path / "file" / "swap", tmp_path / "good"
    with SwapFile([refusing, good]) as swap:
        assert swap.directory == good and swap.free_bytes > 0 and not good.exists()
        swap.allocate(1)
        swap.allocate(1)
        assert swap.directory == good
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(refusing) in caplog.text and "next directory" in caplog.text


def test_without_any_directory_the_error_says_what_to_set(tmp_path):
    (tmp_path / "file").touch()
    with SwapFile([tmp_path / "file" / "a", tmp_path / "file" / "b"]) as swap:
        assert swap.free_bytes == 0
        with pytest.raises(
            StorageError, match=r"file/a: cannot be created: .*file/b: cannot be created: .*set swap_dir"
        ):
            swap.allocate(1)
        (tmp_path / "file").unlink()
        assert swap.allocate(1) == 0, "it is tried again"


@pytest.mark.skipif(memory_file_system("/dev/shm") != "tmpfs", reason="needs a tmpfs")
def test_a_swap_file_in_memory_is_warned_of(caplog):
    with SwapFile("/dev/shm", 1 << 20) as swap:
        assert not caplog.records
        swap.allocate(1)
    assert "/dev/shm: the swap file is on tmpfs" in caplog.text and "set swap_dir" in caplog.text


def test_free_bytes_is_what_the_limit_and_the_disk_leave(tmp_path, monkeypatch):
    free = 100 * DISK_BLOCK_BYTES
    with monkeypatch.context() as patch, SwapFile(tmp_path, 64 * DISK_BLOCK_BYTES) as swap:
        with_free_disk(patch, lambda: free)
        assert swap.free_bytes == 64 * DISK_BLOCK_BYTES
        offset = swap.allocate(16 * DISK_BLOCK_BYTES)
        assert swap.free_bytes == 48 * DISK_BLOCK_BYTES
        with AlignedBuffer(16 * DISK_BLOCK_BYTES) as buffer:
            buffer.view[:] = os.urandom(16 * DISK_BLOCK_BYTES)
            swap.write(offset, buffer.address, 16 * DISK_BLOCK_BYTES)
        free = 3 * DISK_BLOCK_BYTES
        assert swap.free_bytes == 3 * DISK_BLOCK_BYTES
        swap.free(offset)
        assert swap.free_bytes == 19 * DISK_BLOCK_BYTES, "what the file has already is free for the next extent"
    assert swap.free_bytes == 0


def test_without_a_limit_four_fifths_of_the_free_disk_are_taken(tmp_path, monkeypatch):
    free = 100 * DISK_BLOCK_BYTES
    with monkeypatch.context() as patch, SwapFile(tmp_path) as swap:
        with_free_disk(patch, lambda: free)
        assert swap.free_bytes == 80 * DISK_BLOCK_BYTES
        swap.allocate(70 * DISK_BLOCK_BYTES)
        with pytest.raises(InsufficientDiskSpaceError, match="80% of what was free.*swap_size, or free some") as caught:
            swap.allocate(11 * DISK_BLOCK_BYTES)
        assert caught.value.available_bytes == swap.free_bytes == 10 * DISK_BLOCK_BYTES
        free = 200 * DISK_BLOCK_BYTES
        swap.allocate(11 * DISK_BLOCK_BYTES)
        swap.check()
