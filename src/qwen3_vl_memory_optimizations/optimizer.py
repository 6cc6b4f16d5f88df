"""`MemoryOptimizer`: creates and connects one of each component (section 4.2 of the specification)."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .cache import HierarchicalCacheSystem, LedgerBudget
from .closing import Parts
from .collection import PredictiveGarbageCollector, RuntimeStore, TensorLifecycleTracker
from .compression import RawCodec, create_codec
from .config import MemoryConfig
from .errors import ConfigurationError, MemoryBudgetExceeded, format_bytes
from .figures import MemoryFigures, MemoryMetrics
from .hardware import HardwareProfile
from .interrupts import shield
from .paging import (
    PAGE_BYTES,
    Compactor,
    Ledger,
    ManagedTensor,
    MemoryAudit,
    Pager,
    PressureMonitor,
    ProcessAccounts,
    TensorEntry,
)
from .pools import AdvancedMemoryPool
from .process import rss_bytes
from .profiles import configure
from .runtime_policy import MemorySwappingSystem, MemoryTieringSystem, tier_memory
from .storage import disks_first, swap_candidates
from .tuning import AutoTuner, live_parameters

TENSOR_KINDS = ("kv_cache", "vision_features", "text_embeddings", "general")

_LEAST_FRAMES_BYTES = 2 * PAGE_BYTES
_LEARNT_WAITS = "learnt-waits.npz"


class MemoryOptimizer(MemoryMetrics):
    """Owns the bytes of managed tensors, and keeps them, or the whole process, within a budget.

    Args:
        hardware_config: keys `cpu_model`, `gpu_model`, `memory_size`, `storage_type`; missing ones are detected.
        memory_config: the keys of `MemoryConfig`, as a dict or an instance.

    Attributes:
        config: the settings, including those of a profile.
        hardware: the machine.
        pager: moves the bytes.
        pool: address ranges of runtime tensors.
        cache: reusable results; `None` if `enable_cache_hierarchy` is off.
        kv_store: keys and values of idle sequences; `None`: none are kept.
        attachment: detaches everything attached to the model (`release`); `None`: there is no model.
        estimator: estimates the time to the first token (`model.run.estimate.PromptEstimator`); `None`: as above.
        audit: compares the resident set size with the ledger at each pass; `None`: not enabled (`paging.audit`).
        collector: releases objects that are not expected to be used again; `None` if `enable_predictive_gc` is off.
        lifecycle: the creator and session of each runtime tensor, and the tensors that outlive their session.
        pressure: gives memory up when other processes take it; `None` without `ram_budget`.
        tiering: prefetches runtime tensors; `None`: switched off, or no budget.
        parameters: settings that can be changed while a model runs, by name.
        tuner: changes them; `None`: `auto_tune` is off.
        swapping: the eviction order of runtime tensors; `None`: switched off, least recently used first.

    Raises:
        ConfigurationError: an unknown key or a bad value.
        MemoryBudgetExceeded: `ram_budget` is below what the process already uses.
    """

    def __init__(
        self,
        hardware_config: Mapping[str, Any] | None = None,
        memory_config: Mapping[str, Any] | MemoryConfig | None = None,
    ) -> None:
        with ExitStack() as undo:  # releases threads, files and address space if a later step fails
            self._build(hardware_config, memory_config, undo)
            undo.pop_all()

    def _build(
        self,
        hardware_config: Mapping[str, Any] | None,
        memory_config: Mapping[str, Any] | MemoryConfig | None,
        undo: ExitStack,
    ) -> None:
        self.hardware = HardwareProfile.from_mapping(hardware_config or {})
        self.config = configure(memory_config, self.hardware)
        create_codec(self.config.unmeasured_codec())  # raises for an unknown name
        self.baseline_bytes = rss_bytes()
        ledger = Ledger(self.config.ram_budget, self.config.tensor_budget)
        self._check_budget()
        self.swapping: MemorySwappingSystem | None = None
        if self.config.enable_swapping and self.config.enable_memory_swapping:
            self.swapping = MemorySwappingSystem(self.config.swap_pressure_threshold, self.config.swap_algorithm)
        policy = None if self.swapping is None else self.swapping.algorithm
        named = self.config.swap_dir
        self.pager = Pager(
            ledger,
            swap_dir=disks_first(swap_candidates(self.config.base_dir)) if named is None else named,
            swap_bytes=self.config.swap_size,
            reuse_frames=self.config.enable_memory_pooling,
            policy=policy,
        )
        undo.callback(self.pager.close)
        budget = self.config.ram_budget
        self._accounts = None if budget is None else ProcessAccounts(self.pager, budget, self.baseline_bytes)
        self.pressure = (
            None
            if budget is None
            else PressureMonitor(self.pager, budget, also=None if self.swapping is None else self.swapping.look)
        )
        if self.pressure is not None:
            undo.callback(self.pressure.close)
            self.pressure.start()
        self.tiering: MemoryTieringSystem | None = None
        if ledger.limited and self.config.enable_tiering and self.config.enable_memory_tiering:
            self.tiering = MemoryTieringSystem({**tier_memory(self.pager.swap_dir), "gpu": None})  # no tensors on a GPU
            undo.callback(self.tiering.close)
            self.pager.listen(self.tiering.note)
            if not self.config.private:
                self.tiering.remember(self.config.base_dir / _LEARNT_WAITS)
            self.tiering.start(self.pager, self.config.tier_migration_interval)
        self.pool = AdvancedMemoryPool(self.config.memory_pool_size)
        undo.callback(self.pool.close)
        self.pager.pools = self.pool.pools if self.config.enable_memory_pooling else {}
        self.cache: HierarchicalCacheSystem | None = None
        if self.config.enable_cache_hierarchy:
            self.cache = HierarchicalCacheSystem(self.config, budget=LedgerBudget(self.pager))
            undo.callback(self.cache.close)
            if self._accounts is None:  # otherwise it makes room before each forward
                self.pager.on_pass = self.cache.make_room
        self.lifecycle = TensorLifecycleTracker()
        self._runtime_store: RuntimeStore | None = None
        self.audit: MemoryAudit | None = None
        if self._accounts is not None and MemoryAudit.is_on():
            lifecycle = self.lifecycle
            self.audit = self._accounts.audit = MemoryAudit(self.pager, lambda: lifecycle.phase)
        self.pager.lives = self.lifecycle
        self.collector: PredictiveGarbageCollector | None = None
        if self.config.enable_predictive_gc:
            self.collector = self._start_collector(undo)
        pool = self.pool if self.config.enable_memory_pooling else None
        self.figures = MemoryFigures(self.pager, pool)
        self._compactor: Compactor | None = None
        if self.config.enable_memory_pooling:
            self._compactor = Compactor(self.pager, self.config.pool_compaction_interval)
            undo.callback(self._compactor.close)
            self._compactor.start()
        self.parameters = live_parameters(
            self.pager,
            cache=self.cache,
            most_l2_bytes=self.config.most_l2_bytes(),
            tiering=self.tiering,
            swapping=self.swapping,
            compactor=self._compactor,
        )
        self.tuner = AutoTuner(self.pager, self.parameters, cache=self.cache) if self.config.auto_tune else None
        if self.tuner is not None:
            undo.callback(self.tuner.close)
            self.tuner.start()
        self.kv_store: Any = None
        self.attachment: Any = None
        self.estimator: Any = None
        self._ids = itertools.count()
        self._parts = Parts(
            [self.tuner, self.pressure, self.tiering, self.collector, self._compactor, self.cache],
            self.pager,
            self.pool,
        )
        self.pager.owner = weakref.ref(self)
        self._parts.close_after(self)

    def _start_collector(self, undo: ExitStack) -> PredictiveGarbageCollector:
        collector = PredictiveGarbageCollector(tracker=self.lifecycle)
        if self.swapping is not None:
            self._runtime_store = RuntimeStore(self.pager)
            collector.stores.append(self._runtime_store)
        cached = None if self.cache is None else self.cache.collectable()
        if self.cache is not None and cached is not None:
            collector.stores.append(cached)
            self.cache.listen(collector.note)
        if self.tiering is not None:
            self.tiering.unwanted = collector.has_collected
        undo.callback(collector.close)
        collector.start(self.config.gc_collection_interval)
        return collector

    def _check_budget(self) -> None:
        budget = self.config.ram_budget
        least = self.baseline_bytes + _LEAST_FRAMES_BYTES
        if budget is not None and budget < least:
            raise MemoryBudgetExceeded(
                f"ram_budget of {format_bytes(budget)} is too small: this process uses "
                f"{format_bytes(self.baseline_bytes)} before any tensor; give at least {format_bytes(least)}",
                requested_bytes=least,
                available_bytes=budget,
                budget_bytes=budget,
                owner="process",
            )

    # --- tensors ------------------------------------------------------------------------------------------------------

    def allocate_tensor(
        self,
        shape: tuple[int, ...] | list[int] | torch.Size | int,
        dtype: torch.dtype = torch.float16,
        tensor_type: str = "general",
    ) -> ManagedTensor:
        """Return a zeroed tensor from the pool of its kind; it is freed with the last reference to it.

        Args:
            shape: of the tensor.
            dtype: any dtype of torch.
            tensor_type: `kv_cache`, `vision_features`, `text_embeddings` or `general`.

        Raises:
            ConfigurationError: an unknown kind, or a negative dimension.
            MemoryBudgetExceeded: it does not fit, even with everything else swapped out.
        """
        if tensor_type not in TENSOR_KINDS:
            raise ConfigurationError(f"tensor_type: {tensor_type!r} is not one of {', '.join(TENSOR_KINDS)}")
        extents = (shape,) if isinstance(shape, int) else tuple(int(extent) for extent in shape)
        if any(extent < 0 for extent in extents):
            raise ConfigurationError(f"shape: {list(extents)} has a negative dimension")
        codec = RawCodec()
        with shield:
            return self._allocate(extents, dtype, tensor_type, codec)

    def _allocate(
        self, extents: tuple[int, ...], dtype: torch.dtype, tensor_type: str, codec: RawCodec
    ) -> ManagedTensor:
        segment = codec.segments(extents, dtype)[0]
        pool = self.pool.pools[tensor_type]
        if self.cache is not None:
            self.cache.make_room(segment.n_bytes)
        with self.pager.exclusive():
            address = pool.allocate(segment.n_bytes)
        try:
            entry = TensorEntry(
                f"{tensor_type}-{next(self._ids)}",
                tensor_type,
                extents,
                dtype,
                codec,
                address,
                segment.dtype,
                (segment.shape[0], segment.shape[1]),
                {},
                rows_per_page=None,
                page_bytes=PAGE_BYTES,
            )
            self.pager.add(entry, resident=True)
        except BaseException:
            with self.pager.exclusive():
                pool.free(address)
            raise
        entry.on_released = partial(pool.free, address)  # when no view holds its pages any more
        tensor = ManagedTensor(self.pager, entry)
        self.lifecycle.refer(entry.tensor_id, tensor, _caller())
        weakref.finalize(tensor, self.pager.free_later, entry.tensor_id)
        self.pager.zero(entry)
        return tensor

    def record_tensor_access(self, tensor_id: str) -> None:
        """Record a use of a tensor; operations on managed tensors are recorded automatically.

        Raises:
            UnknownTensorError: no managed tensor has this id.
        """
        self.pager.record(self.pager.entry(tensor_id))

    def migrate_for_compute(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` in its compute tier and format: decoded, in memory, pinned while it lives.

        A plain tensor is returned unchanged.
        """
        return tensor.decoded() if isinstance(tensor, ManagedTensor) else tensor

    # --- sessions -----------------------------------------------------------------------------------------------------

    def start_inference_session(self) -> int:
        """Open a session and return its number. Sessions nest, and may overlap in threads."""
        return self.lifecycle.begin_session()

    def end_inference_session(self) -> None:
        """Close the latest session of this thread; after the last one, free page frames return to the system.

        Tensors allocated in it that are still referenced are reported by `lifecycle.leaks`.

        Raises:
            ConfigurationError: no session is open.
        """
        self.lifecycle.end_session()
        if self.collector is not None:
            self.collector.end_round()
        if not self.lifecycle.sessions_open:
            self.pager.trim()

    @contextmanager
    def inference_session(self) -> Iterator[MemoryOptimizer]:
        """Open a session for the duration of a block."""
        self.start_inference_session()
        try:
            yield self
        finally:
            self.end_inference_session()

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Open a session for one `generate`; free page frames are kept for the next."""
        began = None
        try:
            with shield:
                began = self.lifecycle.begin_session()
            yield
        finally:
            with shield:
                if began is not None:
                    self.lifecycle.end_session()
                    if self.collector is not None:
                        self.collector.end_round()

    def keep_sequences(self, store: Any) -> None:
        """Let the policies manage the keys and values of idle sequences (`model.kv.store.KVStore`)."""
        self.kv_store = self._parts.kv_store = store
        store.own = self.lifecycle.own
        if self.swapping is not None:
            store.on_rest = partial(self.swapping.look, self.pager)
        if self._runtime_store is not None:
            self._runtime_store.forget = store.forget

    # --- budget -------------------------------------------------------------------------------------------------------

    def reserve_activations(self, n_bytes: int) -> None:
        """Reserve memory for the transient tensors of a forward pass that is about to run.

        Raises:
            MemoryBudgetExceeded: it does not fit beside the minimum that the weights need.
        """
        if self._accounts is not None:
            if self.cache is not None:
                self.cache.make_room(n_bytes - self.pager.ledger.held_bytes("activations"))
            self._accounts.reserve_activations(n_bytes)

    def free_for_activations(self) -> int | None:
        """Return the maximum bytes for the transient tensors of a forward pass, `None` without `ram_budget`."""
        return None if self._accounts is None else self.pager.ledger.most_bytes("activations")

    def measure_process(self, *, release: bool = False) -> None:
        """Charge what the process now uses besides managed memory, including libraries imported meanwhile.

        Args:
            release: return free heap and unneeded library code to the system first; takes about 100 ms.

        Raises:
            MemoryBudgetExceeded: it does not fit beside the minimum that the weights need.
        """
        if self._accounts is not None:
            self.baseline_bytes = self._accounts.measure(release=release)

    # --- end --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the I/O threads, remove the swap file, release the memory. Managed tensors become unusable.

        An optimizer whose references (the model, its tensors, this object) are gone is closed soon after. One that is
        still open when the interpreter exits is closed then.
        """
        self._parts.close()

    def __enter__(self) -> MemoryOptimizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _caller() -> str:
    """Return the code location that called into this module."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
