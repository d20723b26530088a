"""Scores of single answers: those of the official scripts, and intervals that hold what they should."""

from __future__ import annotations

import numpy as np
import pytest

from vlbridge.evaluation.evaluation_metrics import (
    confidence_interval,
    exact_match,
    letter_of,
    normalized_answer,
    rank_of_best,
    says_yes,
    vqa_accuracy,
    yes_no_scores,
)


# by `VQAEval.processPunctuation` and `processDigitArticle` of open_flamingo/eval/vqa_metric.py at 655f693
NORMALIZED = {
    "The red dog.": "red dog", "two  dogs": "2 dogs", "Zero": "0", "none": "0", "ten,": "10", "1,000": "1000",
    "a 1,000 - b": "1000 b", "3.5": "3.5", "3. 5": "3 5", "no.5": "no.5", "it's": "it's", "its": "its", "dont": "don't",
    "couldntve": "couldntve", "couldn'tve": "couldn't've", "couldnt've": "couldn't've", "Id've": "id've", "im": "im",
    "somebody'd": "somebodyd", "somebodyd": "somebodyd", "ows'at": "ows'at", "'ows'at": "'ow's'at", "twas": "'twas",
    "left/right": "left right", "left / right": "left right", "left /right": "left right", "what?!": "what",
    "e-mail": "e mail", "e -mail": "e mail", "(yes)": "yes", "yes\tno": "yes no", "yes\nno": "yes no", " the ": "",
    "a": "", "an apple a day": "apple day", "$5": "$5", "50%": "50%", "10:30": "10:30", "rock'n'roll": "rock'n'roll",
    "x........................................": "x........", "U.S.A.": "usa", "St. John's": "st john's",
    "naïve café": "naïve café", "eleven": "eleven", "A.M.": "am", 'he said "hi"': "he said hi",
    "back\\slash": "back slash", "under_score": "under score", "one two": "1 2", "first": "first", "lets": "lets",
    "let's": "let's", "shes": "shes", "she's": "she's", "youre": "you're", "y'allll": "y'all'll", "@home": "home",
    "a;b": "b", "a; b": "b", "`tick`": "tick", "<b>": "b", "c++": "c", "c + +": "c", "3,5 , 6": "35 6",
}  # fmt: skip
# by `VQAEval.evaluate` of the same file, in percent; every answer has an `answer_id`
ACCURACIES = [
    ("yes", ["yes"] * 10, 100.0),
    ("no", ["yes"] * 10, 0.0),
    ("2", ["two"] * 2 + ["three"] * 8, 60.0),
    ("Two.", ["2"] * 3 + ["3"] * 7, 90.0),
    ("two", ["2"] * 4 + ["3"] * 6, 100.0),
    ("the dog", ["a dog"] + ["cat"] * 9, 30.0),
    ("dont know", ["don't know"] * 3 + ["unknown"] * 7, 90.0),
    ("1000", ["1,000"] * 5 + ["1000"] * 5, 100.0),
    ("left/right", ["left right"] * 3 + ["left"] * 7, 90.0),
    ("", [""] * 2 + ["x"] * 8, 60.0),
    ("x", ["x", "y", "z"], 22.2222222222),
    ("red", ["red", "red", "blue"], 44.4444444444),
]


@pytest.mark.core
@pytest.mark.parametrize(("text", "expected"), NORMALIZED.items())
def test_answers_are_normalized_as_the_official_script_does(text, expected):
    assert normalized_answer(text) == expected


@pytest.mark.parametrize(("prediction", "references", "expected"), ACCURACIES)
def test_vqa_accuracy_is_the_official_one(prediction, references, expected):
    assert vqa_accuracy(prediction, references) * 100 == pytest.approx(expected, abs=1e-9)


def test_people_who_said_the_same_are_left_out_one_by_one():
    # with entries that are equal the official script leaves out all of them, and a unanimous answer gets nothing
    assert vqa_accuracy("unanswerable", ["unanswerable"] * 8 + ["blank", "screen"]) == 1.0


def test_no_references_are_refused():
    with pytest.raises(ValueError, match="no references"):
        vqa_accuracy("yes", [])


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [("Blue.", ["blue"], 1), (" blue ", ["red", "Blue"], 1), ("light blue", ["blue"], 0), ("", ["blue"], 0)],
)
def test_exact_match(prediction, references, expected):
    assert exact_match(prediction, references) == expected


# by `get_pred_idx` of llava/eval/eval_science_qa.py and the lines that call it
@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("B", "B"), (" B ", "B"), ("B. because", "B"), ("B\nbecause", "B"), ("B.", "B"), ("The answer is C.", "C"),
        ("So: The answer is C", "C"), ("Because", None), ("b", None), ("D", None), ("The answer is D.", None),
        ("", None), ("A dog", None), ("The answer is Cat", None),
    ],
)  # fmt: skip
def test_letters(prediction, expected):
    assert letter_of(prediction, num_choices=3) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("yes", True), ("No", False), ("no, there is none", False), ("There is not.", False), ("Yes. No cat.", True),
        ("I can't tell", True), ("", True), ("nothing", True), ("no,", False),
    ],
)  # fmt: skip
def test_pope_reads_answers_as_its_script_does(prediction, expected):
    assert says_yes(prediction) is expected


def test_pope_scores():
    # 3 yes for yes, 1 yes for no, 4 no for no, 2 no for yes
    scores = yes_no_scores(np.array([3, 1, 4, 2]))
    assert scores["accuracy"] == pytest.approx(0.7)
    assert scores["precision"] == pytest.approx(0.75)
    assert scores["recall"] == pytest.approx(0.6)
    assert scores["F1"] == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert scores["yes ratio"] == pytest.approx(0.4)
    never = yes_no_scores(np.array([0, 0, 5, 5]))
    assert (never["precision"], never["recall"], never["F1"]) == (0, 0, 0)


def test_rank_of_the_best_right_candidate():
    assert rank_of_best([0.1, 0.9, 0.5], [1]) == 1
    assert rank_of_best([0.1, 0.9, 0.5], [0, 2]) == 2
    assert rank_of_best([0.5, 0.5, 0.5], [0]) == 3  # of equal scores the right one comes last
    assert rank_of_best([1.0, -np.inf, -np.inf], [1]) == 3
    with pytest.raises(ValueError, match="no right candidate"):
        rank_of_best([1.0], [])


def test_intervals_are_those_of_the_normal_distribution_for_many_samples():
    values = np.random.default_rng(1).integers(0, 2, 4000)
    low, high = confidence_interval(values)
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.15 * error)
    assert confidence_interval(values) == (low, high) != confidence_interval(values, seed=1)


def test_samples_of_a_picture_are_drawn_together():
    """Ten copies of every value tell no more than one: the interval must not shrink."""
    values = np.random.default_rng(2).normal(size=200)
    alone = confidence_interval(values)
    copied = np.repeat(values, 10)
    together = confidence_interval(copied, groups=np.repeat(np.arange(200), 10))
    assert together == pytest.approx(alone)
    narrow = confidence_interval(copied)
    assert narrow[1] - narrow[0] < 0.5 * (together[1] - together[0])


def test_pictures_with_more_questions_weigh_more():
    values, groups = [1, 0, 0, 0], ["a", "b", "b", "b"]
    drawn = np.random.default_rng(0).integers(0, 2, (1000, 2))
    expected = [np.mean([v for g in row for v in ([1], [0, 0, 0])[g]]) for row in drawn]
    assert confidence_interval(values, groups) == pytest.approx(tuple(np.percentile(expected, [2.5, 97.5])))


def test_intervals_of_other_statistics():
    counts = np.eye(4)[np.random.default_rng(3).integers(0, 4, 500)]
    low, high = confidence_interval(counts, statistic=lambda means: yes_no_scores(means)["F1"])
    assert low < yes_no_scores(counts.sum(axis=0))["F1"] < high


def test_intervals_of_nothing():
    with pytest.raises(ValueError, match="no samples"):
        confidence_interval([])
