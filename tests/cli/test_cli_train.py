"""`vlbridge train`: what it prints, and what an interrupted run says."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from vlbridge.training import training_run
from vlbridge.training.training_recipes import RecipeError, read_recipe, shipped
from vlbridge_cli.cli_app import app


SUMMARY = {
    "steps": 3, "seconds": 90.0, "evaluation": [{"dataset": "d", "split": "test", "metric": "loss", "value": 1.5}]
}  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_results_as_lines_and_as_json(tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "train", lambda *args, **kwargs: SUMMARY)
    done = run("small_mlp", "--output", tmp_path)
    assert done.stdout.splitlines() == ["d (test): loss 1.5000", f"{tmp_path}: 3 steps in 1.5 minutes"]
    done = run("small_mlp", "--output", tmp_path, "--json")
    assert json.loads(done.stdout) == {"output": str(tmp_path), **SUMMARY}
    listed = [json.loads(line) for line in run("--list", "--json").stdout.splitlines()]
    assert [row["recipe"] for row in listed] == list(shipped()) and all(row["description"] for row in listed)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_interrupted(checkpoints, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        if checkpoints:
            (tmp_path / "checkpoint-2").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "train", interrupt)
    done = run("small_mlp", "--output", tmp_path)
    assert (done.stdout, done.exit_code) == ("", 130)
    assert done.stderr == (f"vlbridge: interrupted: {tmp_path} goes on with --resume\n" if checkpoints else "")


def test_missing_data_is_said_before_anything_else(tmp_path):
    """Not that a CPU has no bfloat16, which `llava_stage1` asks for."""
    with pytest.raises(RecipeError, match=r"data\.0\.path missing: say where the data is"):
        training_run.train(read_recipe("llava_stage1"), tmp_path)
