"""`evaluate_accuracy_impact`: an optimised model beside the original, on the same data, position by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .metrics import IGNORED_LABEL, AgreementSums, PredictionSums, ScoredOutput, paired_rows


class AccuracyImpact(dict[str, float]):
    """Metric -> how far the optimised model is from the baseline (section 6.3 of the specification).

    `perplexity`, `accuracy` and `f1` are absolute differences. Three figures compare the models themselves:
    `top1_agreement` (share of the positions where both find the same token likeliest), `kl_divergence` (mean, in nats,
    of the optimised predictions from those of the baseline) and `layer_relative_error` (the largest of `layers`; only
    where the models have layers of the same names).

    Attributes:
        baseline: the metrics of the baseline itself.
        optimized: the metrics of the optimised model itself.
        layers: name of a layer -> relative error of its output, the norm of the difference over that of the baseline's.
            Errors of the layers before are part of it.
        n_positions: how many predictions were compared.
    """

    def __init__(
        self,
        differences: Mapping[str, float],
        *,
        baseline: dict[str, float],
        optimized: dict[str, float],
        layers: dict[str, float],
        n_positions: int,
    ) -> None:
        super().__init__(differences)
        self.baseline = baseline
        self.optimized = optimized
        self.layers = layers
        self.n_positions = n_positions


def evaluate_accuracy_impact(
    model_with_optimizations: Any, baseline_model: Any, test_dataset: Iterable[Any]
) -> AccuracyImpact:
    """Return how far an optimised model is from the original on the same data.

    Args:
        model_with_optimizations: as `create_optimized_model` returns it.
        baseline_model: the same model without optimisations; it must be another object with weights of its own.
        test_dataset: batches, read once. A batch is what both models are called with: token ids (batch, positions), or
            a mapping of keyword arguments, which may hold `labels`; or a pair (one of these, labels). Where there are
            no labels, each token is to be predicted from those before it; padding (`attention_mask`) and the places of
            images (`mm_token_type_ids`) do not count. Labels of -100 do not count.

    Returns:
        Metric -> absolute difference, with the figures behind it as attributes.

    Raises:
        InputError: no batch, one without labels that are no token ids, or models that are not two forms of one model.
    """
    baseline_sums, optimized_sums, agreement = PredictionSums(), PredictionSums(), AgreementSums()
    layers = LayerErrors(baseline_model, model_with_optimizations)
    n_batches = 0
    for n_batches, batch in enumerate(test_dataset, 1):  # noqa: B007 - counted for the error below
        inputs, labels, mask = split_batch(batch)
        with torch.no_grad():
            with layers.recording(mask):
                baseline = _logits(baseline_model, inputs)
            with layers.comparing():
                optimized = _logits(model_with_optimizations, inputs)
            for rows, other_rows, targets in paired_rows(baseline, optimized, labels):
                baseline_sums.add(rows, targets)
                optimized_sums.add(other_rows, targets)
                agreement.add(rows, other_rows)
    if not n_batches:
        raise InputError("the test dataset is empty; an iterator can be read only once")
    before, after = baseline_sums.metrics(), optimized_sums.metrics()
    differences = {metric: _distance(before[metric], after[metric]) for metric in before} | agreement.metrics()
    errors = layers.relative_errors()
    if errors:
        # Not `max`: it passes over a NaN unless that comes first.
        differences["layer_relative_error"] = float(torch.tensor(list(errors.values()), dtype=torch.float64).max())
    return AccuracyImpact(differences, baseline=before, optimized=after, layers=errors, n_positions=baseline_sums.count)


def score(model: Any, batch: Any) -> ScoredOutput:
    """Return what a model predicts for a batch (see `evaluate_accuracy_impact`), with the labels that go with it."""
    inputs, labels, _ = split_batch(batch)
    with torch.no_grad():
        return ScoredOutput(_logits(model, inputs), labels)


def split_batch(batch: Any) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """Return what a model is called with, the labels, and which positions are no padding (batch, positions), if told.

    Raises:
        InputError: there are no labels and none follow from the inputs.
    """
    labels = mask = None
    if isinstance(batch, list | tuple) and len(batch) in (1, 2):
        batch, labels = batch if len(batch) == 2 else (batch[0], None)
    ids = batch
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        found = inputs.pop("labels", None)
        labels = found if labels is None else labels
        batch, ids, mask = inputs, inputs.get("input_ids"), inputs.get("attention_mask")
    if labels is None:
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.dim() != 2:
            raise InputError(
                "a batch without labels must be token ids (batch, positions) or have them as 'input_ids'; "
                "give pairs (inputs, labels) otherwise"
            )
        labels = ids.clone()
        if mask is not None:
            labels[mask == 0] = IGNORED_LABEL
        kinds = batch.get("mm_token_type_ids") if isinstance(batch, Mapping) else None
        if kinds is not None:
            labels[kinds != 0] = IGNORED_LABEL
    return batch, torch.as_tensor(labels), mask


class LayerErrors:
    """Relative errors of the outputs of layers, the entries of the module lists that two models have in common."""

    def __init__(self, baseline: Any, optimized: Any) -> None:
        first, second = _layers(baseline), _layers(optimized)
        self._pairs = {name: (module, second[name]) for name, module in first.items() if name in second}
        self._expected: dict[str, list[torch.Tensor]] = {}
        self._mask: torch.Tensor | None = None
        self._squares = {name: (0.0, 0.0) for name in self._pairs}
        self._compared: set[str] = set()

    @contextmanager
    def recording(self, mask: torch.Tensor | None) -> Iterator[None]:
        """Keep the outputs of the baseline's layers that come within the block; `mask` tells padding."""
        self._mask, self._expected = mask, {}

        def record(name: str, output: torch.Tensor) -> None:
            # A copy: some models go on writing into what a layer returned.
            self._expected.setdefault(name, []).append(self._unpadded(output).clone())

        with _hooked({name: pair[0] for name, pair in self._pairs.items()}, record):
            yield

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Compare those of the optimised model that come within the block; a layer it left out is not compared."""

        def compare(name: str, output: torch.Tensor) -> None:
            expected, found = self._expected.get(name, []), self._unpadded(output)
            if not expected or expected[0].shape != found.shape:
                return
            reference = expected.pop(0).to(found.device, torch.float32)
            error, norm = self._squares[name]
            error += float((found.float() - reference).square().sum(dtype=torch.float64))
            norm += float(reference.square().sum(dtype=torch.float64))
            self._squares[name] = error, norm
            self._compared.add(name)

        with _hooked({name: pair[1] for name, pair in self._pairs.items()}, compare):
            yield
        self._expected = {}

    def relative_errors(self) -> dict[str, float]:
        """Return name -> norm of the difference over norm of the baseline's output, over all that was compared."""
        return {
            name: _ratio(math.sqrt(error), math.sqrt(norm))
            for name, (error, norm) in self._squares.items()
            if name in self._compared
        }

    def _unpadded(self, output: torch.Tensor) -> torch.Tensor:
        output, mask = output.detach(), self._mask
        if mask is None or output.shape[:-1] != mask.shape:
            return output
        return output[mask.to(output.device) != 0]


def _layers(model: Any) -> dict[str, nn.Module]:
    """Return the entries of the outermost module lists of a model, by name."""
    if not isinstance(model, nn.Module):
        return {}
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return {
        f"{name}.{index}" if name else str(index): layer
        for name in outermost
        for index, layer in enumerate(model.get_submodule(name).children())
    }


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], on_output: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Hand the outputs of modules to a function while the block runs."""

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, torch.Tensor):
                on_output(name, hidden)

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _logits(model: Any, inputs: Any) -> torch.Tensor:
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise InputError(f"{type(model).__name__} returned {type(output).__name__}, which has no logits")
    return logits


def _distance(first: float, second: float) -> float:
    return 0.0 if first == second else abs(first - second)  # two infinite perplexities do not differ


def _ratio(error: float, norm: float) -> float:
    if norm:
        return error / norm
    return math.inf if error else error  # 0, or NaN
