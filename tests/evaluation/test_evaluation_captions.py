"""Scores of captions: those of pycocoevalcap, with Java and without."""

from __future__ import annotations

import random
from collections import Counter
from math import exp, log, sqrt

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from vlbridge.evaluation import evaluation_captions
from vlbridge.evaluation.evaluation_captions import CAPTION_METRICS, has_java, plain_tokens, score_captions


needs_java = pytest.mark.skipif(not has_java(), reason="no java")
WORDS = (
    "a the man woman dog's cat red blue sits on in front of table's street, looks at (old) big small Two dogs don't"
).split()


def pairs(count: int = 500, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Captions of random words, with references that share many of them."""
    rng = random.Random(seed)
    references = [
        [" ".join(rng.choices(WORDS, k=rng.randint(5, 12))).capitalize() + "." for _ in range(rng.randint(3, 6))]
        for _ in range(count)
    ]
    predictions = []
    for group in references:
        words = rng.choice(group).split()
        kept = [word if rng.random() < 0.7 else rng.choice(WORDS) for word in words]
        predictions.append(" ".join(kept[: rng.randint(3, len(kept))]))
    return predictions, references


@needs_java
def test_scores_are_those_of_pycocoevalcap():
    predictions, references = pairs()
    tokenize = PTBTokenizer().tokenize
    wanted = tokenize({n: [{"caption": text} for text in group] for n, group in enumerate(references)})
    given = tokenize({n: [{"caption": text}] for n, text in enumerate(predictions)})
    found = score_captions(
        predictions, references, [name for name in CAPTION_METRICS if name not in ("METEOR", "SPICE")]
    )
    cider, each = Cider().compute_score(wanted, given)
    assert found.scores["CIDEr"] == cider and found.of_samples["CIDEr"] == each.tolist()
    assert 0.1 < cider < 10
    bleu, _ = Bleu(4).compute_score(wanted, given, verbose=0)
    assert [found.scores[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == bleu
    assert found.scores["ROUGE-L"] == Rouge().compute_score(wanted, given)[0]
    assert found.tokenizer == "PTB"
    assert list(found.scores) == [name for name in CAPTION_METRICS if name in found.scores]


@needs_java
def test_meteor():
    predictions = ["a dog sits in the street", "a cat looks at the table", "a woman beside a red bus"]
    references = [
        ["a dog sits on the street", "the dog is sitting in a street"],
        ["two cats look at a big table"],
        ["a man in front of a blue bus"],
    ]
    found = score_captions(predictions, references, ("METEOR",))
    # by `Meteor` of pycocoevalcap 1.2, which is the jar of METEOR 1.5
    assert found.scores == {"METEOR": pytest.approx(0.2652268348486337)} and not found.notes


def obvious_cider_d(predictions: list[str], references: list[list[str]]) -> float:
    """CIDEr-D written down from the paper: clipped cosines of TF-IDF vectors of n-grams, with a penalty on length."""

    def grams(text: str, n: int) -> Counter:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    total = 0.0
    for n in (1, 2, 3, 4):
        documents = Counter(gram for group in references for gram in set().union(*(grams(text, n) for text in group)))

        def vector(text: str, n=n, documents=documents) -> dict:
            return {
                gram: count * (log(len(references)) - log(max(1, documents[gram])))
                for gram, count in grams(text, n).items()
            }

        for said, group in zip(predictions, references):
            for reference in group:
                a, b = vector(said), vector(reference)
                dot = sum(min(a[gram], b[gram]) * b[gram] for gram in a if gram in b)
                norms = sqrt(sum(v * v for v in a.values())) * sqrt(sum(v * v for v in b.values()))
                # the code takes numbers of bigrams for lengths
                delta = max(len(said.split()) - 1, 0) - max(len(reference.split()) - 1, 0)
                total += dot / norms * exp(-(delta**2) / 72) / len(group) if norms else 0.0
    return 10 * total / 4 / len(predictions)


@pytest.mark.core
def test_without_java_it_is_cider_d_on_plain_words():
    predictions, references = pairs(60, seed=1)
    found = score_captions(predictions, references, java=False)
    expected = obvious_cider_d(
        [plain_tokens(text) for text in predictions], [[plain_tokens(text) for text in group] for group in references]
    )
    assert found.scores["CIDEr-D, plain tokenizer"] == pytest.approx(expected)
    assert set(found.scores) == {
        f"{name}, plain tokenizer" for name in ("CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L")
    }
    assert found.notes == ["METEOR is left out: it needs Java.", "SPICE is left out: it needs Java."]
    assert found.tokenizer == "plain tokenizer"


def test_plain_words():
    assert plain_tokens('A man\'s "big" dog, e-mail; Größe 3.5!') == "a man's big dog e mail größe 3 5"


@needs_java
def test_line_breaks_in_captions_shift_no_others():
    """Java takes more than `\\n` for the end of a line."""
    predictions = ["a dog\r\nin the\u2028park", "", "two\x85cats", "a red bus"]
    references = [["a dog in the park"], ["something"], ["two cats"], ["a red\nbus"]]
    found = score_captions(predictions, references, ("BLEU-1", "ROUGE-L"))
    assert found.of_samples["ROUGE-L"] == pytest.approx([1, 0, 1, 1])


@needs_java
def test_spice_says_what_is_missing():
    found = score_captions(["a dog", "a cat"], [["a dog"], ["a cat"]], ("SPICE",))
    assert found.scores or (
        found.notes[0].startswith("SPICE is left out: stanford-corenlp-3.6.0.jar")
        and "python -m pycocoevalcap.spice.get_stanford_models" in found.notes[0]
    )


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="metric 'CIDER'; expected some of CIDEr, "):
        score_captions(["a"], [["a"]], ("CIDER",))
    with pytest.raises(ValueError, match="picture 1 has no references"):
        score_captions(["a", "b"], [["a"], []], java=False)
    with pytest.raises(ValueError, match="1 captions, and references of 2 pictures"):
        score_captions(["a"], [["a"], ["b"]])
    monkeypatch.setattr(
        evaluation_captions.importlib, "import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError("none"))
    )
    with pytest.raises(ImportError, match=r"pip install \"vlbridge\[eval\]\""):
        score_captions(["a"], [["a"]], java=False)
