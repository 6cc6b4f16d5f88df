"""10,000 random operations from 8 threads while the SSD fails now and then; all that must hold is checked."""

import sys

import pytest
import torch

from tests.stress.machine import N_THREADS, Machine

N_OPERATIONS = 10_000


@pytest.fixture(autouse=True)
def many_switches():
    """Threads change places often, and torch adds none of its own."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-4)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", range(3))
def test_threads_do_everything_at_once_while_the_ssd_fails(tmp_path, seed):
    machine = Machine(tmp_path, seed)
    machine.run(N_OPERATIONS // N_THREADS)
    assert not machine.failures, machine.failures[0]
    machine.close()
    done, refused = (sum(getattr(worker, name) for worker in machine.workers) for name in ("done", "refused"))
    assert done + refused == N_OPERATIONS
    assert done > N_OPERATIONS * 0.7, "most was not refused"
    assert len(machine.met) >= 8, machine.met
