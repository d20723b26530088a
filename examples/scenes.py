"""Drawn scenes of two to five shapes, with captions, questions and answers that are exact.

    python examples/scenes.py FOLDER --count 1000 --seed 1

writes pictures and `questions.json` in easy-VQA's layout. Two seeds never give the same picture.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw
from tqdm import tqdm

from vlbridge.files import write_json
from vlbridge.training.training_easy_vqa import COLORS, SHAPES


RGB = {
    "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128), "green": (0, 255, 0),
    "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0),
}  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five")
SIDE, CELLS = 224, 3  # pixels; cells of a row, one shape in each at most


@dataclass(frozen=True)
class Shape:
    """One shape.

    Args:
        color: Of `COLORS`.
        shape: Of `SHAPES`.
        x: Its middle, in pixels from the left.
        y: Its middle, in pixels from the top.
        radius: Half its size, in pixels.
    """

    color: str
    shape: str
    x: int
    y: int
    radius: int

    @property
    def name(self) -> str:
        """Such as `"red circle"`."""
        return f"{self.color} {self.shape}"


def draw_scene(rng: random.Random) -> list[Shape]:
    """Two to five shapes, from left to right; none have the same colour and shape, and none overlap."""
    cells = rng.sample([(row, column) for row in range(CELLS) for column in range(CELLS)], rng.randint(2, 5))
    names = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], len(cells))
    step = SIDE // CELLS
    found = []
    for (row, column), (color, shape) in zip(cells, names):
        radius = rng.randint(step // 4, step * 7 // 16)
        x, y = (place * step + rng.randint(radius, step - radius) for place in (column, row))
        found.append(Shape(color, shape, x, y, radius))
    return sorted(found, key=lambda one: one.x)


def paint(shapes: list[Shape], rng: random.Random) -> Image.Image:
    """The picture, 224 x 224, on a light ground."""
    ground = tuple(rng.randint(225, 255) for _ in range(3))
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), ground)  # twice the size, for smooth edges
    pen = ImageDraw.Draw(picture)
    for one in shapes:
        fill = tuple(max(0, min(255, value + rng.randint(-12, 12))) for value in RGB[one.color])
        x, y, r = 2 * one.x, 2 * one.y, 2 * one.radius
        if one.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif one.shape == "rectangle":
            w, h = rng.choice(((r, r), (r, r * 2 // 3), (r * 2 // 3, r)))
            pen.rectangle((x - w, y - h, x + w, y + h), fill=fill)
        else:
            pen.polygon(((x, y - r), (x - r, y + r * 4 // 5), (x + r, y + r * 4 // 5)), fill=fill)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def caption_of_scene(shapes: list[Shape]) -> str:
    """Such as `"a red circle, a blue triangle and a green rectangle"`, from left to right."""
    names = [f"a {one.name}" for one in shapes]
    return f"{', '.join(names[:-1])} and {names[-1]}"


KINDS = ("count", "count of a kind", "color", "shape", "left or right", "yes/no")


def ask(shapes: list[Shape], kind: str, rng: random.Random) -> list[tuple[str, str]]:
    """Questions of one kind and their answers; those with yes or no come in pairs of the same form.

    Args:
        shapes: What the picture shows.
        kind: Of `KINDS`.
        rng: Chooses.

    Returns:
        `(question, answer)` of each; none if the picture has no question of this kind.
    """
    colors, kinds = [one.color for one in shapes], [one.shape for one in shapes]
    if kind == "count":
        return [("how many shapes are there?", NUMBERS[len(shapes)])]
    if kind == "count of a kind":
        wanted = rng.choice(SHAPES)
        return [(f"how many {wanted}s are there?", NUMBERS[kinds.count(wanted)])]
    if kind == "color":
        single = [one for one in shapes if kinds.count(one.shape) == 1]
        return [(f"what color is the {one.shape}?", one.color) for one in single[:1]]
    if kind == "shape":
        single = [one for one in shapes if colors.count(one.color) == 1]
        return [(f"what shape is {one.color}?", one.shape) for one in rng.sample(single, min(1, len(single)))]
    if kind == "left or right":
        places = sorted(rng.sample(range(len(shapes)), 2))
        left, right = (shapes[place] for place in places)
        if right.x - left.x < SIDE // 8:
            return []
        side = rng.choice(("left", "right"))
        first, second = (left, right) if side == "left" else (right, left)
        form = "is the {} to the " + side + " of the {}?"
        return [(form.format(first.name, second.name), "yes"), (form.format(second.name, first.name), "no")]
    shown = rng.choice(shapes)
    there = {one.name for one in shapes}
    # what is not there has the colour of one shape and the form of another, where there is such a thing
    mixed = [f"{color} {shape}" for color in sorted(set(colors)) for shape in sorted(set(kinds))]
    absent = [name for name in mixed if name not in there] or [
        name for name in (f"{color} {shown.shape}" for color in COLORS) if name not in there
    ]
    return [(f"is there a {shown.name}?", "yes"), (f"is there a {rng.choice(absent)}?", "no")]


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to write to; it must not exist.")],
    count: Annotated[int, typer.Option(help="Number of pictures.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the pictures and of what is asked.")] = 0,
) -> None:
    """Write pictures and questions of every kind."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in tqdm(range(count), unit="picture"):
        rng = random.Random(f"{seed}:{number}")
        shapes = draw_scene(rng)
        paint(shapes, rng).save(folder / "images" / f"{number}.png")
        rows += [[*pair, number] for kind in KINDS for pair in ask(shapes, kind, rng)]
    write_json(folder / "questions.json", rows)
    print(json.dumps({"pictures": count, "questions": len(rows)}))


if __name__ == "__main__":
    typer.run(main)
