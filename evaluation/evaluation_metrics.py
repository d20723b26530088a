"""Scores of single answers, as the benchmarks' official scripts give them, and confidence intervals."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np


# ---------------------------------------------------------------------- VQA accuracy

# Signs that the official script removes or turns into spaces; the full stop has a rule of its own
_SIGNS = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32  # the official script passes a flag, whose value is 32, where the number of replacements goes
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}  # fmt: skip
# Contractions that are recognised without their apostrophe, or without one of them
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_CONTRACTIONS = {
    word[: sign.start()] + word[sign.end() :]: word for word in _CONTRACTED for sign in re.finditer("'", word)
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table has this one the other way round


def normalized_answer(text: str) -> str:
    """An answer as VQA's evaluation compares it: without punctuation and articles, numbers up to ten as digits.

    Args:
        text: The answer.

    Source: `vqaEval.py` of github.com/GT-Vision-Lab/VQA, and its copy in `open_flamingo/eval/vqa_metric.py`, which
    normalises all answers; an older release of the script leaves them alone where all ten agree.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    without, joined = text, _NUMBER_WITH_COMMA.search(text) is not None
    for sign in _SIGNS:
        beside_space = f"{sign} " in text or f" {sign}" in text
        without = without.replace(sign, "" if joined or beside_space else " ")
    words = _FULL_STOP.sub("", without, count=_MOST_FULL_STOPS).lower().split()
    kept = [word for word in (_NUMBERS.get(word, word) for word in words) if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Accuracy of one answer: a third for each person who gave it, at most 1, averaged over leaving each person out.

    Args:
        prediction: The answer.
        references: What people answered, ten in most data sets.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: There are no references.

    Source: as for `normalized_answer`. People are left out one by one even where two of them said the same with the
    same confidence, as the definition says; the scripts compare entries, and leave out both where these have no ids.
    """
    if not references:
        raise ValueError("there are no references to compare the answer with")
    said = normalized_answer(prediction)
    agrees = [normalized_answer(reference) == said for reference in references]
    total = sum(agrees)
    return sum(min(1.0, float(total - same) / 3) for same in agrees) / len(agrees)


# ---------------------------------------------------------------------- other answers


def simple_answer(text: str) -> str:
    """An answer in lower case, without surrounding whitespace and without a full stop at its end."""
    return text.strip().rstrip(".").strip().lower()


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, apart from case and a full stop at its end; else 0.

    Source: `scripts/convert_gqa_for_eval.py` of LLaVA, before GQA's official `eval.py`.
    """
    said = simple_answer(prediction)
    return float(any(simple_answer(reference) == said for reference in references))


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letter_of(prediction: str, num_choices: int) -> str | None:
    """The letter of the choice that an answer names: `B`, `B. because...` or `The answer is B.`; `None` if none.

    Args:
        prediction: The answer.
        num_choices: Number of choices; further letters are none.

    Source: `llava/eval/eval_science_qa.py`.
    """
    allowed = LETTERS[:num_choices]
    text = prediction.strip().replace("\n", ". ")
    for pattern in (rf"([{allowed}])\.?$", rf"([{allowed}])\. ", rf".*?The answer is ([{allowed}])(?![A-Za-z])"):
        if found := re.match(pattern, text):
            return found.group(1)
    return None


def says_yes(prediction: str) -> bool:
    """Whether POPE takes an answer for a yes: it has no `no` and no `not` in its first sentence.

    Source: `evaluate.py` of github.com/AoiDragon/POPE.
    """
    words = prediction.split(".")[0].replace(",", "").split()
    return not {"No", "not", "no"} & set(words)


def yes_no_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of POPE from how often answers are right and wrong.

    Args:
        counts: `(..., 4)`: yes for yes, yes for no, no for no, no for yes.

    Returns:
        `accuracy`, `precision`, `recall`, `F1` and `yes ratio`, each `(...)` and from 0 to 1; 0 where one would divide
        by zero.
    """
    true_yes, false_yes, true_no, false_no = np.moveaxis(np.asarray(counts, dtype=float), -1, 0)

    def share(part, whole):
        return np.divide(part, whole, out=np.zeros_like(np.asarray(part, dtype=float)), where=whole > 0)

    precision, recall = share(true_yes, true_yes + false_yes), share(true_yes, true_yes + false_no)
    total = true_yes + false_yes + true_no + false_no
    return {
        "accuracy": share(true_yes + true_no, total),
        "precision": precision,
        "recall": recall,
        "F1": share(2 * precision * recall, precision + recall),
        "yes ratio": share(true_yes + false_yes, total),
    }


def rank_of_best(scores: Sequence[float], right: Sequence[int]) -> int:
    """Place of the best of the right candidates, from 1; of equal scores the right one comes last.

    Args:
        scores: Of all candidates.
        right: Numbers of the right ones.

    Raises:
        ValueError: None is right.
    """
    if len(right) == 0:
        raise ValueError("there is no right candidate")
    scores = np.asarray(scores)
    best = scores[list(right)].max()
    wrong = np.delete(scores, list(right))
    return int((wrong >= best).sum()) + 1


# ---------------------------------------------------------------------- confidence intervals


def confidence_interval(
    values: np.ndarray,
    groups: Sequence | None = None,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
    draws: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval by bootstrap: what the score would be with other samples of the same kind.

    Args:
        values: `(samples,)`, whose mean is the score; or `(samples, columns)`.
        groups: A key per sample. Samples of one key, such as all questions about one picture, are drawn together:
            they are not independent.
        statistic: The score from the columns' means, `(draws, columns)` to `(draws,)`.
        seed: Seed of the draws.
        draws: Number of draws.
        level: Share of the draws within the interval.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: There are no samples.
    """
    values = np.asarray(values, dtype=float)
    if values.shape[0] == 0:
        raise ValueError("there are no samples to draw from")
    columns = values[:, None] if values.ndim == 1 else values
    columns = np.concatenate([columns, np.ones((len(columns), 1))], axis=1)
    if groups is not None:
        numbers: dict = {}
        index = np.array([numbers.setdefault(key, len(numbers)) for key in groups])
        sums = np.zeros((len(numbers), columns.shape[1]))
        np.add.at(sums, index, columns)
        columns = sums
    generator = np.random.default_rng(seed)
    drawn = np.stack(
        [columns[generator.integers(0, len(columns), len(columns))].sum(axis=0) for _ in range(draws)]
    )  # (draws, columns + 1)
    means = drawn[:, :-1] / drawn[:, -1:]
    scores = means[:, 0] if statistic is None else np.asarray(statistic(means))
    low, high = np.percentile(scores, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


__all__ = [
    "LETTERS",
    "confidence_interval",
    "exact_match",
    "letter_of",
    "normalized_answer",
    "rank_of_best",
    "says_yes",
    "simple_answer",
    "vqa_accuracy",
    "yes_no_scores",
]
