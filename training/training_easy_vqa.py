"""easy-VQA as it is read: pictures, what is asked about them, and what the answers say about the pictures."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
NEGATED = re.compile(r"\b(not|no)\b")


@dataclass
class Example:
    """One picture and all that is asked about it: `(question, answer)` pairs."""

    image: Path
    questions: list[tuple[str, str]]


def load_split(folder: Path, split: str) -> list[Example]:
    """Read a split of easy-VQA.

    Args:
        folder: The unpacked data set.
        split: `"train"` or `"test"`.
    """
    questions = defaultdict(list)
    for question, answer, image in json.loads((folder / split / "questions.json").read_text()):
        questions[image].append((question, answer))
    return [Example(folder / split / "images" / f"{image}.png", asked) for image, asked in sorted(questions.items())]


def properties_of(example: Example) -> dict[str, str]:
    """Colour and shape of the picture, as far as questions and answers tell."""
    found: dict[str, str] = {}
    for question, answer in example.questions:
        words = re.findall(r"\w+", question)
        if answer in ("yes", "no"):
            # only what is affirmed tells: "is there a red shape? yes", "is there not a red shape? no"
            words = words if (answer == "yes") != bool(NEGATED.search(question)) else []
        else:
            words.append(answer)
        for kind, known in (("color", COLORS), ("shape", SHAPES)):
            found.update((kind, word) for word in words if word in known)
    return found


def caption_of(example: Example) -> str | None:
    """`"a blue circle"`; `None` where the questions don't tell both."""
    found = properties_of(example)
    return f"a {found['color']} {found['shape']}" if len(found) == 2 else None


def yes_no_templates(examples: list[Example]) -> list[str]:
    """The forms of yes/no questions, such as `"is there not a {color} shape?"`."""
    names = [(word, "{color}") for word in COLORS] + [(word, "{shape}") for word in SHAPES]
    forms = set()
    for example in examples:
        for question, answer in example.questions:
            if answer in ("yes", "no"):
                for word, slot in names:
                    question = re.sub(rf"\b{word}\b", slot, question)
                forms.add(question)
    return sorted(forms)


def matched_pair(found: dict[str, str], templates: list[str], draw) -> list[tuple[str, str]]:
    """One yes/no question, asked about what a picture shows and about what it does not show.

    easy-VQA asks about absent things seven times out of eight, so that "no" (or "yes", where the question is negated)
    is nearly right already, and a bridge learns nothing else for long. In a pair, an answer that follows the question's
    form alone gains nothing, so that what is learned is to compare the question with the picture.

    Args:
        found: The picture's colour and shape.
        templates: From `yes_no_templates`.
        draw: `draw(n)` gives a random number below n.
    """
    template = templates[draw(len(templates))]
    kind, choices = ("color", COLORS) if "{color}" in template else ("shape", SHAPES)
    others = [word for word in choices if word != found[kind]]
    affirmed, denied = ("no", "yes") if NEGATED.search(template) else ("yes", "no")
    return [
        (template.format(**{kind: found[kind]}), affirmed),
        (template.format(**{kind: others[draw(len(others))]}), denied),
    ]


__all__ = [
    "COLORS",
    "Example",
    "NEGATED",
    "SHAPES",
    "caption_of",
    "load_split",
    "matched_pair",
    "properties_of",
    "yes_no_templates",
]
