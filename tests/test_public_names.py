import importlib
import inspect
import re
import subprocess
import sys

import pytest

import memory_optimization_api
import qwen3_vl_memory_optimizations
from qwen3_vl_memory_optimizations import errors

PUBLIC = [
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


def test_public_names_are_these_and_sorted():
    assert qwen3_vl_memory_optimizations.__all__ == PUBLIC == sorted(PUBLIC)
    assert dir(qwen3_vl_memory_optimizations) == PUBLIC
    for name in PUBLIC:
        assert getattr(qwen3_vl_memory_optimizations, name).__doc__, name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = qwen3_vl_memory_optimizations.no_such_name


def test_the_import_name_of_the_specification_gives_the_same_objects():
    assert memory_optimization_api.__all__ == ["MemoryConfig", "MemoryOptimizationError", "MemoryOptimizer"]
    for name in memory_optimization_api.__all__:
        assert getattr(memory_optimization_api, name) is getattr(qwen3_vl_memory_optimizations, name)


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = (
        "import sys, qwen3_vl_memory_optimizations as package; package.MemoryConfig(); package.CodecError; "
        "heavy = ('torch', 'transformers', 'numpy', 'PIL', 'prometheus_client'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_error_stands_in_the_documented_tree_under_its_base():
    documented = {}
    path = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"([│├└─ ]*)(\w+(?:Error|Exceeded))\b", line)
        if match:
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            documented[match[2]] = path[depth - 1] if depth else "Exception"
    classes = {
        name: error
        for name, error in vars(errors).items()
        if inspect.isclass(error) and issubclass(error, Exception) and error.__module__ == errors.__name__
    }
    assert documented == {name: error.__bases__[0].__name__ for name, error in classes.items()}
    assert all(error.__doc__ for error in classes.values())
    assert all(hasattr(qwen3_vl_memory_optimizations, name) for name in classes)


def test_every_error_of_the_package_is_defined_in_the_tree():
    for module in (
        "config",
        "optimizer",
        "compression",
        "storage",
        "pools",
        "paging",
        "cache",
        "factory",
        "integration",
        "evaluation",
        "figures",
        "monitoring",
    ):
        for name, value in vars(importlib.import_module(f"qwen3_vl_memory_optimizations.{module}")).items():
            if inspect.isclass(value) and issubclass(value, errors.MemoryOptimizationError):
                assert value.__module__ == errors.__name__, (module, name)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        ("ConfigurationError", ValueError),
        ("InputError", ValueError),
        ("MemoryBudgetExceeded", MemoryError),
        ("UnknownTensorError", KeyError),
    ],
)
def test_errors_are_also_what_python_code_expects(error, builtin):
    assert issubclass(getattr(errors, error), builtin)


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 B"), (999, "999 B"), (4000, "4 kB"), (999_999_488, "1 GB"), (1.25e9, "1.25 GB")]
)
def test_sizes_for_people(n_bytes, text):
    assert errors.format_bytes(n_bytes) == text
