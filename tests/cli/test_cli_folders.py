"""Every kind of saved model against every command: an answer, or one line that says what the model can do instead."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import VISION, clip_image_processor, tiny_bridge_folder, tiny_image, tiny_model, tiny_stage1
from typer.testing import CliRunner

import vlbridge
from vlbridge.training import lora_config
from vlbridge_cli.cli_app import app


LOADS = "caption ask inspect evaluate data".split()  # commands that need a language model
KINDS = ("whole", "bridge", "classifier", "classifier-bridge", "stage1", "adapter")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_image().save(folder / "a.png")
    model, processor = tiny_model("mlp")
    model.save_pretrained(folder / "whole", processor=processor)
    tiny_bridge_folder(folder, "mlp").rename(folder / "bridge")
    torch.manual_seed(0)
    classifier, image_processor = vlbridge.FAMILIES["mlp"].classifier_class.from_vision(
        folder / "eye", id2label={0: "cat", 1: "dog"}, hidden_size=16, image_processor=clip_image_processor()
    )
    classifier.save_pretrained(folder / "classifier", processor=image_processor)
    classifier.save_pretrained(folder / "classifier-bridge", bridge_only=True, processor=image_processor)
    stage1, processor = tiny_stage1(image_processor=clip_image_processor(), vision=VISION["clip"]())
    stage1.save_pretrained(folder / "stage1", processor=processor)
    from peft import get_peft_model

    adapted = get_peft_model(model, lora_config(model, r=2))
    adapted.save_pretrained(folder / "adapter")
    for split in ("test",):
        for name in ("cat", "dog"):
            (folder / "classes" / split / name).mkdir(parents=True)
            tiny_image(len(name)).save(folder / "classes" / split / name / "1.png")
    (folder / "rows").mkdir()
    tiny_image().save(folder / "rows" / "a.png")
    (folder / "rows" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "caption": "a cat"}) + "\n")
    return folder


COMMANDS = {
    "info": ["info", "MODEL"],
    "caption": ["caption", "a.png", "--model", "MODEL", "--device", "cpu", "--max-new-tokens", "3"],
    "ask": ["ask", "a.png", "what?", "--model", "MODEL", "--device", "cpu", "--max-new-tokens", "3"],
    "inspect": ["inspect", "MODEL", "--device", "cpu"],
    "data": ["data", "check", "imagefolder", "rows", "--model", "MODEL"],
    "evaluate": ["evaluate", "MODEL", "--task", "classification", "--data", "classes", "--device", "cpu"],
    "export": ["export", "MODEL", "--output", "OUT"],
    "transplant": ["transplant", "MODEL", "--language", "old", "--output", "OUT"],
    "push": ["push", "MODEL", "me/model"],
}
ANSWERS = {
    "whole": {"info", "caption", "ask", "inspect", "data", "evaluate", "push"},
    "bridge": {"info", "caption", "ask", "inspect", "data", "evaluate"},  # its parts lie in folders: push says so
    "classifier": {"info", "evaluate", "push"},
    "classifier-bridge": {"info", "evaluate"},
    "stage1": {"info", "push"},
    "adapter": set(),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder(kind, command, folders, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(folders)
    words = [{"MODEL": kind, "OUT": str(tmp_path / "out")}.get(word, word) for word in COMMANDS[command]]
    if command == "evaluate":
        words += ["--output", str(tmp_path / "results")]
    done = CliRunner().invoke(app, words)
    # no traceback, whatever happens: bugs would be in `exception`
    assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
    if command in ANSWERS[kind]:
        assert done.exit_code == 0 and done.stdout.strip(), (words, done.output)
    elif done.exit_code:
        lines = [line for line in done.stderr.splitlines() if line.startswith("vlbridge: error: ")]
        assert len(lines) == 1, (words, done.output)
        if kind == "adapter":
            assert "holds an adapter alone" in lines[0] and "merge_and_unload" in lines[0], lines
        elif kind.startswith("classifier") and command in ("inspect", "data"):
            assert "evaluate --task classification" in lines[0], lines
        elif kind == "stage1" and command in ("inspect", "data"):
            assert "evaluate --task retrieval_coco" in lines[0], lines
