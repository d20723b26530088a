"""`vlbridge data` and `capfilt`: what they refuse, and that no half-written file is left."""

import json

import pytest
from PIL import Image
from tiny import tiny_image, tiny_stage1
from typer.testing import CliRunner

from vlbridge_cli.cli_app import app


@pytest.fixture
def data(tmp_path, monkeypatch):
    """`data.json` in LLaVA's layout, with one picture, in the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_image(0).save("picture.png")
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A picture."}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "0", "image": "picture.png", "conversations": turns}]))
    return tmp_path


def check(*arguments):
    return CliRunner().invoke(app, ["data", "check", "llava", "data.json", *arguments])


@pytest.mark.parametrize("name", ["sheet.png", "sheet.JPG", "sheet.webp"])
def test_sheets_have_the_format_that_their_name_says(data, name):
    assert check("--sheet", name).exit_code == 0
    with Image.open(name) as sheet:
        assert sheet.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[name.lower().partition(".")[2]]


def test_a_format_that_pillow_only_reads(data):
    result = check("--sheet", "sheet.psd")
    assert (result.stdout, result.exit_code) == ("", 2)
    assert result.stderr == "vlbridge: error: --sheet sheet.psd: expected a picture's name, such as sheet.png\n"


def test_a_sheet_that_cannot_be_written_leaves_nothing(data, monkeypatch):
    def save(self, path, **kwargs):
        path.write_bytes(b"half a picture")
        raise OSError("No space left on device")

    (data / "sheet.png").write_bytes(b"the sheet before")
    monkeypatch.setattr(Image.Image, "save", save)
    result = check("--sheet", "sheet.png")
    assert (result.exit_code, result.stderr) == (1, "vlbridge: error: llava: No space left on device\n")
    assert (data / "sheet.png").read_bytes() == b"the sheet before"
    assert sorted(path.name for path in data.iterdir()) == ["data.json", "picture.png", "sheet.png"]


def test_tokens_need_a_language_model(data):
    model, processor = tiny_stage1()
    model.save_pretrained("stage1")
    processor.save_pretrained("stage1")
    result = check("--model", "stage1")
    assert (result.stdout, result.exit_code) == ("", 1)
    assert "cannot load 'stage1': it is a 'qformer_blip2_pretraining' model, which has no language" in result.stderr
