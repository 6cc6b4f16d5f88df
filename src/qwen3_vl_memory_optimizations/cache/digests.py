"""Cache keys: cryptographic digests of everything a result depends on. Different inputs never share a key."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

_DIGEST_BYTES = 32
_STEP_BYTES = 1 << 20


def digest(*parts: Any) -> str:
    """Return 64 hexadecimal digits for JSON-serializable parts, in order."""
    text = json.dumps(parts, separators=(",", ":"), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def digest_of_tensor(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """Return 64 hexadecimal digits for the bytes, shape and dtype of a tensor (about 1 GB/s).

    Args:
        tensor: of any shape.
        dtype: dtype to cast to first, about a megabyte at a time; default: its own.
    """
    dtype = dtype or tensor.dtype
    head = f"{dtype} {tuple(tensor.shape)} ".encode()
    found = hashlib.blake2b(head, digest_size=_DIGEST_BYTES)
    rows = tensor.detach().reshape(1, -1) if tensor.dim() < 2 else tensor.detach().flatten(1)
    step = max(1, _STEP_BYTES // max(1, rows.shape[1] * dtype.itemsize)) if len(rows) else 1
    for start in range(0, len(rows), step):
        part = rows[start : start + step].to(device="cpu", dtype=dtype).contiguous()
        found.update(part.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
