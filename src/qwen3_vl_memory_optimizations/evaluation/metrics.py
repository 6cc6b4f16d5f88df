"""Metrics of predictions, added up some rows at a time: logits of a vocabulary are too large to be kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import InputError

IGNORED_LABEL = -100
"""The label of a position that does not count, as in transformers."""

_ROWS = 128


@dataclass(frozen=True, slots=True)
class ScoredOutput:
    """What a model predicted, and what was right.

    Attributes:
        logits: (batch, positions, classes) of a language model, (rows, classes) of a classifier.
        labels: (batch, positions), the token ids themselves: the logits of a position are held against the label of
            the next one. (rows) of a classifier. -100 does not count.
    """

    logits: torch.Tensor
    labels: torch.Tensor


def calculate_metrics(outputs: Iterable[Any]) -> dict[str, float]:
    """Return the metrics of outputs of a model, all positions taken together (section 6.3 of the specification).

    Args:
        outputs: what the model returned, batch by batch; a generator is read once and nothing of it is kept. Each is a
            `ScoredOutput`, or anything with `logits` and `labels` as attributes or keys, or a pair (output, labels).
            Outputs of transformers without labels work too, as far as they tell anything.

    Returns:
        With labels: `perplexity` (exp of the mean negative log-likelihood), `accuracy` (share of the labels that are
        the likeliest prediction) and `f1` (macro: the mean over all classes that occur as label or prediction).
        Without: `perplexity` from the mean `loss`, where outputs have one, else `prediction_perplexity`, exp of the
        mean entropy of the predictions, which says how sure the model is and nothing of being right.

    Raises:
        InputError: no outputs, no logits, labels for some of them only, labels of another shape, or none that counts.
    """
    sums, entropies, losses = PredictionSums(), _Mean(), _Mean()
    n_labelled = n_outputs = 0
    for output in outputs:
        n_outputs += 1
        logits, labels = _logits_and_labels(output)
        if labels is not None:
            n_labelled += 1
            for rows, targets in scored_rows(logits, labels):
                sums.add(rows, targets)
            continue
        loss = _field(output, "loss")
        if loss is not None:
            losses.add(float(loss), 1)
        for rows in logits.detach().flatten(0, -2).split(_ROWS):
            entropies.add(float(torch.special.entr(rows.float().softmax(-1)).sum(dtype=torch.float64)), len(rows))
    if not n_outputs:
        raise InputError("there are no outputs to calculate metrics of")
    if n_labelled:
        if n_labelled != n_outputs:
            raise InputError(f"only {n_labelled} of {n_outputs} outputs have labels")
        return sums.metrics()
    if losses.count == n_outputs:
        return {"perplexity": exp(losses.value)}
    return {"prediction_perplexity": exp(entropies.value)}


def scored_rows(logits: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (logits in fp32 (rows, classes), labels (rows)) of the positions that count, some rows at a time.

    Raises:
        InputError: the shapes do not belong together.
    """
    for index, targets in _counted(logits.shape, labels):
        yield logits.detach().flatten(0, -2)[index.to(logits.device)].float(), targets.to(logits.device)


def paired_rows(
    first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield the rows of two models' logits at the same positions (see `scored_rows`).

    Raises:
        InputError: the shapes do not belong together.
    """
    if first.shape != second.shape:
        raise InputError(
            f"the models give logits of different shapes, {tuple(first.shape)} and {tuple(second.shape)}: "
            "they are not two forms of one model"
        )
    firsts, seconds = scored_rows(first, labels), scored_rows(second, labels)
    for (rows, targets), (other_rows, _) in zip(firsts, seconds, strict=True):
        yield rows, other_rows.to(rows.device), targets


def _counted(shape: torch.Size, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (rows of the flattened logits, their labels) of the positions that count."""
    if len(shape) not in (2, 3) or labels.shape != shape[:-1]:
        raise InputError(
            f"labels of shape {tuple(labels.shape)} do not belong to logits of shape {tuple(shape)}; there must be one "
            "for each position"
        )
    targets = labels.detach().long()
    if len(shape) == 3:  # a position predicts the next one; the last predicts what is not there
        targets = F.pad(targets[:, 1:], (0, 1), value=IGNORED_LABEL)
    targets = targets.reshape(-1)
    counting = targets != IGNORED_LABEL
    if bool(((targets[counting] < 0) | (targets[counting] >= shape[-1])).any()):
        raise InputError(f"labels must be below the {shape[-1]} classes of the logits, or {IGNORED_LABEL}")
    for index in counting.nonzero()[:, 0].split(_ROWS):
        yield index, targets[index]


class PredictionSums:
    """Perplexity, accuracy and macro F1 of rows that come a few at a time."""

    def __init__(self) -> None:
        self._loss = _Mean()
        # For each class: how often predicted, how often right to predict, and both.
        self._predicted = self._labelled = self._hits = torch.zeros(0, dtype=torch.long)

    def add(self, rows: torch.Tensor, labels: torch.Tensor) -> None:
        """Count rows of logits (rows, classes) with their labels (rows)."""
        n_classes = rows.shape[-1]
        self._loss.add(float(F.cross_entropy(rows, labels, reduction="none").sum(dtype=torch.float64)), len(labels))
        predictions, labels = rows.argmax(-1).cpu(), labels.cpu()
        self._predicted = _added(self._predicted, predictions, n_classes)
        self._labelled = _added(self._labelled, labels, n_classes)
        self._hits = _added(self._hits, labels[predictions == labels], n_classes)

    @property
    def count(self) -> int:
        """How many labels were counted."""
        return self._loss.count

    def metrics(self) -> dict[str, float]:
        """Return `perplexity`, `accuracy` and `f1`.

        Raises:
            InputError: no label counted.
        """
        if not self.count:
            raise InputError(f"no position has a label: all are {IGNORED_LABEL}, or each batch has one position only")
        occurring = self._predicted + self._labelled
        occurs = occurring > 0
        return {
            "perplexity": exp(self._loss.value),
            "accuracy": int(self._hits.sum()) / self.count,
            "f1": float((2 * self._hits[occurs].double() / occurring[occurs]).mean()),
        }


class AgreementSums:
    """Top-1 agreement and KL divergence of two models' predictions."""

    def __init__(self) -> None:
        self._agreeing, self._divergence = _Mean(), _Mean()

    def add(self, rows: torch.Tensor, other_rows: torch.Tensor) -> None:
        """Count the rows of logits of both models, the reference first."""
        self._agreeing.add(int((rows.argmax(-1) == other_rows.argmax(-1)).sum()), len(rows))
        log_p, log_q = F.log_softmax(rows, -1), F.log_softmax(other_rows, -1)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        # It cannot be negative; sums of rounded terms can.
        self._divergence.add(float(divergence.clamp(min=0).sum(dtype=torch.float64)), len(rows))

    def metrics(self) -> dict[str, float]:
        """Return `top1_agreement` (share) and `kl_divergence` (nats a position, of the second from the first)."""
        return {"top1_agreement": self._agreeing.value, "kl_divergence": self._divergence.value}


def exp(value: float) -> float:
    """Return e to a power; what is too large for a float is infinite."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


class _Mean:
    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def add(self, total: float, count: int) -> None:
        self.total += total
        self.count += count

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan


def _added(counts: torch.Tensor, values: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Return counts with those of more values; a later batch may know more classes."""
    more = torch.bincount(values, minlength=max(n_classes, len(counts)))
    return more + F.pad(counts, (0, len(more) - len(counts)))


def _logits_and_labels(output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    labels = None
    if isinstance(output, tuple) and len(output) == 2 and not hasattr(output, "logits"):
        output, labels = output
    logits = output if isinstance(output, torch.Tensor) else _field(output, "logits")
    if not isinstance(logits, torch.Tensor):
        raise InputError(f"an output of type {type(output).__name__} has no logits; pass what the model returned")
    labels = _field(output, "labels") if labels is None else labels
    return logits, None if labels is None else torch.as_tensor(labels)


def _field(output: Any, name: str) -> Any:
    if isinstance(output, torch.Tensor):
        return None
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
