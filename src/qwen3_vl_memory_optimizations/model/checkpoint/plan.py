"""Assign a codec to each large weight: measured once, stored with the reason beside the packed checkpoint, editable."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...compression import Selection, create_codec
from ...errors import ConfigurationError

FORMAT = "qwen3vl-mem compression plan, version 1"


@dataclass(frozen=True, slots=True)
class Measured:
    """The effect of a codec on one weight.

    Attributes:
        n_bytes: size of the encoded form; `None` if the codec does not support the weight.
        relative_error: of the outputs for the calibration inputs, or without them of the weight.
        reason: why the codec is not admitted; empty if it is.
    """

    n_bytes: int | None
    relative_error: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PlannedWeight:
    """The codec of one weight, the reason, and the figures of every candidate."""

    codec: str
    reason: str
    candidates: Mapping[str, Measured]

    @classmethod
    def of(cls, selection: Selection) -> PlannedWeight:
        """Return a selector's choice."""
        measured = {
            each.method: Measured(each.n_bytes, each.relative_error, each.reason) for each in selection.candidates
        }
        return cls(selection.chosen, selection.reason, measured)

    @property
    def n_bytes(self) -> int:
        """Size of the encoded form, if the codec was among the candidates; otherwise 0."""
        return (self.candidates[self.codec].n_bytes or 0) if self.codec in self.candidates else 0

    @property
    def relative_error(self) -> float | None:
        """The error of the codec, if measured."""
        return self.candidates[self.codec].relative_error if self.codec in self.candidates else None

    def why_not(self, codec: str) -> str:
        """Return why a codec was not chosen: why it is not admitted, or else why the chosen one was preferred."""
        measured = self.candidates.get(codec)
        return f"{codec} {measured.reason}" if measured is not None and measured.reason else self.reason


@dataclass(frozen=True, slots=True)
class CompressionPlan:
    """A codec for each large weight of a checkpoint.

    Edit the `codec` of a weight in the file, then run `qwen3vl-mem pack MODEL --plan FILE` to pack again.

    Attributes:
        weights: weight name -> its codec; weights not listed get `int8_rotated`.
        tolerance: the largest admitted error.
        calibrated_on: a description of the calibration inputs.
        access: the access pattern that costs were compared for (see `CompressionMethodSelector`).
        machine: whose speeds were compared; empty if none were.
        most_bytes: what the weights were to fit (see `fitting`); `None`: each was chosen by itself.
    """

    weights: Mapping[str, PlannedWeight]
    tolerance: float
    calibrated_on: str
    access: str
    machine: str = ""
    most_bytes: int | None = None

    @property
    def n_bytes(self) -> int:
        """Size of the encoded weights whose codecs were among the candidates."""
        return sum(weight.n_bytes for weight in self.weights.values())

    def fingerprint(self) -> str:
        """Return a digest that is equal for plans with the same codecs."""
        codecs = {name: weight.codec for name, weight in self.weights.items()}
        return hashlib.sha256(json.dumps(codecs, sort_keys=True).encode()).hexdigest()[:16]

    def encodes_nothing(self) -> bool:
        """Return whether every weight stays unencoded."""
        return all(weight.codec == "none" for weight in self.weights.values())

    def require_names(self, known: Iterable[str]) -> None:
        """Reject a plan of another checkpoint.

        Raises:
            ConfigurationError: it names a weight that is not among the large ones.
        """
        names = list(known)
        for name in self.weights:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigurationError(f"the plan names {name!r}, not a large weight of this checkpoint{hint}")

    def save(self, path: Path) -> None:
        """Write the plan atomically; concurrent readers see the old or the new file."""
        content = {"format": FORMAT} | asdict(self)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)

    @classmethod
    def load(cls, path: Path) -> CompressionPlan:
        """Load a saved plan, possibly edited since.

        Raises:
            ConfigurationError: the file is missing, is not a plan, or names an unknown codec.
        """
        try:
            stored = json.loads(path.read_bytes())
            if stored.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            stored["weights"] = {name: _planned(fields) for name, fields in stored["weights"].items()}
            plan = cls(**stored)
        except OSError as error:
            raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{path}: not a compression plan ({type(error).__name__}: {error})") from error
        for name, weight in plan.weights.items():
            try:
                create_codec(weight.codec)
            except ConfigurationError as error:
                raise ConfigurationError(f"{path}: {name}: {error}") from error
        return plan


def _planned(fields: dict[str, Any]) -> PlannedWeight:
    candidates = {name: Measured(**measured) for name, measured in fields.get("candidates", {}).items()}
    return PlannedWeight(str(fields["codec"]), str(fields.get("reason", "")), candidates)
