"""Which codec each large weight gets, and why: measured once, kept beside the packed checkpoint, open to editing."""

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
    """What a codec does to one weight.

    Attributes:
        n_bytes: of the encoded form; `None` where the codec does not take the weight.
        relative_error: of the outputs for the calibration inputs, or without them of the weight.
        reason: why the codec is not admitted; empty where it is.
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
        """Return what a selector chose."""
        measured = {
            each.method: Measured(each.n_bytes, each.relative_error, each.reason) for each in selection.candidates
        }
        return cls(selection.chosen, selection.reason, measured)

    @property
    def n_bytes(self) -> int:
        """Bytes of the encoded form, where the codec was among the candidates; else 0."""
        return (self.candidates[self.codec].n_bytes or 0) if self.codec in self.candidates else 0

    @property
    def relative_error(self) -> float | None:
        """The error of the codec, where it was measured."""
        return self.candidates[self.codec].relative_error if self.codec in self.candidates else None

    def why_not(self, codec: str) -> str:
        """Return why a codec was not chosen: it is not admitted, or the reason for the one that was."""
        measured = self.candidates.get(codec)
        return f"{codec} {measured.reason}" if measured is not None and measured.reason else self.reason


@dataclass(frozen=True, slots=True)
class CompressionPlan:
    """A codec for each large weight of a checkpoint.

    In the file, the `codec` of a weight may be changed: `qwen3vl-mem pack MODEL --plan FILE` packs again.

    Attributes:
        weights: name of a weight -> its codec; a weight that is not named gets `int8_rotated`.
        tolerance: the largest error that was admitted.
        calibrated_on: what ran through the model for the errors, in words.
        access: the access pattern that costs were compared for (see `CompressionMethodSelector`).
        machine: whose speeds were compared; empty where none were.
    """

    weights: Mapping[str, PlannedWeight]
    tolerance: float
    calibrated_on: str
    access: str
    machine: str = ""

    def fingerprint(self) -> str:
        """Return what is the same for plans with the same codecs."""
        codecs = {name: weight.codec for name, weight in self.weights.items()}
        return hashlib.sha256(json.dumps(codecs, sort_keys=True).encode()).hexdigest()[:16]

    def encodes_nothing(self) -> bool:
        """Whether every weight stays as it is."""
        return all(weight.codec == "none" for weight in self.weights.values())

    def require_names(self, known: Iterable[str]) -> None:
        """Refuse a plan of another checkpoint.

        Raises:
            ConfigurationError: it names a weight that is not among the large ones.
        """
        names = list(known)
        for name in self.weights:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigurationError(f"the plan names {name!r}, which is no large weight of this checkpoint{hint}")

    def save(self, path: Path) -> None:
        """Write the plan; whoever reads the file meanwhile has the old one or the new one."""
        content = {"format": FORMAT} | asdict(self)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)

    @classmethod
    def load(cls, path: Path) -> CompressionPlan:
        """Return a plan that was saved, perhaps edited since.

        Raises:
            ConfigurationError: there is no such file, it is no plan, or it names a codec that is not known.
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
            raise ConfigurationError(f"{path}: no compression plan ({type(error).__name__}: {error})") from error
        for name, weight in plan.weights.items():
            try:
                create_codec(weight.codec)
            except ConfigurationError as error:
                raise ConfigurationError(f"{path}: {name}: {error}") from error
        return plan


def _planned(fields: dict[str, Any]) -> PlannedWeight:
    candidates = {name: Measured(**measured) for name, measured in fields.get("candidates", {}).items()}
    return PlannedWeight(str(fields["codec"]), str(fields.get("reason", "")), candidates)
