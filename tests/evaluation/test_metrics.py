import math
from types import SimpleNamespace

import pytest
import torch

from qwen3_vl_memory_optimizations import InputError, calculate_metrics
from qwen3_vl_memory_optimizations.evaluation import ScoredOutput
from qwen3_vl_memory_optimizations.evaluation.metrics import AgreementSums


def logits_of(*probabilities):
    return torch.tensor(probabilities).log()


def test_a_classifier_by_hand():
    logits = logits_of([0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6])
    metrics = calculate_metrics([ScoredOutput(logits, torch.tensor([0, 1, 1, 2]))])
    assert metrics["perplexity"] == pytest.approx((0.5 * 0.8 * 0.3 * 0.6) ** -0.25)
    assert metrics["accuracy"] == 0.75
    # Class 0: precision 1/2, recall 1; class 1: 1, 1/2; class 2: 1, 1.
    assert metrics["f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert list(metrics) == ["perplexity", "accuracy", "f1"]


def test_a_position_of_a_language_model_is_held_against_the_next_label():
    logits = logits_of([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    metrics = calculate_metrics([ScoredOutput(logits, torch.tensor([[1, 0, 0]]))])
    assert metrics["perplexity"] == pytest.approx((0.9 * 0.2) ** -0.5)
    assert metrics["accuracy"] == 0.5


def test_labels_of_minus_100_do_not_count():
    logits = logits_of([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    metrics = calculate_metrics([ScoredOutput(logits, torch.tensor([[1, -100, 1]]))])
    assert metrics == {"perplexity": pytest.approx(1 / 0.8), "accuracy": 1.0, "f1": 1.0}


def f1_as_scikit_learn_defines_it(labels, predictions):
    """`f1_score(labels, predictions, average="macro", zero_division=0)`, from precision and recall."""
    scores = []
    for label in sorted({*labels, *predictions}):
        right = sum(a == b == label for a, b in zip(labels, predictions, strict=True))
        precision = right / predictions.count(label) if label in predictions else 0.0
        recall = right / labels.count(label) if label in labels else 0.0
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("n_classes", [2, 7, 300])
def test_many_rows_in_batches_of_several_sizes(n_classes):
    generator = torch.Generator().manual_seed(n_classes)
    outputs = []
    for n_rows in (1, 128, 300):  # below, at and above what is computed at once
        logits = torch.randn(n_rows, n_classes, generator=generator)
        outputs.append((logits, torch.randint(n_classes, (n_rows,), generator=generator)))
    logits, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    metrics = calculate_metrics(outputs)
    predictions = logits.argmax(-1)
    assert metrics["accuracy"] == pytest.approx((predictions == labels).double().mean().item())
    assert metrics["f1"] == pytest.approx(f1_as_scikit_learn_defines_it(labels.tolist(), predictions.tolist()))
    chosen = logits.double().softmax(-1)[torch.arange(len(labels)), labels]
    assert metrics["perplexity"] == pytest.approx(math.exp(-chosen.log().mean().item()), rel=1e-5)


@pytest.mark.parametrize("form", ["attributes", "keys", "pair with an output", "pair with logits"])
def test_outputs_come_in_several_forms(form):
    logits, labels = torch.eye(3) * 9, torch.tensor([0, 1, 0])
    output = {
        "attributes": SimpleNamespace(logits=logits, labels=labels),
        "keys": {"logits": logits, "labels": labels},
        "pair with an output": (SimpleNamespace(logits=logits), labels),
        "pair with logits": (logits, labels),
    }[form]
    assert calculate_metrics(iter([output]))["accuracy"] == pytest.approx(2 / 3)


def test_outputs_without_labels_tell_the_loss_or_how_sure_they_are():
    logits = torch.zeros(1, 4, 8)
    assert calculate_metrics([SimpleNamespace(logits=logits, loss=torch.tensor(2.0))]) == {
        "perplexity": pytest.approx(math.exp(2))
    }
    sure = logits.clone()
    sure[..., 0] = 100
    assert calculate_metrics([SimpleNamespace(logits=logits), SimpleNamespace(logits=sure)]) == {
        "prediction_perplexity": pytest.approx(math.sqrt(8))
    }


def test_what_cannot_be_is_infinitely_perplexing_and_what_is_no_number_stays_none():
    logits = torch.tensor([[0.0, -1e4]])
    assert calculate_metrics([(logits, torch.tensor([1]))])["perplexity"] == math.inf
    assert math.isnan(calculate_metrics([(logits * math.nan, torch.tensor([1]))])["perplexity"])


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "no outputs"),
        ([object()], "no logits"),
        ([(torch.zeros(2, 3), torch.zeros(3).long())], "do not belong"),
        ([(torch.zeros(2, 3), torch.tensor([0, 3]))], "below the 3 classes"),
        ([(torch.zeros(2, 3), torch.tensor([0, -1]))], "below the 3 classes"),
        ([(torch.zeros(2, 3), torch.tensor([-100, -100]))], "no position has a label"),
        ([(torch.zeros(1, 1, 3), torch.zeros(1, 1).long())], "no position has a label"),
        ([(torch.zeros(2, 3), torch.zeros(2).long()), torch.zeros(2, 3)], "only 1 of 2"),
    ],
)
def test_what_has_no_metrics_is_refused(outputs, message):
    with pytest.raises(InputError, match=message):
        calculate_metrics(outputs)


def test_agreement_and_divergence_by_hand():
    sums = AgreementSums()
    sums.add(logits_of([0.75, 0.25], [0.4, 0.6]), logits_of([0.5, 0.5], [0.6, 0.4]))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5) + 0.4 * math.log(2 / 3) + 0.6 * math.log(1.5)
    assert sums.metrics() == {"top1_agreement": 0.5, "kl_divergence": pytest.approx(expected / 2)}


def test_equal_predictions_diverge_by_nothing():
    rows = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    sums = AgreementSums()
    sums.add(rows, rows.clone())
    assert sums.metrics() == {"top1_agreement": 1.0, "kl_divergence": 0.0}
