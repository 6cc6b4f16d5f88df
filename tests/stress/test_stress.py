"""10,000 random operations from 8 threads while the SSD fails now and then; all that must hold is checked."""

import logging
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.stress.machine import N_THREADS, Machine

N_OPERATIONS = 10_000


@pytest.fixture(autouse=True)
def many_switches(caplog):
    """Threads change places often, and torch adds none of its own; nothing is logged.

    A record that is kept, as pytest does, holds its error, that holds the frames it came through, and those what they
    made: tensors would not be freed.
    """
    caplog.set_level(logging.CRITICAL, logger="qwen3_vl_memory_optimizations")
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-4)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


@pytest.fixture
def fast_directory(tmp_path):
    """Files in memory where the system has such a place: what is tested is not the speed of a disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.mark.parametrize("seed", range(3))
def test_threads_do_everything_at_once_while_the_ssd_fails(fast_directory, seed):
    machine = Machine(fast_directory, seed)
    machine.run(N_OPERATIONS // N_THREADS)
    assert not machine.failures, machine.failures[0]
    machine.close()
    done, refused = (sum(getattr(worker, name) for worker in machine.workers) for name in ("done", "refused"))
    assert done + refused == N_OPERATIONS
    assert done > N_OPERATIONS * 0.7, "most was not refused"
    assert len(machine.met) >= 8, machine.met
