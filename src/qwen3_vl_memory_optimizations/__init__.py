"""Virtual memory for tensors: run Qwen3-VL within a hard memory budget.

`create_optimized_model` returns a transformers model whose weights are paged between memory and SSD. `MemoryOptimizer`
manages tensors directly.
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import (
    CheckpointError,
    ConfigurationError,
    InputError,
    MemoryBudgetExceeded,
    MemoryOptimizationError,
    StorageError,
)
from .errors import CodecError as CodecError  # these are not in `__all__`: `errors` has the whole tree
from .errors import CorruptDataError as CorruptDataError
from .errors import InsufficientDiskSpaceError as InsufficientDiskSpaceError
from .errors import ShortIOError as ShortIOError
from .errors import TensorFreedError as TensorFreedError
from .errors import UnknownTensorError as UnknownTensorError

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
    from .factory import create_optimized_model, optimized, release
    from .integration import OptimizedTextDecoder, OptimizedVisionEncoder, OptimizedVisionLanguageModel
    from .model.inputs.documents import document_pages
    from .model.inputs.picture_budget import prepare_within_budget
    from .model.inputs.processor import load_processor
    from .monitoring import get_memory_performance_metrics
    from .optimizer import MemoryOptimizer
    from .paging import ManagedTensor
    from .pools import AdvancedMemoryPool, GeneralTensorPool, KVCachePool, TextEmbeddingPool, VisionFeaturePool
    from .runtime_policy import (
        ClockSwappingAlgorithm,
        LightweightMLPredictor,
        LRUSwappingAlgorithm,
        MemorySwappingSystem,
        MemoryTieringSystem,
        PredictiveSwappingAlgorithm,
    )
    from .tuning import adapt_parameters_based_on_usage

# torch takes seconds to import; the command line and `--help` do not need it.
_LAZY = {
    "AdvancedMemoryPool": ".pools",
    "CPUCache": ".cache",
    "ClockSwappingAlgorithm": ".runtime_policy",
    "CompressionMethodSelector": ".compression",
    "FP16QuantizationCompressor": ".compression",
    "GPUCache": ".cache",
    "GeneralTensorPool": ".pools",
    "HierarchicalCacheSystem": ".cache",
    "INT8QuantizationCompressor": ".compression",
    "KVCachePool": ".pools",
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
    "TextEmbeddingPool": ".pools",
    "VisionFeaturePool": ".pools",
    "adapt_parameters_based_on_usage": ".tuning",
    "calculate_metrics": ".evaluation",
    "create_optimized_model": ".factory",
    "document_pages": ".model.inputs.documents",
    "evaluate_accuracy_impact": ".evaluation",
    "get_memory_performance_metrics": ".monitoring",
    "load_processor": ".model.inputs.processor",
    "optimized": ".factory",
    "prepare_within_budget": ".model.inputs.picture_budget",
    "release": ".factory",
}

__all__ = [
    "AdvancedMemoryPool",
    "CPUCache",
    "CheckpointError",
    "ClockSwappingAlgorithm",
    "CompressionMethodSelector",
    "ConfigurationError",
    "FP16QuantizationCompressor",
    "GPUCache",
    "GeneralTensorPool",
    "HierarchicalCacheSystem",
    "INT8QuantizationCompressor",
    "InputError",
    "KVCachePool",
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
    "SimpleMLPredictor",
    "SparseCompressionCompressor",
    "StorageError",
    "TensorLifecycleTracker",
    "TextEmbeddingPool",
    "VisionFeaturePool",
    "__version__",
    "adapt_parameters_based_on_usage",
    "calculate_metrics",
    "create_optimized_model",
    "document_pages",
    "evaluate_accuracy_impact",
    "get_memory_performance_metrics",
    "load_processor",
    "optimized",
    "prepare_within_budget",
    "release",
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
