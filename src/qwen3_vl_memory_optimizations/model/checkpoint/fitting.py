"""Choose a codec for each weight so that all of them fit a number of bytes, at the least loss."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import ConfigurationError, format_bytes
from .plan import Measured, PlannedWeight


@dataclass(frozen=True, slots=True)
class Step:
    """Another codec for one weight.

    Attributes:
        weight: its name.
        codec: the other codec.
        n_bytes: what the step adds; negative: what it saves.
        loss: what it adds to the summed squared errors of outputs; negative: what it takes off.
    """

    weight: str
    codec: str
    n_bytes: int
    loss: float


def loss_of(weights: Mapping[str, PlannedWeight]) -> float:
    """Return the summed squares of the relative errors of the weights' outputs."""
    return sum((weight.relative_error or 0.0) ** 2 for weight in weights.values())


def fit(weights: Mapping[str, PlannedWeight], most_bytes: int) -> dict[str, PlannedWeight]:
    """Return the weights with the codecs that lose least, of those that fit.

    The loss is the sum of squared relative errors of the weights' outputs (see `PlannedWeight.candidates`). From the
    smallest codecs on, the step that saves most loss per byte is taken, as long as it fits: the optimum, but for the
    last step.

    Raises:
        ConfigurationError: the smallest codecs do not fit.
    """
    ladders = {name: _ladder(weight) for name, weight in weights.items()}
    level = dict.fromkeys(ladders, 0)
    left_bytes = most_bytes - sum(_bytes(ladder[0][1]) for ladder in ladders.values())
    if left_bytes < 0:
        raise ConfigurationError(
            f"the smallest codecs take {format_bytes(most_bytes - left_bytes)}, more than {format_bytes(most_bytes)}; "
            "allow as much, or take a smaller model"
        )
    heap = [(-_gain_per_byte(ladder, 0), name) for name, ladder in ladders.items() if len(ladder) > 1]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        ladder, at = ladders[name], level[name]
        added = _bytes(ladder[at + 1][1]) - _bytes(ladder[at][1])
        if added > left_bytes:
            continue  # the weight stays; smaller ones may fit
        left_bytes -= added
        level[name] = at + 1
        if at + 2 < len(ladder):
            heapq.heappush(heap, (-_gain_per_byte(ladder, at + 1), name))
    reason = f"loses least of what fits {format_bytes(most_bytes)}"
    return {
        name: dataclasses.replace(weight, codec=ladders[name][level[name]][0], reason=reason)
        for name, weight in weights.items()
    }


def next_steps(weights: Mapping[str, PlannedWeight]) -> tuple[Step | None, Step | None]:
    """Return the best step up from a plan that `fit` made, and the cheapest step down, if there are any."""
    up: list[tuple[float, Step]] = []
    down: list[tuple[float, Step]] = []
    for name, weight in weights.items():
        ladder = _ladder(weight)
        at = next((index for index, (codec, _) in enumerate(ladder) if codec == weight.codec), None)
        if at is None:  # edited
            continue
        for steps, other in ((up, at + 1), (down, at - 1)):
            if 0 <= other < len(ladder):
                codec, measured = ladder[other]
                n_bytes = _bytes(measured) - _bytes(ladder[at][1])
                step = Step(name, codec, n_bytes, _loss(measured) - _loss(ladder[at][1]))
                steps.append((step.loss / step.n_bytes, step))
    # Loss per byte is negative either way: what a byte more saves, or a byte less costs.
    best_up = min(up, key=lambda each: each[0])[1] if up else None
    best_down = max(down, key=lambda each: each[0])[1] if down else None
    return best_up, best_down


def _ladder(weight: PlannedWeight) -> list[tuple[str, Measured]]:
    """Return codecs by rising bytes, those alone that no mixture of others beats (the lower convex hull)."""
    usable = [
        (codec, measured)
        for codec, measured in weight.candidates.items()
        if measured.n_bytes is not None and measured.relative_error is not None
    ]
    hull: list[tuple[str, Measured]] = []
    for each in sorted(usable, key=lambda option: (_bytes(option[1]), _loss(option[1]))):
        if hull and _loss(each[1]) >= _loss(hull[-1][1]):
            continue
        while len(hull) > 1 and _gain_per_byte([hull[-2], hull[-1]], 0) <= _gain_per_byte([hull[-2], each], 0):
            hull.pop()
        hull.append(each)
    return hull


def _gain_per_byte(ladder: list[tuple[str, Measured]], at: int) -> float:
    (_, one), (_, other) = ladder[at : at + 2]
    return (_loss(one) - _loss(other)) / (_bytes(other) - _bytes(one))


def _bytes(measured: Measured) -> int:
    assert measured.n_bytes is not None
    return measured.n_bytes


def _loss(measured: Measured) -> float:
    assert measured.relative_error is not None
    return measured.relative_error**2
