"""Threads do all at once what the Pager does, while the SSD fails now and then; plain tensors say what is right."""

import gc
import itertools
import random
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations import MemoryBudgetExceeded, ShortIOError, StorageError, TensorFreedError
from tests.paging.weights import COLUMNS, FRAMES_BYTES, random_weights, register, settle

N_THREADS, N_STEPS = 8, 150
KIB = 2**10
BUDGET_BYTES = 4 * FRAMES_BYTES + 600 * KIB
REFUSALS = (MemoryBudgetExceeded, StorageError)


class Worker:
    """One thread: random operations, some tensors of its own."""

    def __init__(self, number, optimizer, managed, weights):
        self.number, self.optimizer, self.managed, self.weights = number, optimizer, managed, weights
        self.random = random.Random(number)
        self.own, self.views = [], []
        self.failures, self.refused, self.done = [], 0, 0
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        operations = [
            self.linear, self.linear, self.linear, self.embed, self.view, self.allocate, self.allocate, self.write,
            self.check_own, self.let_go, self.let_go, self.reserve, self.figures, self.cycle,
        ]  # fmt: skip
        try:
            for _ in range(N_STEPS):
                try:
                    self.random.choice(operations)()
                    self.done += 1
                except REFUSALS:
                    self.refused += 1
        except TensorFreedError:
            if not self.optimizer.pager._mover.closed:
                self.failures.append("freed, and not closed")
        except BaseException as error:
            self.failures.append(error)
        finally:
            self.own.clear()
            self.views.clear()

    def expect(self, what, found, expected):
        if not torch.equal(found, expected):
            self.failures.append(what)

    def linear(self):
        name = self.random.choice(list(self.managed))
        x = torch.full((1, COLUMNS), 1.0 + self.number).bfloat16()
        torch.testing.assert_close(F.linear(x, self.managed[name]), F.linear(x, self.weights[name]))

    def embed(self):
        indices = torch.tensor([self.random.randrange(256)])
        found = F.embedding(indices, self.managed["table"])
        self.expect("embedding", found, self.weights["table"][indices])

    def view(self):
        name = self.random.choice(list(self.managed))
        view = self.managed[name].view(-1)
        self.views.append(view)
        self.expect(f"view {name}", view, self.weights[name].view(-1))
        if self.random.random() < 0.8:
            self.views.clear()

    def allocate(self):
        value = self.random.randrange(1, 250)
        self.own.append((self.optimizer.allocate_tensor((self.random.choice([5, 20, 120]) * KIB,), torch.uint8), 0))
        self.own[-1][0].fill_(value)
        self.own[-1] = (self.own[-1][0], value)

    def write(self):
        if self.own:
            index, value = self.random.randrange(len(self.own)), self.random.randrange(1, 250)
            self.own[index][0].fill_(value)
            self.own[index] = (self.own[index][0], value)

    def check_own(self):
        for tensor, value in self.own:
            self.expect(tensor.tensor_id, tensor.clone(), torch.full(tensor.shape, value, dtype=torch.uint8))

    def let_go(self):
        if self.own:
            self.own.pop(self.random.randrange(len(self.own)))

    def reserve(self):
        pager = self.optimizer.pager
        with pager._lock:
            pager.ledger.set(f"thread {self.number}", self.random.choice([0, 8, 16]) * KIB)
        pager.refit()

    def figures(self):
        self.optimizer.get_memory_efficiency_stats()
        if self.random.random() < 0.2:
            self.optimizer.pager.trim()

    def cycle(self):
        """Leave a tensor and a view of it to the collector."""
        held = [self.optimizer.allocate_tensor((4 * KIB,), torch.uint8)]
        held += [held[0].view(-1), held]
        del held
        if self.random.random() < 0.3:
            gc.collect()


def fail_now_and_then(monkeypatch, owner, name, every):
    """Let one in `every` calls fail."""
    real, count = getattr(owner, name), itertools.count(1)

    def call(*args):
        if next(count) % every == 0:
            raise ShortIOError("injected", path="nowhere")
        return real(*args)

    monkeypatch.setattr(owner, name, call)


@pytest.fixture(autouse=True)
def switch_threads_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("closing", [False, True])
def test_threads_do_everything_at_once_while_the_ssd_fails(make_optimizer, tmp_path, monkeypatch, closing):
    weights = {**random_weights(8), "table": torch.randn(256, COLUMNS).bfloat16()}
    optimizer = make_optimizer(BUDGET_BYTES)
    pager = optimizer.pager
    managed = register(pager, weights, tmp_path / "w.safetensors", rows_per_page=16, checksums=True)
    file = managed["w0"].entry.source.file
    for owner, name, every in (
        (file, "read_into", 37), (file, "read_bytes", 23), (pager._swap, "read", 41), (pager._swap, "write", 29),
    ):  # fmt: skip
        fail_now_and_then(monkeypatch, owner, name, every)
    workers = [Worker(number, optimizer, managed, weights) for number in range(N_THREADS)]
    for worker in workers:
        worker.thread.start()
    if closing:
        while sum(worker.done for worker in workers) < N_THREADS * N_STEPS // 4:
            workers[0].thread.join(0.01)
        optimizer.close()
    for worker in workers:
        worker.thread.join(60)
    assert not any(worker.thread.is_alive() for worker in workers)
    assert not [failure for worker in workers for failure in worker.failures]
    gc.collect()
    settle(pager)
    with pager._lock:
        pager._finalizers.run()
    pages = [page for weight in managed.values() for page in weight.entry.pages]
    frames = sum(page.n_bytes for page in pages if page.resident)
    shared = sum(len(weight.entry.shared_frames()) for weight in managed.values()) * 4096
    assert [page.pins for page in pages] == [0] * len(pages)
    if closing:
        assert pager.frames.committed_bytes == 0 and not pager.entries
        return
    assert pager.frames.used_bytes == frames + shared
    assert pager.frames.peak_bytes <= BUDGET_BYTES
    assert pager._mover.weights_resident_bytes == frames
    assert pager._mover.ahead_bytes == sum(page.n_bytes for page in pages if page.unused and not page.kept)
    assert (pager._mover.moving, pager._mover.leaving_bytes) == (0, 0)
    assert pager.entries.keys() == managed.keys()
    assert optimizer.pool.stats()["general"]["used_bytes"] == 0
    pager._swap._extents.check()
    assert sum(worker.done for worker in workers) > N_THREADS * N_STEPS // 2, "most was not refused"
