"""What the stress test checks can fail: something is damaged, and it is seen."""

import threading

import pytest
import torch

from qwen3_vl_memory_optimizations.pools import UNIT_BYTES
from tests.paging.weights import random_weights, register, run_pass, settle
from tests.stress.contents import content
from tests.stress.machine import Hung, Machine
from tests.stress.work import KIB, Own

MIB = 2**20


@pytest.fixture
def pager(make_optimizer, tmp_path):
    """Weights, a tensor in memory, one in the swap file and one on both."""
    optimizer = make_optimizer(8 * MIB)
    pager = optimizer.pager
    run_pass(register(pager, random_weights(4), tmp_path / "w.safetensors"))
    tensors = [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in "abc"]
    for tensor in tensors[1:]:
        pager.runtime.send_out(tensor.tensor_id)
    settle(pager)
    tensors[2].sum()
    settle(pager)
    pager.check()
    pager.tensors = tensors
    yield pager
    optimizer.close()


def resident(pager):
    return pager.tensors[0].entry.pages[0]


def swapped(pager):
    return pager.tensors[1].entry.pages[0]


def on_both(pager):
    return pager.tensors[2].entry.pages[0]


def free_too(pager, address):
    pager.frames._free[address // UNIT_BYTES] = (address, 0.0)


COUNTERS = ["moving", "leaving_bytes", "ahead_bytes", "weights_resident_bytes", "untouched_bytes"]
DAMAGE = {
    "frames": lambda pager: setattr(pager.frames, "used_bytes", pager.frames.used_bytes + 4096),
    "missing": lambda pager: setattr(pager.tensors[0].entry, "missing", 1),
    "pins below zero": lambda pager: setattr(resident(pager), "pins", -1),
    "pinned and away": lambda pager: setattr(swapped(pager), "pins", 1),
    "dirty and away": lambda pager: setattr(swapped(pager), "dirty", True),
    "nowhere": lambda pager: setattr(swapped(pager), "swap_offset", None),
    "an extent of nobody": lambda pager: pager._swap.allocate(4096),
    "an extent of two": lambda pager: setattr(on_both(pager), "swap_offset", swapped(pager).swap_offset),
    "an extent that was freed": lambda pager: pager._swap.free(on_both(pager).swap_offset),
    "a frame that is free and in use": lambda pager: free_too(pager, resident(pager).frames_start),
} | {name: lambda pager, name=name: setattr(pager._mover, name, getattr(pager._mover, name) + 1) for name in COUNTERS}


@pytest.mark.parametrize("what", DAMAGE)
def test_the_pager_sees_what_does_not_agree(pager, what):
    before = (pager.frames.used_bytes, pager.tensors[0].entry.missing)
    saved = [
        (page, page.pins, page.dirty, page.swap_offset)
        for page in map(lambda f: f(pager), (resident, swapped, on_both))
    ]
    free, counters = dict(pager.frames._free), {name: getattr(pager._mover, name) for name in COUNTERS}
    extents = set(pager._swap.extents())
    DAMAGE[what](pager)
    with pytest.raises(AssertionError):
        pager.check()
    pager.frames.used_bytes, pager.tensors[0].entry.missing = before
    for page, pins, dirty, offset in saved:
        page.pins, page.dirty, page.swap_offset = pins, dirty, offset
    pager.frames._free = free
    for name, value in counters.items():
        setattr(pager._mover, name, value)
    for offset in set(pager._swap.extents()) - extents:
        pager._swap.free(offset)
    for page, *_, offset in saved:
        if offset is not None and offset not in pager._swap.extents():
            page.swap_offset = pager._swap.allocate(page.n_bytes)
    pager.check()


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path, seed=0, rate=0.0)
    worker = machine.workers[0]
    worker.own.append(Own(machine.optimizer.allocate_tensor((20 * KIB,), torch.uint8), 20 * KIB))
    worker.own[0].tensor.copy_(content(5, 20 * KIB))
    worker.own[0].seed = 5
    machine.optimizer.cache.put("0" * 64, worker.item(0), saved_s=1.0)
    machine.check()
    yield machine
    machine.optimizer.close()


def write_behind_its_back(machine):
    machine.workers[0].own[0].entry.lease()[0][100] ^= 1


def move_a_view(machine):
    own = machine.workers[0].own[0]
    own.views.append((own.tensor.view(-1), own.entry.address + 4096))


def forget_a_tensor(machine):
    machine.kept = machine.workers[0].own.pop().tensor


def damage_an_entry(machine):
    (path,) = machine.optimizer.cache.l3_cache.store_files._files()
    path.unlink()


WRONG = {
    "an account": lambda machine: machine.optimizer.pager.ledger.add("somebody", 1),
    "an account of the cache": lambda machine: machine.optimizer.pager.ledger.add("cache", 1),
    "bytes of the cache": lambda machine: setattr(machine.optimizer.cache.l2_cache, "_used_bytes", 1),
    "a pool": lambda machine: machine.optimizer.pool.pools["general"].allocate(100),
    "a tensor of nobody": forget_a_tensor,
    "the limit": lambda machine: setattr(machine.optimizer.pager.frames, "limit_bytes", 1 << 40),
    "the order of leaving": lambda machine: machine.optimizer.swapping.algorithm.n_bytes.update(nobody=5),
    "contents": write_behind_its_back,
    "an address": move_a_view,
    "a file of the store": damage_an_entry,
}


@pytest.mark.parametrize("what", WRONG)
def test_the_machine_sees_what_is_wrong(machine, what):
    WRONG[what](machine)
    with pytest.raises(AssertionError):
        machine.check()
    machine.optimizer.swapping.algorithm.n_bytes.pop("nobody", None)


def test_threads_that_hang_are_shown_and_do_not_hang_the_test(tmp_path):
    machine, never = Machine(tmp_path, seed=0), threading.Event()
    for worker in machine.workers:
        worker.operations = [never.wait]
    with pytest.raises(Hung, match=r"threading.py.* in wait\n.*work.py.* in step"):
        machine.run(10, timeout_s=0.5)
    never.set()
    machine.optimizer.close()
