"""Virtual memory for tensors: Qwen3-VL inside a hard memory budget.

`create_optimized_model` gives a transformers model whose weights live in a hierarchy of memory and SSD;
`MemoryOptimizer` manages tensors directly.
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import (
    CheckpointError,
    CodecError,
    ConfigurationError,
    CorruptDataError,
    InputError,
    InsufficientDiskSpaceError,
    MemoryBudgetExceeded,
    MemoryOptimizationError,
    ShortIOError,
    StorageError,
    TensorFreedError,
    UnknownTensorError,
)

if TYPE_CHECKING:
    from .cache import CPUCache, GPUCache, HierarchicalCacheSystem, SSDCache
    from .collection import PredictiveGarbageCollector, SimpleMLPredictor, TensorLifecycleTracker
    from .compression import (
        CompressionMethodSelector,
        FP16QuantizationCompressor,
        INT8QuantizationCompressor,
        MemoryCompressionManager,
        SparseCompressionCompressor,
        SVDDecompositionCompressor,
    )
    from .config import MemoryConfig
    from .evaluation import calculate_metrics, evaluate_accuracy_impact
    from .factory import create_optimized_model
    from .integration import OptimizedTextDecoder, OptimizedVisionEncoder, OptimizedVisionLanguageModel
    from .monitoring import get_memory_performance_metrics
    from .optimizer import MemoryOptimizer
    from .paging import ManagedTensor
    from .pools import AdvancedMemoryPool
    from .runtime_policy import (
        ClockSwappingAlgorithm,
        LightweightMLPredictor,
        LRUSwappingAlgorithm,
        MemorySwappingSystem,
        MemoryTieringSystem,
        PredictiveSwappingAlgorithm,
    )
    from .tuning import adapt_parameters_based_on_usage

# torch takes seconds to import; the command line and `--help` do without it.
_LAZY = {
    "AdvancedMemoryPool": ".pools",
    "CPUCache": ".cache",
    "ClockSwappingAlgorithm": ".runtime_policy",
    "CompressionMethodSelector": ".compression",
    "FP16QuantizationCompressor": ".compression",
    "GPUCache": ".cache",
    "HierarchicalCacheSystem": ".cache",
    "INT8QuantizationCompressor": ".compression",
    "LRUSwappingAlgorithm": ".runtime_policy",
    "LightweightMLPredictor": ".runtime_policy",
    "ManagedTensor": ".paging",
    "MemoryCompressionManager": ".compression",
    "MemoryConfig": ".config",
    "MemoryOptimizer": ".optimizer",
    "MemorySwappingSystem": ".runtime_policy",
    "MemoryTieringSystem": ".runtime_policy",
    "OptimizedTextDecoder": ".integration",
    "OptimizedVisionEncoder": ".integration",
    "OptimizedVisionLanguageModel": ".integration",
    "PredictiveGarbageCollector": ".collection",
    "PredictiveSwappingAlgorithm": ".runtime_policy",
    "SSDCache": ".cache",
    "SVDDecompositionCompressor": ".compression",
    "SimpleMLPredictor": ".collection",
    "SparseCompressionCompressor": ".compression",
    "TensorLifecycleTracker": ".collection",
    "adapt_parameters_based_on_usage": ".tuning",
    "calculate_metrics": ".evaluation",
    "create_optimized_model": ".factory",
    "evaluate_accuracy_impact": ".evaluation",
    "get_memory_performance_metrics": ".monitoring",
}

__all__ = [
    "AdvancedMemoryPool",
    "CPUCache",
    "CheckpointError",
    "ClockSwappingAlgorithm",
    "CodecError",
    "CompressionMethodSelector",
    "ConfigurationError",
    "CorruptDataError",
    "FP16QuantizationCompressor",
    "GPUCache",
    "HierarchicalCacheSystem",
    "INT8QuantizationCompressor",
    "InputError",
    "InsufficientDiskSpaceError",
    "LRUSwappingAlgorithm",
    "LightweightMLPredictor",
    "ManagedTensor",
    "MemoryBudgetExceeded",
    "MemoryCompressionManager",
    "MemoryConfig",
    "MemoryOptimizationError",
    "MemoryOptimizer",
    "MemorySwappingSystem",
    "MemoryTieringSystem",
    "OptimizedTextDecoder",
    "OptimizedVisionEncoder",
    "OptimizedVisionLanguageModel",
    "PredictiveGarbageCollector",
    "PredictiveSwappingAlgorithm",
    "SSDCache",
    "SVDDecompositionCompressor",
    "ShortIOError",
    "SimpleMLPredictor",
    "SparseCompressionCompressor",
    "StorageError",
    "TensorFreedError",
    "TensorLifecycleTracker",
    "UnknownTensorError",
    "__version__",
    "adapt_parameters_based_on_usage",
    "calculate_metrics",
    "create_optimized_model",
    "evaluate_accuracy_impact",
    "get_memory_performance_metrics",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        from .process import pause_collection

        with pause_collection():
            module = import_module(_LAZY[name], __name__)
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
