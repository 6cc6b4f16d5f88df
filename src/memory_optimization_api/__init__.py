"""The import name of the specification (section 4.2) for the memory optimizer."""

from qwen3_vl_memory_optimizations import MemoryConfig, MemoryOptimizationError, MemoryOptimizer

__all__ = ["MemoryConfig", "MemoryOptimizationError", "MemoryOptimizer"]
