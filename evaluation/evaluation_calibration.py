"""Whether a classifier's probabilities are as often right as they say, and a temperature that makes them so.

Source: Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599): reliability diagrams and expected
calibration error in section 2, temperature scaling in section 4.2.
"""

from __future__ import annotations

import torch
from torch import nn


def _checked(scores: torch.Tensor, labels: torch.Tensor, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    scores, labels = torch.as_tensor(scores).detach().double().cpu(), torch.as_tensor(labels).detach().cpu()
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(
            f"{what} have shape {tuple(scores.shape)} and labels {tuple(labels.shape)}; expected (examples, classes) "
            "and (examples,), with at least one example."
        )
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= scores.shape[1]:
        raise ValueError(f"A label is not the number of one of {scores.shape[1]} classes, counted from 0.")
    return scores, labels.long()


def _probabilities(probabilities: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    probabilities, labels = _checked(probabilities, labels, "probabilities")
    if bool((probabilities < 0).any()) or not torch.allclose(
        probabilities.sum(dim=1), torch.ones(len(labels)).double(), atol=1e-4
    ):
        raise ValueError("The probabilities of an example don't sum to one: give softmax of the logits.")
    return probabilities, labels


def reliability(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 10) -> list[dict]:
    """How sure a classifier is, against how often it is right.

    Args:
        probabilities: `(examples, classes)`; rows sum to one.
        labels: `(examples,)`, the true classes.
        bins: Number of bins of equal width, from 0 to 1.

    Returns:
        One row per bin that is not empty: `low` and `high`, its limits; `count`, how many examples have their largest
        probability in it; `confidence`, the mean of that; and `accuracy`, the share of them whose likeliest class is
        the true one.

    Raises:
        ValueError: Shapes or labels don't fit, rows don't sum to one, or there are no bins.
    """
    probabilities, labels = _probabilities(probabilities, labels)
    if bins < 1:
        raise ValueError(f"bins is {bins}; expected at least 1.")
    confidence, predicted = probabilities.max(dim=1)
    right = (predicted == labels).double()
    places = (confidence * bins).long().clamp(max=bins - 1)
    return [
        {
            "low": place / bins,
            "high": (place + 1) / bins,
            "count": int((places == place).sum()),
            "confidence": float(confidence[places == place].mean()),
            "accuracy": float(right[places == place].mean()),
        }
        for place in places.unique().tolist()
    ]


def calibration_error(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 10) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy, weighed by the bins' counts.

    Args:
        probabilities: As for `reliability`.
        labels: As for `reliability`.
        bins: As for `reliability`. With few examples it is above 0 by chance alone, the more so with many bins.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: As for `reliability`.
    """
    rows = reliability(probabilities, labels, bins)
    total = sum(row["count"] for row in rows)
    return sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / total


def brier_score(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean squared distance of the probabilities from the truth: 0 is best, 2 is sure and always wrong.

    Args:
        probabilities: As for `reliability`.
        labels: As for `reliability`.

    Raises:
        ValueError: As for `reliability`.
    """
    probabilities, labels = _probabilities(probabilities, labels)
    truth = nn.functional.one_hot(labels, probabilities.shape[1])
    return float((probabilities - truth).square().sum(dim=1).mean())


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature that makes a classifier's probabilities fit best: `softmax(logits / temperature)`.

    It changes how sure the classifier is, and never which class is the likeliest.

    Args:
        logits: `(examples, classes)`, of examples that were not trained on.
        labels: `(examples,)`, the true classes.

    Returns:
        The temperature with the smallest cross-entropy, from 0.01 to 100: above 1 for a classifier that is too sure.

    Raises:
        ValueError: Shapes or labels don't fit.
    """
    logits, labels = _checked(logits, labels, "logits")

    def slope(inverse: float) -> float:
        """Of the cross-entropy, which is convex in the inverse temperature."""
        expected = ((logits * inverse).softmax(dim=1) * logits).sum(dim=1)
        return float((expected - logits.gather(1, labels[:, None])[:, 0]).mean())

    low, high = 0.01, 100.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / middle


__all__ = ["brier_score", "calibration_error", "fit_temperature", "reliability"]
