"""`vlbridge compare`: every model's answer beside the others', each as the model gives it alone."""

import json

import pytest
from PIL import Image
from tiny import tiny_image, tiny_model
from typer.testing import CliRunner

from vlbridge import FAMILIES, default_model, inference
from vlbridge_cli.cli_app import app


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A tiny model of each family, saved in a folder of its name, and two pictures."""
    monkeypatch.chdir(tmp_path)
    loaded = {family: tiny_model(family) for family in FAMILIES}
    for family, (model, processor) in loaded.items():
        model.save_pretrained(family)
        processor.save_pretrained(family)
    for number in (1, 2):
        tiny_image(number).save(f"{number}.png")
    return loaded


def expected(models, prompt=None):
    pictures = [tiny_image(1), tiny_image(2)]
    answers = {
        family: inference.answer(model, processor, pictures, prompt or processor.caption_prompt, max_new_tokens=5)
        for family, (model, processor) in models.items()
    }
    return [{family: found[number] for family, found in answers.items()} for number in (0, 1)]


@pytest.mark.parametrize("question", [None, "what is it?"])
def test_all_answers_side_by_side(models, question):
    options = [option for family in models for option in ("--model", family)]
    options += ["--device", "cpu", "--max-new-tokens", 5, *(["-q", question] if question else [])]
    result = run("1.png", "2.png", *options, "--json")
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["answers"] for row in rows] == expected(models, question)
    assert [(row["image"], row["question"]) for row in rows] == [("1.png", question), ("2.png", question)]
    lines = run("1.png", "2.png", *options).stdout.splitlines()
    assert lines[0] == ("1.png" if question is None else "1.png: what is it?") and len(lines) == 2 * (1 + len(models))
    for line, (family, text) in zip(lines[1:], expected(models, question)[0].items()):
        assert line.split(maxsplit=1) == [family, *([text] if text else [])]


def test_the_shipped_bridges_are_the_default(tmp_path, monkeypatch):
    asked = []

    def load(model, device, dtype):
        asked.append(inference.model_source(model))
        raise SystemExit(3)  # the first is enough: the others come after it

    monkeypatch.setattr("vlbridge_cli.cli_compare.load_model", load)
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    assert run(tmp_path / "1.png").exit_code == 3 and asked == [default_model()]


def test_what_is_wrong_is_said(models):
    for code, message, *arguments in (
        (2, "--question is empty", "1.png", "-q", " "),
        (1, "nowhere.png", "nowhere.png"),
        (1, "cannot load 'nothing'", "1.png", "-m", "nothing"),
    ):
        result = run(*arguments, "--device", "cpu")
        assert result.exit_code == code and message in result.stderr and result.stdout == "", result.stderr
