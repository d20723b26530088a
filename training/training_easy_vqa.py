"""easy-VQA as it is read: pictures, what is asked about them, and what the answers say about the pictures."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from .training_rows import read_json
from .training_sources_common import key_value, list_value, text_value


COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
NEGATED = re.compile(r"\b(not|no)\b")


@dataclass
class Example:
    """One picture and all that is asked about it: `(question, answer)` pairs."""

    image: Path
    questions: list[tuple[str, str]]


def read_split(folder: Path, split: str) -> tuple[list[Example], list[str]]:
    """Read a split of easy-VQA.

    Args:
        folder: The unpacked data set.
        split: `"train"` or `"test"`.

    Returns:
        The pictures, and what is wrong with rows that are not `[question, answer, image]`.

    Raises:
        ValueError: The file is no JSON, or no list.
    """
    file, questions, problems = folder / split / "questions.json", defaultdict(list), []
    for number, row in enumerate(list_value(read_json(file), str(file), "its content")):
        place = f"{file}, row {number}"
        try:
            if len(list_value(row, place, "a row")) != 3:
                raise ValueError(f"{place} has {len(row)} items; expected a question, an answer and an image's number.")
            question, answer = (text_value(value, place, what) for value, what in zip(row, ("question", "answer")))
            image = key_value(row[2], place, "image")
            if "\0" in str(image) or Path(str(image)).name != str(image):
                raise ValueError(f"{place}: image is {image!r}; expected the name of a file in images/.")
            questions[image].append((question, answer))
        except ValueError as error:
            problems.append(str(error))
    pictures = sorted(questions.items(), key=lambda item: (isinstance(item[0], str), item[0]))
    return [Example(folder / split / "images" / f"{image}.png", asked) for image, asked in pictures], problems


def load_split(folder: Path, split: str) -> list[Example]:
    """Read a split of easy-VQA, of which nothing may be wrong.

    Args:
        folder: The unpacked data set.
        split: `"train"` or `"test"`.

    Raises:
        ValueError: A row is not `[question, answer, image]`.
    """
    examples, problems = read_split(folder, split)
    if problems:
        raise ValueError(problems[0])
    return examples


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
    "read_split",
    "yes_no_templates",
]
