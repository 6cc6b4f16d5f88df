"""Weights in a real safetensors file, registered with a Pager as a loader does it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import xxhash
from safetensors.torch import save_file

from qwen3_vl_memory_optimizations.compression import RawCodec
from qwen3_vl_memory_optimizations.paging import FileSource, ManagedTensor, Pager, TensorEntry
from qwen3_vl_memory_optimizations.pools import FRAME_BYTES, reserve
from qwen3_vl_memory_optimizations.storage import DirectFile, read_header

ROWS, COLUMNS = 64, 512  # 64 KiB in bf16
FRAMES_BYTES = ROWS * COLUMNS * 2 + FRAME_BYTES  # data that does not begin on a frame takes one more


def random_weights(n_tensors: int, rows: int = ROWS, columns: int = COLUMNS) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"w{number}": torch.randn(rows, columns).bfloat16() for number in range(n_tensors)}


def register(
    pager: Pager, weights: dict[str, torch.Tensor], path: Path, *, rows_per_page: int = ROWS, checksums: bool = False
) -> dict[str, ManagedTensor]:
    """Write `weights` to `path` and return managed tensors that read them from there."""
    save_file(weights, path)
    file, header = DirectFile(path), read_header(path)
    managed = {}
    for name, values in weights.items():
        extent = header.tensors[name]
        row_bytes = extent.n_bytes // extent.shape[0]
        raw = path.read_bytes()[extent.offset_bytes : extent.offset_bytes + extent.n_bytes]
        page_bytes = rows_per_page * row_bytes
        sums = tuple(xxhash.xxh3_64_intdigest(raw[i : i + page_bytes]) for i in range(0, len(raw), page_bytes))
        lead = extent.offset_bytes % FRAME_BYTES
        entry = TensorEntry(
            name,
            "weights",
            tuple(values.shape),
            values.dtype,
            RawCodec(),
            reserve(lead + extent.n_bytes + 2 * FRAME_BYTES) + lead,
            values.dtype,
            (extent.shape[0], extent.n_bytes // values.element_size() // extent.shape[0]),
            {},
            rows_per_page=rows_per_page,
            page_bytes=page_bytes,
            source=FileSource(file, extent.offset_bytes, sums if checksums else None),
        )
        pager.add(entry, resident=False)
        managed[name] = ManagedTensor(pager, entry)
    return managed


def settle(pager: Pager) -> None:
    """Wait until no page is on its way."""
    with pager._changed:
        assert pager._changed.wait_for(lambda: pager._mover.moving == 0, timeout=10)


def run_pass(managed, x=None):
    """Use every weight once, in order; return the products."""
    x = torch.ones(1, COLUMNS).bfloat16() if x is None else x
    return {name: F.linear(x, weight) for name, weight in managed.items()}


def state(pager):
    """What must not change when something is refused."""
    return (
        pager.frames.used_bytes,
        pager.frames.limit_bytes,
        {owner: n_bytes for owner, n_bytes in pager.ledger.accounts().items() if n_bytes},
        pager.swap_used_bytes,
        {name: [(page.state, page.pins) for page in entry.pages] for name, entry in pager.entries.items()},
    )
