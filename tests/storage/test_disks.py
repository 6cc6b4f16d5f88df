"""Which directories are on a disk: mount tables of other machines, and the real one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from qwen3_vl_memory_optimizations.storage.disks import (
    can_hold_files,
    disks_first,
    memory_file_system,
    nearest_existing,
    swap_candidates,
)


def mount(point, kind, options="rw", *, optional=""):
    return f"36 35 98:0 / {point} rw,noatime {optional}- {kind} source {options}"


@pytest.fixture
def machine(tmp_path):
    """Return a function that makes the root of a machine with the given mounts."""

    def make(*lines):
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/mountinfo").write_text("".join(line + "\n" for line in lines))
        return root

    return make


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/mnt-none/a", None),
        ("/mnt-ram", "tmpfs"),
        ("/mnt-ram/a/b", "tmpfs"),
        ("/mnt-ram/disk/a", None),
        ("/mnt-ramp/a", None),
        ("/mnt-old/a", "ramfs"),
        ("/mnt-dev/a", "devtmpfs"),
        ("/mnt with space/a", "tmpfs"),
    ],
)
def test_the_longest_mount_point_above_a_path_decides(machine, path, name):
    root = machine(
        mount("/", "ext4", optional="shared:1 master:2 "),
        mount("/mnt-ram", "tmpfs", "rw,size=12k"),
        mount("/mnt-ram/disk", "xfs"),
        mount("/mnt-old", "ramfs"),
        mount("/mnt-dev", "devtmpfs"),
        mount(r"/mnt\040with\040space", "tmpfs"),
    )
    assert memory_file_system(path, root=root) == name


def test_the_last_mount_on_a_point_hides_the_others(machine):
    root = machine(mount("/", "rootfs"), mount("/", "ext4"), mount("/mnt-x", "ext4"), mount("/mnt-x", "tmpfs"))
    assert memory_file_system("/mnt-none", root=root) is None
    assert memory_file_system("/mnt-x/a", root=root) == "tmpfs"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("rw,lowerdir=/mnt-ram/l,upperdir=/mnt-disk/u,workdir=/mnt-ram/w", None),
        ("rw,lowerdir=/mnt-disk/l,upperdir=/mnt-ram/u,workdir=/mnt-ram/w", "overlay on tmpfs"),
        (r"rw,lowerdir=/l,upperdir=/mnt-\134,ram/u,workdir=/w", "overlay on tmpfs"),
        ("rw,lowerdir=/l,upperdir=/mnt-over/u,workdir=/w", "overlay on overlay on ramfs"),
        ("rw,lowerdir=/l,upperdir=/host/u,workdir=/w", None),  # in a container: the overlay itself holds that path
        ("ro,lowerdir=/mnt-ram/l", None),
    ],
)
def test_an_overlay_is_where_its_upper_directory_is(machine, options, name):
    root = machine(
        mount("/", "overlay", options),
        mount("/mnt-disk", "ext4"),
        mount("/mnt-ram", "tmpfs"),
        mount("/mnt-,ram", "tmpfs"),
        mount("/mnt-old", "ramfs"),
        mount("/mnt-over", "overlay", "rw,upperdir=/mnt-old/u"),
    )
    assert memory_file_system("/mnt-none/a", root=root) == name


@pytest.mark.parametrize("lines", [(), ("",), ("garbage - ", "1 2 3 - tmpfs", "36 35 98:0 / /mnt-x rw - ")])
def test_a_table_that_is_missing_or_damaged_names_nothing(machine, tmp_path, lines):
    assert memory_file_system("/mnt-x", root=machine(*lines)) is None
    assert memory_file_system("/mnt-x", root=tmp_path / "none") is None


def test_a_link_into_memory_is_followed(machine, tmp_path):
    (tmp_path / "link").symlink_to("/mnt-ram/a")
    root = machine(mount("/", "ext4"), mount("/mnt-ram", "tmpfs"))
    assert memory_file_system(tmp_path / "link" / "swap", root=root) == "tmpfs"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm")
def test_the_shared_memory_of_this_machine_is_no_disk():
    assert memory_file_system("/dev/shm/qwen3vl-mem/swap") == "tmpfs"


def test_directories_on_a_disk_come_first_and_keep_their_order(machine):
    root = machine(mount("/", "ext4"), mount("/mnt-ram", "tmpfs"), mount("/mnt-old", "ramfs"))
    ram, old, one, two = Path("/mnt-ram/a"), Path("/mnt-old/a"), Path("/mnt-one"), Path("/mnt-two")
    assert disks_first([ram, two, old, one], root=root) == [two, one, ram, old]
    assert disks_first([old, ram], root=root) == [old, ram]
    assert not ram.exists() and not two.exists()


def test_candidates_do_without_a_home_or_a_current_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/h")
    home = Path("/h/.cache/qwen3vl-mem/swap")
    assert swap_candidates(tmp_path / "base") == [tmp_path / "base/swap", home, Path("/var/tmp"), tmp_path]
    assert swap_candidates(Path("/h/.cache/qwen3vl-mem")) == [home, Path("/var/tmp"), tmp_path]

    def fail(error):
        raise error

    monkeypatch.setattr(Path, "home", lambda: fail(RuntimeError("no home")))
    monkeypatch.setattr(Path, "cwd", lambda: fail(FileNotFoundError("gone")))
    assert swap_candidates(Path("/base")) == [Path("/base/swap"), Path("/var/tmp")]


def test_where_files_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert nearest_existing("/") == Path("/")
    assert can_hold_files(tmp_path) and can_hold_files(tmp_path / "a" / "b")
    assert not can_hold_files(tmp_path / "file" / "a")
