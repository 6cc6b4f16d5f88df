"""Layout of a packed checkpoint, and the file header that describes it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping

from ..errors import ConfigurationError
from .checksums import page_count
from .direct_io import round_up
from .safetensors_file import (
    CHECKSUMS_KEY,
    DTYPE_BITS,
    FORMAT_KEY,
    FORMAT_VERSION,
    LENGTH_BYTES,
    PADDING_PREFIX,
    PAGE_BYTES_KEY,
)


@dataclasses.dataclass(frozen=True, slots=True)
class PackedEntry:
    """One tensor to be packed.

    Attributes:
        name: its name in the file.
        dtype: its element type as spelled by safetensors.
        shape: its shape.
        n_bytes: its size, which must match `shape` and `dtype`.
        page_bytes: the size of a page, which is read and checked separately; 0: the whole tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    page_bytes: int = 0


class PackedLayout:
    """Offsets of the entries in the given order, which should be the order of use.

    Args:
        entries: the tensors.

    Attributes:
        entries: the tensors by name.
        offsets: start of each, from the start of the data; multiples of `DISK_BLOCK_BYTES`.
        data_bytes: the size of all data with its padding; a multiple of `DISK_BLOCK_BYTES`.

    Raises:
        ConfigurationError: a name is used twice or reserved, or a size contradicts its shape.
    """

    def __init__(self, entries: Iterable[PackedEntry]) -> None:
        self.entries: dict[str, PackedEntry] = {}
        self.offsets: dict[str, int] = {}
        self.data_bytes = 0
        for entry in entries:
            if entry.name in self.entries or entry.name.startswith(PADDING_PREFIX):
                raise ConfigurationError(f"packed layout: the tensor name {entry.name!r} is used twice or reserved")
            n_bits = math.prod(entry.shape) * DTYPE_BITS[entry.dtype]
            if 8 * entry.n_bytes != n_bits:
                raise ConfigurationError(
                    f"packed layout: {entry.name!r} has {entry.n_bytes} bytes, but {n_bits} bits by its shape "
                    f"{list(entry.shape)} and dtype {entry.dtype}"
                )
            self.entries[entry.name] = entry
            self.offsets[entry.name] = self.data_bytes
            self.data_bytes += round_up(entry.n_bytes)

    def header(self, metadata: Mapping[str, str], checksums: Mapping[str, tuple[int, ...]] | None = None) -> bytes:
        """Return the file header, a multiple of `DISK_BLOCK_BYTES` long.

        Args:
            metadata: texts to store in addition to the layout's own.
            checksums: one per page of each entry; without them the result only has its final size.

        Raises:
            ConfigurationError: a text has a reserved key.
        """
        reserved = metadata.keys() & {FORMAT_KEY, PAGE_BYTES_KEY, CHECKSUMS_KEY}
        if reserved:
            raise ConfigurationError(f"packed layout: the metadata keys {sorted(reserved)} are reserved")
        sums = checksums or {e.name: (0,) * page_count(e.n_bytes, e.page_bytes) for e in self.entries.values()}
        fields: dict[str, object] = {
            "__metadata__": {
                **metadata,
                FORMAT_KEY: FORMAT_VERSION,
                PAGE_BYTES_KEY: compact_json({entry.name: entry.page_bytes for entry in self.entries.values()}),
                # Fixed width: the header size must be known before the data is.
                CHECKSUMS_KEY: compact_json({name: [f"{value:016x}" for value in sums[name]] for name in self.entries}),
            }
        }
        for number, entry in enumerate(self.entries.values()):
            start = self.offsets[entry.name]
            end, next_start = start + entry.n_bytes, start + round_up(entry.n_bytes)
            fields[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}
            if end < next_start:
                fields[f"{PADDING_PREFIX}{number}"] = {
                    "dtype": "U8",
                    "shape": [next_start - end],
                    "data_offsets": [end, next_start],
                }
        text = compact_json(fields).encode()
        length = round_up(LENGTH_BYTES + len(text)) - LENGTH_BYTES
        return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)

    def fingerprint(self, metadata: Mapping[str, str]) -> str:
        """Return 32 hexadecimal digits that change with the layout and with the metadata."""
        return hashlib.blake2b(self.header(metadata), digest_size=16).hexdigest()


def compact_json(value: object) -> str:
    """Return JSON without spaces; equal values give equal text."""
    return json.dumps(value, separators=(",", ":"))
