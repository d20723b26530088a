"""Scores of captions, by pycocoevalcap: CIDEr, BLEU, ROUGE-L, METEOR and SPICE."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


#: In the order of the table. METEOR and SPICE are Java programs, and so is the tokenizer of published scores.
CAPTION_METRICS = ("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "METEOR", "SPICE")
PLAIN = "plain tokenizer"
_SPICE_NEEDS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


@dataclass
class CaptionScores:
    """Scores of a set of captions.

    Args:
        scores: Per metric the score of the set, from 0 (CIDEr may exceed 1, and is published times 100).
        of_samples: Per metric whose score is the mean over the pictures: each picture's.
        tokenizer: `"PTB"`, as for published scores, or `PLAIN`.
        notes: What is missing, and why.
    """

    scores: dict[str, float] = field(default_factory=dict)
    of_samples: dict[str, list[float]] = field(default_factory=dict)
    tokenizer: str = "PTB"
    notes: list[str] = field(default_factory=list)


def has_java() -> bool:
    """Whether there is a `java` to run."""
    return shutil.which("java") is not None


def plain_tokens(text: str) -> str:
    """Words in lower case, separated by spaces: what stands in for the PTB tokenizer where there is no Java."""
    return " ".join(re.findall(r"\w+(?:['’]\w+)*", text.lower()))


def _scorer(name: str):
    """A class of pycocoevalcap.

    Raises:
        ImportError: It is not installed.
    """
    module, _, cls = name.rpartition(".")
    try:
        return getattr(importlib.import_module(f"pycocoevalcap.{module}"), cls)
    except ModuleNotFoundError as error:
        raise ImportError(f'{error}; scores of captions need more packages: pip install "vlbridge[eval]"') from error


def _tokenized(texts: dict[int, list[str]], java: bool) -> dict[int, list[str]]:
    # one line per caption: what else Java takes for the end of a line would shift all captions after it
    clean = {number: [" ".join(text.split()) for text in group] for number, group in texts.items()}
    if not java:
        return {number: [plain_tokens(text) for text in group] for number, group in clean.items()}
    rows = {number: [{"caption": text} for text in group] for number, group in clean.items()}
    tokenized = _scorer("tokenizer.ptbtokenizer.PTBTokenizer")().tokenize(rows)
    if {number: len(group) for number, group in tokenized.items()} != {n: len(group) for n, group in clean.items()}:
        raise OSError("Java's PTB tokenizer gave another number of captions than it got; see its messages above.")
    return tokenized


def score_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] = CAPTION_METRICS,
    java: bool | None = None,
) -> CaptionScores:
    """Score one caption per picture.

    Args:
        predictions: The captions.
        references: Per picture what people wrote.
        metrics: Some of `CAPTION_METRICS`.
        java: Whether to use Java; `None`: if there is one. Without, captions are tokenized plainly: CIDEr is then
            reported as `"CIDEr-D, plain tokenizer"`, the others with the same words, and METEOR and SPICE are missing.
            (pycocoevalcap's CIDEr, which is what papers report, has the clipping and length penalty of CIDEr-D too.)

    Raises:
        ValueError: There are no pictures, one has no references, or a metric is unknown.
        ImportError: pycocoevalcap is not installed.
        OSError: A Java program can't be run.
    """
    if unknown := [name for name in metrics if name not in CAPTION_METRICS]:
        raise ValueError(f"metric {unknown[0]!r}; expected some of {', '.join(CAPTION_METRICS)}.")
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"{len(predictions)} captions, and references of {len(references)} pictures; expected as many")
    if empty := [number for number, group in enumerate(references) if not group]:
        raise ValueError(f"picture {empty[0]} has no references.")
    java = has_java() if java is None else java
    result = CaptionScores(tokenizer="PTB" if java else PLAIN)
    wanted = _tokenized({number: list(group) for number, group in enumerate(references)}, java)
    given = _tokenized({number: [text] for number, text in enumerate(predictions)}, java)

    def add(name: str, score, of_samples=None) -> None:
        if not java:
            name = f"{'CIDEr-D' if name == 'CIDEr' else name}, {PLAIN}"
        result.scores[name] = float(score)
        if of_samples is not None:
            result.of_samples[name] = [float(value) for value in of_samples]

    if "CIDEr" in metrics:
        add("CIDEr", *_scorer("cider.cider.Cider")().compute_score(wanted, given))
    if any(name.startswith("BLEU") for name in metrics):
        scores, _ = _scorer("bleu.bleu.Bleu")(4).compute_score(wanted, given, verbose=0)
        for number, score in enumerate(scores, 1):
            if f"BLEU-{number}" in metrics:
                add(f"BLEU-{number}", score)
    if "ROUGE-L" in metrics:
        add("ROUGE-L", *_scorer("rouge.rouge.Rouge")().compute_score(wanted, given))
    for name in ("METEOR", "SPICE"):
        if name in metrics:
            if reason := why_not(name, java):
                result.notes.append(reason)
            elif name == "METEOR":
                add(name, _scorer("meteor.meteor.Meteor")().compute_score(wanted, given)[0])
            else:
                add(name, *_spice(wanted, given))
    return result


def _spice(wanted: dict, given: dict) -> tuple[float, list[float]]:
    try:
        score, rows = _scorer("spice.spice.Spice")().compute_score(wanted, given)
    except subprocess.SubprocessError as error:
        raise OSError(f"SPICE's Java program failed: {error}. Leave SPICE out, or run it with Java 8.") from error
    return score, [row["All"]["f"] for row in rows]


def why_not(metric: str, java: bool) -> str | None:
    """Why METEOR or SPICE is left out, as a sentence; `None` if it can be computed.

    Args:
        metric: `"METEOR"` or `"SPICE"`.
        java: Whether there is a Java to run.
    """
    if not java:
        return f"{metric} is left out: it needs Java."
    if metric == "SPICE":
        folder = Path(importlib.import_module("pycocoevalcap.spice.spice").__file__).parent
        if missing := [name for name in _SPICE_NEEDS if not (folder / "lib" / name).is_file()]:
            return (
                f"SPICE is left out: {' and '.join(missing)} of Stanford CoreNLP 3.6.0 must be put into "
                f"{folder / 'lib'} first (python -m pycocoevalcap.spice.get_stanford_models downloads them)."
            )
    return None


__all__ = ["CAPTION_METRICS", "PLAIN", "CaptionScores", "has_java", "plain_tokens", "score_captions", "why_not"]
