"""SSD storage: direct I/O, safetensors checkpoints, the packed checkpoint, the swap file, stored entries."""

from .checkpoint import CONFIG_FILE, Checkpoint
from .checksums import PageChecksums, page_count
from .content_store import ContentStore, Facts, Index, LoadedEntry, StoredEntry
from .direct_io import DISK_BLOCK_BYTES, AlignedBuffer, DirectFile, free_disk_bytes
from .disks import disks_first, memory_file_system, swap_candidates
from .gguf_file import GGUF_PREFIX, GGUFHeader, read_gguf_header
from .io_queue import BACKGROUND, DEMAND, PREFETCH, IOQueue, Ticket
from .packed import PackedEntry, PackedLayout, PackedWriter, pack_lock
from .probe import measure_read_bandwidth, measure_scratch_bandwidth
from .safetensors_file import SafetensorsHeader, TensorExtent, read_header, write_header
from .swap_file import SwapFile

__all__ = [
    "BACKGROUND",
    "DISK_BLOCK_BYTES",
    "CONFIG_FILE",
    "DEMAND",
    "GGUF_PREFIX",
    "PREFETCH",
    "AlignedBuffer",
    "Checkpoint",
    "ContentStore",
    "DirectFile",
    "Facts",
    "GGUFHeader",
    "IOQueue",
    "Index",
    "LoadedEntry",
    "PackedEntry",
    "PackedLayout",
    "PackedWriter",
    "PageChecksums",
    "SafetensorsHeader",
    "StoredEntry",
    "SwapFile",
    "TensorExtent",
    "Ticket",
    "disks_first",
    "free_disk_bytes",
    "measure_read_bandwidth",
    "measure_scratch_bandwidth",
    "memory_file_system",
    "pack_lock",
    "page_count",
    "read_gguf_header",
    "read_header",
    "swap_candidates",
    "write_header",
]
