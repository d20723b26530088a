"""Calibration, against slow sums and a search over temperatures."""

from __future__ import annotations

import pytest
import torch

from vlbridge.evaluation.evaluation_calibration import brier_score, calibration_error, fit_temperature, reliability


def drawn(examples: int = 400, classes: int = 3, sharper: float = 1.0, seed: int = 0):
    """Logits, and labels that are drawn from the softmax of a share of them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(examples, classes, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return sharper * logits, labels


def test_reliability_by_hand():
    probabilities, labels = drawn()
    probabilities = probabilities.softmax(dim=1)
    rows = reliability(probabilities, labels, bins=5)
    found: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probabilities.double().tolist(), labels.tolist()):
        found.setdefault(min(int(max(row) * 5), 4), []).append((max(row), row.index(max(row)) == label))
    assert [row["low"] for row in rows] == [pytest.approx(place / 5) for place in sorted(found)]
    error = 0.0
    for row, place in zip(rows, sorted(found)):
        sure, right = (sum(values) / len(values) for values in zip(*found[place]))
        assert (row["count"], row["confidence"], row["accuracy"]) == (
            len(found[place]),
            pytest.approx(sure),
            pytest.approx(right),
        )
        error += len(found[place]) / len(labels) * abs(sure - right)
    assert calibration_error(probabilities, labels, bins=5) == pytest.approx(error)
    by_hand = [
        sum((value - (number == label)) ** 2 for number, value in enumerate(row))
        for row, label in zip(probabilities.double().tolist(), labels.tolist())
    ]
    assert brier_score(probabilities, labels) == pytest.approx(sum(by_hand) / len(by_hand))


def test_certainty():
    right = torch.eye(3)
    assert reliability(right, torch.arange(3)) == [
        {"low": 0.9, "high": 1.0, "count": 3, "confidence": 1.0, "accuracy": 1.0}
    ]
    assert calibration_error(right, torch.arange(3)) == brier_score(right, torch.arange(3)) == 0
    wrong = torch.tensor([1, 2, 0])
    assert calibration_error(right, wrong) == 1 and brier_score(right, wrong) == 2


@pytest.mark.parametrize("sharper", [0.5, 1.0, 4.0])
def test_temperature_is_the_best_of_a_search(sharper):
    logits, labels = drawn(sharper=sharper)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(sharper, rel=0.25)  # of 400 examples

    def loss(value: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits.double() / value, labels))

    assert all(loss(temperature) <= loss(temperature * factor) for factor in (0.9, 0.99, 0.999, 1.001, 1.01, 1.1))
    before = calibration_error(logits.softmax(dim=1), labels)
    after = calibration_error((logits / temperature).softmax(dim=1), labels)
    assert after < before or sharper == 1.0


def test_temperature_stays_in_its_range():
    # the more certain the better, without an end; and where all answers are wrong, the less certain the better
    assert fit_temperature(0.1 * torch.eye(3), torch.arange(3)) == pytest.approx(0.01, rel=1e-3)
    assert fit_temperature(10 * torch.eye(3), torch.tensor([1, 2, 0])) == pytest.approx(100, rel=1e-3)


def test_what_does_not_fit_is_refused():
    probabilities = torch.full((2, 2), 0.5)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) and labels \(3,\)"):
        reliability(probabilities, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="not the number of one of 2 classes"):
        brier_score(probabilities, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="softmax"):
        calibration_error(torch.randn(2, 2).abs() + 1, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="bins is 0"):
        reliability(probabilities, torch.zeros(2, dtype=torch.long), bins=0)
    with pytest.raises(ValueError, match="at least one example"):
        fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
