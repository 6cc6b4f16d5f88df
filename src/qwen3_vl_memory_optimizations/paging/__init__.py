"""Managed tensors, their residency, the budget, and the only module that moves bytes."""

from .accounts import ProcessAccounts
from .audit import MemoryAudit
from .blocks import Block, BlockSpace, Pinned, page_checksums, stored_bytes
from .compaction import Compactor
from .entry import PAGE_BYTES, FileSource, Page, PageState, TensorEntry, alias_memory
from .frozen import runs_as_written
from .joined import JoinedEntries, join
from .ledger import PROCESS, TENSORS, Ledger
from .managed_tensor import ManagedTensor, linear_joined, whole_linears
from .pager import Pager
from .pressure import PressureMonitor
from .residency import READ_AHEAD_BYTES
from .stats import PagingStats
from .views import PINNED, TensorPages, TensorUse

__all__ = [
    "PAGE_BYTES",
    "PINNED",
    "PROCESS",
    "READ_AHEAD_BYTES",
    "TENSORS",
    "Block",
    "BlockSpace",
    "Compactor",
    "FileSource",
    "JoinedEntries",
    "Ledger",
    "ManagedTensor",
    "MemoryAudit",
    "Page",
    "PageState",
    "Pager",
    "PagingStats",
    "Pinned",
    "PressureMonitor",
    "ProcessAccounts",
    "TensorEntry",
    "TensorPages",
    "TensorUse",
    "alias_memory",
    "join",
    "linear_joined",
    "page_checksums",
    "runs_as_written",
    "stored_bytes",
    "whole_linears",
]
