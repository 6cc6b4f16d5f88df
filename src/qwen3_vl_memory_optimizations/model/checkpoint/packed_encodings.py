"""What encoding the weights of a packed checkpoint took and cost: kept in its directory, for the figures."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ...compression import Codec, DecodedSample, EncodingCounters

ENCODINGS_FILE = "qwen3vl_mem.encodings.json"


@dataclass(slots=True)
class PackedEncodings:
    """Errors and speeds of encoded weights.

    Attributes:
        errors: relative error by the name of a weight that was encoded with loss, on its first rows.
        counted: bytes and seconds of encoding, and of decoding those rows. After an interruption, of what came then.
    """

    errors: dict[str, float] = field(default_factory=dict)
    counted: EncodingCounters = field(default_factory=EncodingCounters)

    def encode(self, name: str, codec: Codec, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode a chunk of whole row blocks of a weight; the first chunk of each is sampled.

        Raises:
            CodecError: values that this codec cannot represent.
        """
        start_s = time.perf_counter()
        encoded = codec.encode(rows)
        if not codec.lossless:
            counted = EncodingCounters(timed_bytes=rows.nbytes, encode_s=time.perf_counter() - start_s)
            if name not in self.errors:
                sample = DecodedSample.of(codec, rows, encoded)
                self.errors[name] = sample.relative_error
                counted.decoded_bytes, counted.decode_s = sample.decoded_bytes, sample.seconds
            self.counted.add(counted)
        return encoded

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps({"errors": self.errors, "counted": asdict(self.counted)}, indent=1)

    @classmethod
    def load(cls, directory: Path) -> PackedEncodings:
        """Return what is kept in the directory of a packed checkpoint; nothing where it was packed without."""
        try:
            kept = json.loads((directory / ENCODINGS_FILE).read_bytes())
            return cls(
                {str(name): float(error) for name, error in kept["errors"].items()},
                EncodingCounters(**kept["counted"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()  # figures only: no reason to refuse the checkpoint
