"""A real optimizer with a small budget, on an SSD that fails now and then, and threads that use all of it at once."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch

from qwen3_vl_memory_optimizations import MemoryOptimizer
from qwen3_vl_memory_optimizations.errors import StorageError
from qwen3_vl_memory_optimizations.paging import ManagedTensor
from qwen3_vl_memory_optimizations.pools import FRAME_BYTES
from tests.paging.weights import COLUMNS, FRAMES_BYTES, random_weights, register, settle
from tests.stress.faults import FaultyOS
from tests.stress.work import KIB, Worker

N_THREADS = 8
N_WEIGHTS = 8
BUDGET_BYTES = 4 * FRAMES_BYTES + 1500 * KIB
QUIET_POINTS = 5


class Hung(Exception):
    """Threads that wait for each other for ever; says where they are."""


class Machine:
    """What is put under stress.

    Args:
        directory: for files.
        seed: of all that is drawn.
        rate: the share of the calls to the system that meet a fault.
        interval_s: how often systems with a thread look; by default the workers alone call them.

    Attributes:
        workers: the threads' work.
        met: how often each fault was met, by name.
    """

    def __init__(self, directory: Path, seed: int, rate: float = 0.04, interval_s: float = 1000.0) -> None:
        settings = {"tier_migration_interval": interval_s, "gc_collection_interval": interval_s}
        settings |= {"cache_dir": directory / "cache", "memory_pool_size": 16 * 2**20}
        settings |= {"l2_cache_size": 400 * KIB, "l3_cache_size": 600 * KIB}
        self.optimizer = MemoryOptimizer(memory_config={"tensor_budget": BUDGET_BYTES, **settings})
        weights = {**random_weights(N_WEIGHTS), "table": torch.randn(256, COLUMNS).bfloat16()}
        self.managed: dict[str, ManagedTensor] = register(
            self.optimizer.pager, weights, directory / "w.safetensors", rows_per_page=16, checksums=True
        )
        self.workers = [Worker(number, seed, self.optimizer, self.managed, weights) for number in range(N_THREADS)]
        for worker in self.workers:
            worker.others = self.workers
        self.scratch_bytes: dict[int, int] = {}
        self.faulty = FaultyOS(seed, rate)
        self.failures: list[object] = []
        self._round = threading.Barrier(N_THREADS, action=self._quiet)

    @property
    def met(self) -> dict[str, int]:
        return self.faulty.met

    def run(self, n_steps: int, timeout_s: float = 30.0) -> None:
        """Let each thread do so many things; check everything now and then while all pause.

        Raises:
            Hung: for so long no thread did anything.
        """
        threads = [
            threading.Thread(target=self._work, args=(worker, n_steps // QUIET_POINTS), daemon=True)
            for worker in self.workers
        ]
        logging.disable(logging.CRITICAL)  # pytest keeps errors that are logged, and those refer to frames with tensors
        gc.collect()
        gc.freeze()  # what imports made stays; else each collection takes 0.2 s
        try:
            with self.faulty.standing_in():
                for thread in threads:
                    thread.start()
                self._wait_for(threads, timeout_s)
        finally:
            gc.unfreeze()
            logging.disable(logging.NOTSET)
        self.failures += [failure for worker in self.workers for failure in worker.failures]

    def _wait_for(self, threads: list[threading.Thread], timeout_s: float) -> None:
        done, since_s = -1, time.monotonic()
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(0.1)
            now = sum(worker.done + worker.refused for worker in self.workers)
            if now != done:
                done, since_s = now, time.monotonic()
            elif time.monotonic() - since_s > timeout_s:
                raise Hung(_where_threads_are())

    def _work(self, worker: Worker, n_steps: int) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            for _ in range(QUIET_POINTS):
                for _ in range(n_steps):
                    worker.step()
                self.scratch_bytes[worker.number] = self.optimizer.pager.scratch.n_bytes
                self._round.wait()

    def _quiet(self) -> None:
        try:
            self.check()
        except BaseException:
            self.failures.append(traceback.format_exc())
            raise threading.BrokenBarrierError from None  # all stop: what is wrong does not become right

    # --- invariants ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert all that must hold while no thread of the test is in the midst of something.

        The ledger is the sum of what its owners have, frames and pools are the bytes of the tensors that are alive,
        the budget holds, and every byte is what was written last.
        """
        pager, cache, collector = self.optimizer.pager, self.optimizer.cache, self.optimizer.collector
        gc.collect()
        with collector._lock:
            settle(pager)
            pager.usage()  # what finalizers left is done
            settle(pager)
            pager.check()
            level = cache.l2_cache
            assert level.used_bytes == sum(held.n_bytes for held in level.entries().values())
            owners = {"cache": level.used_bytes, "workspace": sum(self.scratch_bytes.values())}
            for worker in self.workers:
                owners |= worker.ledger
            _equal(_held(pager.ledger.accounts()), _held(owners))
            assert pager.frames.committed_bytes <= pager.frames.limit_bytes <= pager.ledger.frames_limit_bytes()
            self._check_pools()
            self._check_store()
        for worker in self.workers:
            worker.check_all()
        failures = [failure for worker in self.workers for failure in worker.failures]
        assert not failures, failures[0]

    def _check_store(self) -> None:
        """The index of the entries on the SSD is that of the files."""
        store = self.optimizer.cache.l3_cache.store_files
        for _ in range(20):
            with contextlib.suppress(StorageError), store._locked() as held:
                assert held
                files = {path.name: path.stat().st_size for path in store._files()}
                _equal({key: entry.n_bytes for key, entry in store._index.entries.items()}, files)
                return
        raise AssertionError("the store cannot be locked")

    def _check_pools(self) -> None:
        pager = self.optimizer.pager
        granted = dict.fromkeys(self.optimizer.pool.pools, 0)
        alive = set(self.managed)
        for worker in self.workers:
            for own in worker.own:
                if own.tensor is not None or own.n_bytes:  # a view of nothing holds nothing
                    granted[own.pool_kind] += max(1, -(-own.n_bytes // FRAME_BYTES)) * FRAME_BYTES
                if own.tensor is not None:
                    alive.add(own.entry.tensor_id)
            for block, _ in worker.blocks:
                granted[block.entry.kind] += -(-block.n_bytes // FRAME_BYTES) * FRAME_BYTES
                alive.add(block.entry.tensor_id)
        _equal({kind: row["used_bytes"] for kind, row in self.optimizer.pool.stats().items()}, granted)
        _equal(set(pager.entries), alive)
        order = self.optimizer.swapping.algorithm
        assert set(order.n_bytes) <= alive
        assert order.resident_bytes == sum(order.n_bytes.values())

    # --- end ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of everything, and assert that nothing is left."""
        pager, pools = self.optimizer.pager, self.optimizer.pool
        for worker in self.workers:
            worker.unpin_all()
        self.scratch_bytes.clear()  # with their threads
        self.check()
        for worker in self.workers:
            worker.drop_all()
        self.optimizer.cache.l2_cache.clear()
        self.check()
        pages = [page for each in self.managed.values() for page in each.entry.pages]
        shared = sum(len(each.entry.shared_frames()) for each in self.managed.values()) * FRAME_BYTES
        assert pager.frames.used_bytes == sum(page.n_bytes for page in pages if page.resident) + shared
        # A weight of which a view was handed out, and which could not be compared with its file.
        assert pager.swap_used_bytes == sum(page.n_bytes for page in pages if page.swap_offset is not None)
        assert not _held(pager.ledger.accounts())
        assert not any(row["used_bytes"] for row in pools.stats().values())
        self.optimizer.close()
        held = [(each.tensor_id, [page.pins for page in each.pages]) for each in pager._tensors._lingering]
        _equal((pager.frames.committed_bytes, dict(pager.entries), held), (0, {}, []))


def _held(accounts: dict[str, int]) -> dict[str, int]:
    return {owner: n_bytes for owner, n_bytes in accounts.items() if n_bytes}


def _equal(found: object, expected: object) -> None:
    assert found == expected, f"{found} instead of {expected}"


def _where_threads_are() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
