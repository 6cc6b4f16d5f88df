"""Managed tensors, their residency, the budget, and all transfers between the SSD and memory."""

from .blocks import Block, BlockSpace, Pinned, page_checksums, stored_bytes
from .budget.audit import MemoryAudit
from .budget.compaction import Compactor
from .budget.ledger import PROCESS, TENSORS, Ledger
from .budget.pressure import PressureMonitor
from .budget.process_accounts import ProcessAccounts
from .frozen import runs_as_written
from .managed_tensor import ManagedTensor, linear_joined, whole_linears
from .pager import Pager
from .records.entry import PAGE_BYTES, FileSource, JoinedEntries, Page, PageState, TensorEntry, alias_memory
from .records.joined import join
from .records.stats import PagingStats
from .records.views import PINNED, TensorPages, TensorUse
from .transfers.resident_set import READ_AHEAD_BYTES

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
