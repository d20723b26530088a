"""`vlbridge inspect`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_image, tiny_model
from typer.testing import CliRunner

from vlbridge_cli.cli_app import app


@pytest.fixture
def here(tmp_path, monkeypatch):
    """`model` (a perceiver), `a.png` and `b.png` in the working directory."""
    monkeypatch.chdir(tmp_path)
    model, processor = tiny_model("perceiver")
    model.save_pretrained("model")
    processor.save_pretrained("model")
    for number, name in enumerate("ab"):
        tiny_image(number, (60, 60)).save(f"{name}.png")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def refused(code: int, message: str, *arguments) -> None:
    result = run(*arguments)
    assert (result.stdout, result.exit_code) == ("", code), result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.core
def test_text_json_and_report(here):
    asked = ("model", "a.png", "b.png", "-q", "what?", "--answer", "ab c", "--no-occlusion", "--device", "cpu")
    result = run(*asked, "--report", "out.html")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "model: perceiver_flamingo" and lines[2] == "a.png: what? -> ab c"
    assert lines[3].split()[:2] == ["word", "picture"] and lines[4].startswith("ab ")
    assert "gates (tanh: 0 is closed)" in lines
    assert result.stderr.endswith("out.html: 2 pictures\n")
    assert Path("out.html").read_text().startswith("<!doctype html>")
    found = json.loads(run(*asked, "--json", "--measure").stdout)
    assert [row["images"] for row in found["measured"]] == [0, 1, 2, 4]
    assert [picture["image"] for picture in found["pictures"]] == ["a.png", "b.png"]
    assert len(found["gates"]) == 2 and found["budget"][0]["prompt_tokens"] == 1


def test_a_model_alone(here):
    result = run("model", "--device", "cpu")
    assert result.exit_code == 0 and "context window" in result.stdout and "gates" in result.stdout


def test_refusals(here):
    refused(1, "missing.png", "model", "missing.png")
    refused(1, "cannot load './nothing'", "./nothing", "a.png")
    refused(2, "--question is empty", "model", "a.png", "-q", " ")
    refused(2, "--measure needs a picture", "model", "--measure")
    refused(2, "there is no such folder", "model", "a.png", "--report", "no/where.html")
    refused(2, "--device", "model", "a.png", "--device", "abacus")
