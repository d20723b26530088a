"""docs/guides/own-data.md: with its commands, 200 pictures with captions become a bridge on the Hub.

With the environment variable `WHOLE_TRAINING` set, the bridge is trained to the end, and must tell colours and shapes.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import time
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from test_readme import blocks_of, commands_of
from typer.testing import CliRunner

from vlbridge.cli import app


PAGE = Path(__file__).parents[1] / "docs" / "guides" / "own-data.md"
WHOLE = bool(os.environ.get("WHOLE_TRAINING"))
# instead of some hundreds of steps
SHORT = [] if WHOLE else ["--set", "arguments.max_steps=3", "--set", "arguments.use_cpu=true"]


def commands() -> list[list[str]]:
    found = [command for block in blocks_of(PAGE) if block.language == "bash" for command in commands_of(block)]
    return [shlex.split(command)[1:] for command in found if command.startswith("vlbridge ")]


def draw(color: str, shape: str, generator: random.Random) -> Image.Image:
    picture = Image.new("RGB", (64, 64), "white")
    x, y, r = generator.randint(20, 44), generator.randint(20, 44), generator.randint(10, 18)
    pen = ImageDraw.Draw(picture)
    if shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=color)
    else:
        (pen.ellipse if shape == "circle" else pen.rectangle)([x - r, y - r, x + r, y + r], fill=color)
    return picture


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder of 200 pictures with captions, and another picture, in the working folder."""
    monkeypatch.chdir(tmp_path)
    generator, rows = random.Random(0), []
    (tmp_path / "pictures").mkdir()
    for number in range(200):
        color, shape = generator.choice(["red", "green", "blue"]), generator.choice(["circle", "square", "triangle"])
        draw(color, shape, generator).save(f"pictures/{number:03}.png")
        rows.append({"file_name": f"{number:03}.png", "caption": f"a {color} {shape}"})
    Path("pictures/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw("red", "circle", generator).save("new.png")


@pytest.mark.timeout(7200 if WHOLE else 600)
def test_from_pictures_to_a_published_bridge(pictures, hub, capsys):
    said = {}
    for command in commands():
        shorter = SHORT if command[0] == "train" and "--smoke" not in command else []
        began, started = time.process_time(), time.monotonic()
        done = CliRunner().invoke(app, [*command, *shorter])
        with capsys.disabled():
            seconds = f"{time.monotonic() - started:6.1f} s, {time.process_time() - began:6.1f} s of CPU time"
            print(f"\n  {seconds}: vlbridge {shlex.join(command)}", end="")
        assert done.exit_code == 0, (command, done.output, done.exception)
        said[shlex.join(command)] = done.stdout
    steps = [command[0] for command in commands()]
    assert steps == ["data", "new-recipe", "train", "train", "info", "caption", "push", "caption"]
    local, published = (said[f"caption new.png --model {model}"] for model in ("my-bridge", "me/my-bridge"))
    assert local.strip() and local == published
    assert not WHOLE or local.strip() == "a red circle"
    assert "pictures (held-out): loss" in said["train pictures.yaml --output my-bridge"]
    files = hub.files("me/my-bridge")
    assert {"config.json", "model.safetensors", "README.md", "training_summary.json", "recipe.yaml"} <= files.keys()
    assert sum(map(len, files.values())) < 20_000_000  # the bridge alone
    assert not any("checkpoint" in name for name in files)
    assert b"held-out" in files["README.md"] and "my-bridge/training.html" in PAGE.read_text()
    assert Path("my-bridge/training.html").exists() and Path("sheet.png").exists()
