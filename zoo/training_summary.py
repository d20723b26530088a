"""What is known about a saved model's training, in a file beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


SUMMARY = "training_summary.json"


def read_training_summary(folder: str | os.PathLike) -> dict[str, Any]:
    """What is known about the training of a saved model, from `training_summary.json` beside it.

    All keys are optional, others are ignored:

        {"datasets": ["easy-vqa", ...],          names, or ids on the Hub
         "recipe": "stage 2",                    how it was trained, in a few words
         "steps": 860, "seconds": 1200.0,        optimizer steps; wall time
         "hardware": "2 CPU cores",
         "arguments": {"learning_rate": 0.001},  hyper-parameters
         "evaluation": [{"dataset": "easy-vqa", "split": "test", "metric": "accuracy", "value": 0.962}, ...],
         "description": "...", "notes": "...", "evaluation_notes": "...", "limits": "...",   Markdown, for people
         "license": "mit", "language": "en"}     of the bridge's own weights; of the texts

    An evaluation may also name the `"task"` within the data set that its value is for. Licences are the Hub's
    identifiers.

    Returns:
        The summary; empty where there is none.

    Raises:
        ValueError: It is not of this form.
    """
    path = Path(folder) / SUMMARY
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path} holds a {type(summary).__name__}; expected an object.")
    kinds = {
        "datasets": list, "recipe": str, "steps": int, "seconds": (int, float), "hardware": str, "arguments": dict,
        "evaluation": list, "description": str, "notes": str, "evaluation_notes": str, "limits": str, "license": str,
        "language": (str, list),
    }  # fmt: skip
    for key, kind in kinds.items():
        if summary.get(key) is None:
            summary.pop(key, None)
        elif not isinstance(summary[key], kind) or isinstance(summary[key], bool):
            wanted = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{path} has {key}={summary[key]!r}; expected {wanted}.")
    for result in summary.get("evaluation", []):
        missing = {"dataset", "metric", "value"} - set(result if isinstance(result, dict) else ())
        if missing or isinstance(result["value"], bool) or not isinstance(result["value"], (int, float)):
            raise ValueError(
                f"{path} has the evaluation {result!r}; expected an object with dataset, metric and a number as value, "
                "and perhaps split and task."
            )
    return summary


__all__ = ["SUMMARY", "read_training_summary"]
