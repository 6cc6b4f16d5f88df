"""`EncodingLog`: what was encoded, into how much, how fast, and with what error where that was sampled."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Encoded:
    """What was encoded of one kind of tensor since the start.

    Attributes:
        encodes: how often.
        original_bytes, encoded_bytes: before and after.
        seconds: spent on encoding.
        sampled_bytes: original bytes of those whose error is known.
        error_bytes: relative error times original bytes, summed over those.
    """

    encodes: int = 0
    original_bytes: int = 0
    encoded_bytes: int = 0
    seconds: float = 0.0
    sampled_bytes: int = 0
    error_bytes: float = 0.0

    @property
    def relative_error(self) -> float | None:
        """The mean error by bytes; `None` where none is known."""
        return self.error_bytes / self.sampled_bytes if self.sampled_bytes else None


class EncodingLog:
    """Counts by kind of tensor; any thread may note.

    Attributes:
        weight_errors: relative error by the id of a weight, where it is known.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kinds: dict[str, Encoded] = {}
        self.weight_errors: dict[str, float] = {}

    def note(
        self,
        kind: str,
        *,
        original_bytes: int,
        encoded_bytes: int,
        seconds: float = 0.0,
        relative_error: float | None = None,
    ) -> None:
        """Note that something was encoded.

        Args:
            kind: of the tensor.
            original_bytes, encoded_bytes: before and after.
            seconds: that it took; 0.0: another process did it.
            relative_error: where it is known.
        """
        with self._lock:
            row = self._kinds.setdefault(kind, Encoded())
            row.encodes += 1
            row.original_bytes += original_bytes
            row.encoded_bytes += encoded_bytes
            row.seconds += seconds
            if relative_error is not None:
                row.sampled_bytes += original_bytes
                row.error_bytes += relative_error * original_bytes

    def sampled(self, kind: str, *, every: int) -> bool:
        """Return whether the next of a kind is one whose error is to be measured: the first, and one of `every`."""
        with self._lock:
            row = self._kinds.get(kind)
            return row is None or row.encodes % every == 0

    def rows(self) -> dict[str, Encoded]:
        """Return the counters by kind, as they are now."""
        with self._lock:
            return {kind: Encoded(**asdict(row)) for kind, row in self._kinds.items()}
