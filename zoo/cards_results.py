"""Results of evaluations on the model card of a saved model."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from .cards import card_of_folder
from .files import write_text


CARD = "README.md"
_SECTION = re.compile(r"^## Evaluation$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^\|.*\|\n?", re.MULTILINE)
_AFTER = "## Intended use and limits"


def _key(result: EvalResult) -> tuple:
    return result.dataset_name, result.dataset_split, result.metric_name


def _cell(value) -> str:
    return "" if value is None else str(value).replace("|", "\\|")


def add_results(folder: str | os.PathLike, results: Sequence[EvalResult]) -> Path:
    """Write results into the card of a saved model: its header (`model-index`) and the table of its evaluation.

    A card that is not there is made first. Older results of the same data set, split and metric are replaced; all else
    that the card says stays.

    Args:
        folder: Of the saved model.
        results: What was measured, with the data set's and the split's real names.

    Returns:
        The card's file.

    Raises:
        ValueError: There is no bridged model in the folder, or its card's header can't be read.
        OSError: The card can't be written.
    """
    folder = Path(folder)
    path = folder / CARD
    try:
        card = ModelCard.load(path) if path.is_file() else card_of_folder(folder)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the card's header can't be read: {error}") from error
    merged = {_key(result): result for result in [*(card.data.eval_results or []), *results]}
    card.data.eval_results = list(merged.values())
    card.data.model_name = getattr(card.data, "model_name", None) or folder.resolve().name
    card.data.metrics = sorted({*(getattr(card.data, "metrics", None) or []), *(r.metric_type for r in results)})
    card.text = _with_table(card.text, card.data.eval_results)
    write_text(path, str(card))
    return path


def _with_table(text: str, results: Sequence[EvalResult]) -> str:
    """A card's text with the table of all results in the section `## Evaluation`, which is added if it is missing."""
    rows = ["| data set | split | metric | value |", "|---|---|---|---|"]
    for result in results:
        cells = (result.dataset_name, result.dataset_split, result.metric_name, result.metric_value)
        rows.append(f"| {' | '.join(map(_cell, cells))} |")
    table = "\n".join(rows) + "\n"
    found = _SECTION.search(text)
    if found is None:
        start = text.find(_AFTER)
        start = len(text) if start < 0 else start
        before = text[:start].rstrip("\n")
        return f"{before}\n\n## Evaluation\n\n{table}\n{text[start:]}".rstrip("\n") + "\n"
    section = found.group()
    old = _ROW.search(section)
    if old is None:
        section = f"{section.rstrip()}\n\n{table}\n"
    else:
        section = section[: old.start()] + table + _ROW.sub("", section[old.start() :])
    return text[: found.start()] + section + text[found.end() :]


__all__ = ["CARD", "add_results"]
