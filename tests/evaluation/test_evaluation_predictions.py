"""A run that was killed and resumed, and one that two processes shared, have the bytes of one that was neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import benchmark_layouts as layouts
import pytest
import torch
from tiny import tiny_model

from vlbridge.evaluation import evaluate, evaluation_answers


FILES = ("predictions.jsonl", "results.json", "settings.json", "shuffled.jsonl")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).parent.parent / "evaluate_of_two.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run(
        [sys.executable, script, folder], capture_output=True, text=True, timeout=550, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "timing.json"}


def test_a_run_of_its_own(root):
    files = files_of(root / "whole")
    assert sorted(files) == sorted(FILES)
    rows = [json.loads(line) for line in files["predictions.jsonl"].splitlines()]
    assert [row["number"] for row in rows] == list(range(21))
    assert json.loads(files["results.json"])["samples"] == 21


def test_killed_and_resumed(root):
    left = json.loads((root / "killed_after.json").read_text())
    # 2 + 1 batches of the first pass were there when the third run began; it had finished that pass
    assert left["predictions.jsonl"] == 21 and any("shuffled.partial" in name for name in left)
    assert files_of(root / "killed") == files_of(root / "whole")
    (timed,) = json.loads((root / "killed" / "timing.json").read_text())["runs"]
    answered = {name: part["answers"] for name, part in timed["answered"].items()}  # what was left to answer
    assert answered["predictions"] == 0 and 0 < answered["shuffled"] < 21


def test_two_processes(root):
    assert files_of(root / "two") == files_of(root / "whole")
    expected = json.loads((root / "whole" / "results.json").read_text())
    for rank in (0, 1):
        assert json.loads((root / f"result_{rank}.json").read_text()) == expected


def test_two_processes_killed_and_resumed_by_one(root):
    assert files_of(root / "killed_two") == files_of(root / "whole")


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    layouts.write_easy_vqa(tmp_path / "data")
    return tmp_path / "data"


def test_a_finished_run_is_not_made_again(data, tmp_path, monkeypatch):
    models = tiny_model("mlp")
    first = evaluate(*models, "easy_vqa", data, tmp_path / "out")
    before = files_of(tmp_path / "out")
    monkeypatch.setattr(evaluation_answers.Answerer, "__call__", None)
    assert evaluate(*models, "easy_vqa", data, tmp_path / "out") == first
    assert files_of(tmp_path / "out") == before
    assert len(json.loads((tmp_path / "out" / "timing.json").read_text())["runs"]) == 2


def test_other_settings_need_another_folder(data, tmp_path):
    models = tiny_model("mlp")
    evaluate(*models, "easy_vqa", data, tmp_path / "out", limit=2)
    for options, message in (
        ({"limit": 3}, "samples was 2, now 3"),
        ({"limit": 2, "batch_size": 4}, "batch_size was 8, now 4"),
        ({"limit": 2, "prompt": "{question}!"}, "asking was .*Choose another folder, or delete this one"),
    ):
        with pytest.raises(ValueError, match=rf"out holds a run with other settings: {message}"):
            evaluate(*models, "easy_vqa", data, tmp_path / "out", **options)
    for weight in (next(models[0].bridge.parameters()), models[0].language_model.lm_head.weight.requires_grad_()):
        with torch.no_grad():
            weight[0, 0] += 1
        with pytest.raises(ValueError, match="other settings: model was"):
            evaluate(*models, "easy_vqa", data, tmp_path / "out", limit=2)
        with torch.no_grad():
            weight[0, 0] -= 1


def test_a_changed_line_is_answered_again(data, tmp_path):
    models = tiny_model("mlp")
    evaluate(*models, "easy_vqa", data, tmp_path / "out", batch_size=4)
    before = files_of(tmp_path / "out")
    path = tmp_path / "out" / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.unlink()
    # as a kill would leave it: a whole batch, a part of one, and half a line
    (tmp_path / "out" / "predictions.partial-1.jsonl").write_text("".join(lines[4:10]) + lines[10][:20])
    evaluate(*models, "easy_vqa", data, tmp_path / "out", batch_size=4)
    assert files_of(tmp_path / "out") == before
