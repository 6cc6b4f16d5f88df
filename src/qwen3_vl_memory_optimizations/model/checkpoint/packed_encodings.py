"""Store the errors and costs of encoding a packed checkpoint's weights in its directory, for reports."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ...compression import Codec, Compensation, DecodedSample, Encoded, EncodingCounters

ENCODINGS_FILE = "qwen3vl_mem.encodings.json"


@dataclass(slots=True)
class PackedEncodings:
    """Errors and speeds of encoded weights.

    Attributes:
        errors: weight name -> relative error of lossy encoding, on its first rows.
        counted: bytes and seconds of encoding, and of decoding those rows; after an interruption, only since then.
    """

    errors: dict[str, float] = field(default_factory=dict)
    counted: EncodingCounters = field(default_factory=EncodingCounters)

    def encode(
        self, name: str, codec: Codec, rows: torch.Tensor, compensation: Compensation | None = None
    ) -> dict[str, torch.Tensor]:
        """Encode a chunk of whole row blocks of a weight; the first chunk of each weight is sampled.

        Args:
            name: of the weight.
            codec: of the weight.
            rows: the chunk.
            compensation: of errors, if the codec compensates them.

        Raises:
            CodecError: the codec cannot represent the values.
        """
        start_s = time.perf_counter()
        encoded = codec.encode(rows) if compensation is None else codec.encode_compensated(rows, compensation)
        if not codec.lossless:
            counted = EncodingCounters(timed_bytes=rows.nbytes, encode_s=time.perf_counter() - start_s)
            self.counted.add(counted)
            if name not in self.errors:
                self.sample(name, codec, rows, encoded)
        return encoded

    def sample(self, name: str, codec: Codec, rows: torch.Tensor, encoded: Encoded) -> None:
        """Note the error of the first rows of a weight, and the time to decode them."""
        sample = DecodedSample.of(codec, rows, encoded)
        self.errors[name] = sample.relative_error
        self.counted.add(EncodingCounters(decoded_bytes=sample.decoded_bytes, decode_s=sample.seconds))

    def to_json(self) -> str:
        """Return the content of the file."""
        return json.dumps({"errors": self.errors, "counted": asdict(self.counted)}, indent=1)

    @classmethod
    def load(cls, directory: Path) -> PackedEncodings:
        """Load the figures from a packed checkpoint's directory; empty if there are none."""
        try:
            kept = json.loads((directory / ENCODINGS_FILE).read_bytes())
            return cls(
                {str(name): float(error) for name, error in kept["errors"].items()},
                EncodingCounters(**kept["counted"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()  # only figures: no reason to reject the checkpoint
