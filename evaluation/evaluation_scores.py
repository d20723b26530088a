"""From predictions to a task's figures: percent, with confidence intervals and a breakdown by kind of question."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from huggingface_hub import EvalResult

from .evaluation_captions import CAPTION_METRICS, score_captions
from .evaluation_metrics import confidence_interval, exact_match, letter_of, says_yes, vqa_accuracy, yes_no_scores
from .evaluation_samples import Sample
from .evaluation_tasks import Task


DRAWS = 1000
INTERVALS = f"95 % of {DRAWS} bootstrap draws of pictures, all questions about a picture together"
_TOP = 5  # classes
_RECALLS = (1, 5, 10)


def _metric(value: float, interval: tuple[float, float] | None = None) -> dict:
    low, high = (None, None) if interval is None else (round(100 * end, 4) for end in interval)
    return {"value": round(100 * float(value), 4), "low": low, "high": high}


def _accuracy(values: Sequence[float], groups: Sequence, seed: int, name: str = "accuracy") -> dict:
    return {name: _metric(np.mean(values), confidence_interval(np.array(values), groups, seed=seed, draws=DRAWS))}


def _by_kind(samples: Sequence[Sample], figures: Callable[[list[int]], dict[str, float]]) -> dict:
    """Figures of each kind of sample, in percent, where there are several."""
    kinds: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        kinds.setdefault(sample.kind or "other", []).append(number)
    if len(kinds) < 2:
        return {}
    return {
        kind: {
            "samples": len(numbers),
            **{name: round(100 * float(value), 4) for name, value in figures(numbers).items()},
        }
        for kind, numbers in sorted(kinds.items())
    }


def _mean_of(values: Sequence[float], name: str = "accuracy") -> Callable[[list[int]], dict[str, float]]:
    return lambda numbers: {name: float(np.mean([values[number] for number in numbers]))}


def _score_answers(task: Task, samples, rows, groups, seed) -> dict:
    def value(sample: Sample, row: dict) -> float:
        if task.score == "vqa":
            return vqa_accuracy(row["prediction"], sample.references)
        if task.score == "letters":
            return float(letter_of(row["prediction"], len(sample.choices or ())) in sample.references)
        return exact_match(row["prediction"], sample.references)

    values = [value(sample, row) for sample, row in zip(samples, rows)]
    return {"metrics": _accuracy(values, groups, seed), "breakdown": _by_kind(samples, _mean_of(values)), "notes": []}


def _score_yes_no(task: Task, samples, rows, groups, seed) -> dict:
    counts = np.zeros((len(rows), 4))
    for number, (sample, row) in enumerate(zip(samples, rows)):
        said, right = says_yes(row["prediction"]), sample.references[0] == "yes"
        counts[number, (0 if right else 1) if said else (3 if right else 2)] = 1

    def figures(numbers) -> dict[str, float]:
        return {name: float(value) for name, value in yes_no_scores(counts[numbers].sum(axis=0)).items()}

    metrics = {}
    for name, value in figures(slice(None)).items():
        interval = confidence_interval(
            counts, groups, lambda means, name=name: yes_no_scores(means)[name], seed=seed, draws=DRAWS
        )
        metrics[name] = _metric(value, interval)
    return {"metrics": metrics, "breakdown": _by_kind(samples, figures), "notes": []}


def _score_captions(task: Task, samples, rows, groups, seed) -> dict:
    texts = [row["prediction"] for row in rows]
    references = [sample.references for sample in samples]
    found = score_captions(texts, references, CAPTION_METRICS)
    metrics = {}
    for name, value in found.scores.items():
        each = found.of_samples.get(name)
        interval = None if each is None else confidence_interval(np.array(each), groups, seed=seed, draws=DRAWS)
        metrics[name] = _metric(value, interval)
    notes = [*found.notes]
    if without := [name for name in found.scores if name not in found.of_samples]:
        notes.append(f"{', '.join(without)}: scores of the whole set, without intervals.")

    def figures(numbers: list[int]) -> dict[str, float]:
        return score_captions([texts[n] for n in numbers], [references[n] for n in numbers], ("CIDEr",)).scores

    return {"metrics": metrics, "breakdown": _by_kind(samples, figures), "notes": notes}


def _score_classes(task: Task, samples, rows, groups, seed) -> dict:
    first = [float(row["prediction"] in sample.references) for sample, row in zip(samples, rows)]
    metrics = _accuracy(first, groups, seed)
    if len(samples[0].choices or ()) > _TOP:
        top = [float(bool(set(row["ranked"][:_TOP]) & set(sample.references))) for sample, row in zip(samples, rows)]
        metrics |= _accuracy(top, groups, seed, f"top-{_TOP} accuracy")
    return {"metrics": metrics, "breakdown": _by_kind(samples, _mean_of(first)), "notes": []}


def _score_retrieval(task: Task, samples, rows, groups, seed) -> dict:
    metrics = {}
    for direction in ("image to text", "text to image"):
        chosen = [row for row in rows if row["direction"] == direction]
        pictures = [row["references"][0] if direction == "text to image" else row["id"] for row in chosen]
        for how in ("itm", "itc"):
            if f"rank_{how}" in chosen[0]:
                for k in _RECALLS:
                    hits = [float(row[f"rank_{how}"] <= k) for row in chosen]
                    metrics |= _accuracy(hits, pictures, seed, f"{direction} R@{k}, {how.upper()}")
    return {"metrics": metrics, "breakdown": {}, "notes": []}


_SCORERS = {
    "captions": _score_captions,
    "classes": _score_classes,
    "exact": _score_answers,
    "letters": _score_answers,
    "pope": _score_yes_no,
    "retrieval": _score_retrieval,
    "vqa": _score_answers,
}


def score(task: Task, samples: Sequence[Sample], rows: Sequence[dict], seed: int = 0) -> dict:
    """A task's figures.

    Args:
        task: The task.
        samples: What was asked.
        rows: Predictions, a row per sample; of retrieval those of `rank_all`.
        seed: Of the bootstrap.

    Returns:
        `metrics`, by name `{"value", "low", "high"}` in percent (CIDEr times 100, as published); `breakdown`, by kind
        of sample the number of samples and figures; and `notes`, what is missing and why.

    Raises:
        ImportError: Captions are scored, and pycocoevalcap is not installed.
        OSError: A Java program can't be run.
    """
    return _SCORERS[task.score](task, samples, rows, [sample.image_key for sample in samples], seed)


def table_lines(result: dict) -> list[str]:
    """Results as a table for the terminal.

    Args:
        result: What `evaluate` gives.
    """
    baselines = result["baselines"]
    shots = f", {result['shots']} shots ({result['demonstrations']['how']})" if result["shots"] else ""
    what = f"{result['dataset']} ({result['split_name']}){shots}, {result['samples']:,} samples"
    lines = [f"{result['model']['name']}: {what}", ""]
    rows = [("", result["dataset"], "95 %", *baselines)]
    for name, metric in result["metrics"].items():
        others = [_figure(baseline["metrics"].get(name, {}).get("value")) for baseline in baselines.values()]
        rows.append((name, _figure(metric["value"]), _range(metric), *others))
    for kind, figures in result["breakdown"].items():
        name, value = next((name, value) for name, value in figures.items() if name != "samples")
        others = [_figure(baseline["breakdown"].get(kind, {}).get(name)) for baseline in baselines.values()]
        rows.append((f"  {kind} ({figures['samples']:,}): {name}", _figure(value), "", *others))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    notes = [*result["notes"], *(f"{name}: {baseline['how']}" for name, baseline in baselines.items())]
    return lines + ([""] if notes else []) + notes


def eval_results(result: dict) -> list[EvalResult]:
    """Results as the Hub reads them on model cards, with the data set's and the split's real names.

    Args:
        result: What `evaluate` gives.
    """
    shots, kind = result["shots"], result["kind"]
    if shots:
        shown = result["demonstrations"]
        setting = f", {shots} shots" + (" (RICES)" if shown["how"] == "rices" else "")
        setting += " without pictures" if shown["text_only"] else ""
    else:
        setting = ""
    if result["samples"] < result["samples_of_split"]:
        setting += f", {result['samples']:,} of {result['samples_of_split']:,} samples"
    return [
        EvalResult(
            task_type=_TASK_TYPES.get(kind, "image-text-to-text"),
            dataset_type=_slug(result["dataset"]),
            dataset_name=result["dataset"],
            dataset_split=result["split_name"],
            metric_type=_slug(name.partition(",")[0]),
            metric_name=f"{name}{setting}",
            metric_value=metric["value"],
        )
        for name, metric in result["metrics"].items()
    ]


_TASK_TYPES = {"class": "image-classification", "retrieval": "zero-shot-image-classification"}


def _slug(name: str) -> str:
    return re.sub(r"[^\w./-]+", "-", name).strip("-").lower()


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _range(metric: dict) -> str:
    return "" if metric["low"] is None else f"{metric['low']:.2f} to {metric['high']:.2f}"


__all__ = ["DRAWS", "INTERVALS", "eval_results", "score", "table_lines"]
