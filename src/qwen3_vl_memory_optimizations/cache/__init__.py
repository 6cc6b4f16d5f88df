"""Content-addressed reuse (specification 2.2): look up earlier results in memory or on the SSD."""

from .budget import CacheBudget, LedgerBudget
from .digests import digest, digest_of_tensor
from .item import CacheItem, EncodedItem
from .listing import KeptResult, find_result, kept_results, kind_of, remove_result
from .memory import CPUCache, GPUCache
from .ssd import SSDCache
from .stats import LevelStats
from .system import HierarchicalCacheSystem

__all__ = [
    "CPUCache",
    "CacheBudget",
    "CacheItem",
    "EncodedItem",
    "GPUCache",
    "HierarchicalCacheSystem",
    "KeptResult",
    "LedgerBudget",
    "LevelStats",
    "SSDCache",
    "digest",
    "digest_of_tensor",
    "find_result",
    "kept_results",
    "kind_of",
    "remove_result",
]
