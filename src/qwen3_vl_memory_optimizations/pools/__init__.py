"""Page-aligned address ranges and the page frames behind them. Knows only the sizes and lifetimes of blocks."""

from .allocator import RangeAllocator
from .frames import UNIT_BYTES, FramePool, round_up, units_of
from .typed import AdvancedMemoryPool, GeneralTensorPool, KVCachePool, TensorPool, TextEmbeddingPool, VisionFeaturePool
from .virtual import FRAME_BYTES, reserve, unreserve

__all__ = [
    "FRAME_BYTES",
    "UNIT_BYTES",
    "AdvancedMemoryPool",
    "RangeAllocator",
    "FramePool",
    "GeneralTensorPool",
    "KVCachePool",
    "TensorPool",
    "TextEmbeddingPool",
    "VisionFeaturePool",
    "reserve",
    "round_up",
    "units_of",
    "unreserve",
]
