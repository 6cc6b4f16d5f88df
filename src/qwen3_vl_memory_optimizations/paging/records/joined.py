"""Join weights that share an input and are adjacent in memory, so that one product replaces several."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .entry import JoinedEntries, TensorEntry, alias_memory


def join(entries: Sequence[TensorEntry]) -> bool:
    """Let `Pager.linear_joined` compute on these tensors as one if they are adjacent and share a codec.

    Returns:
        Whether they were joined; otherwise nothing was changed.
    """
    first = entries[0]
    views = [entry.encoded(0, entry.rows) for entry in entries]
    names = list(views[0])
    paged = names[0]
    end = first.address
    for entry, view in zip(entries, views, strict=True):
        alike = entry.codec is first.codec and entry.dtype == first.dtype and not entry.shared
        if not alike or view[paged].shape[1:] != views[0][paged].shape[1:] or entry.address != end:
            return False
        end += entry.n_bytes
    data = alias_memory(first.address, end - first.address).view(views[0][paged].dtype)
    encoded = {paged: data.view(-1, *views[0][paged].shape[1:])}
    for name in names[1:]:
        encoded[name] = torch.cat([view[name] for view in views])
    joined, start = JoinedEntries(tuple(entries), encoded), 0
    for entry in entries:
        stop = start + entry.rows
        entry.share_segments(joined, {name: encoded[name][start:stop] for name in names[1:]})
        start = stop
    return True
