"""`vlbridge evaluate`: what it prints and writes, and with which exit code it refuses what."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import benchmark_layouts as layouts
import pytest
from huggingface_hub import ModelCard
from tiny import tiny_model
from typer.testing import CliRunner

from vlbridge_cli.cli_app import app


@pytest.fixture
def here(tmp_path, monkeypatch):
    """`model` and `data` (easy-VQA) in the working directory."""
    monkeypatch.chdir(tmp_path)
    model, processor = tiny_model("mlp")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    layouts.write_easy_vqa(tmp_path / "data")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def refused(code: int, message: str, *arguments) -> None:
    result = run(*arguments)
    assert (result.stdout, result.exit_code) == ("", code), result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("vlbridge: error: ")]
    assert len(lines) == 1 and message in lines[0], result.stderr
    assert "Traceback" not in result.stderr


ASKED = ("model", "--task", "easy_vqa", "--data", "data", "--device", "cpu")


@pytest.mark.core
def test_table_files_and_card(here):
    result = run(*ASKED, "--limit", 4, "--shuffled", "--output", "out", "--card")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "model: easy-VQA (test), 4 samples"
    assert lines[2].split() == ["easy-VQA", "95", "%", "shuffled"] and lines[3].startswith("accuracy ")
    assert result.stderr.endswith("out: results.json and predictions\nmodel/README.md: figures of easy-VQA (test)\n")
    found = json.loads(Path("out/results.json").read_text())
    (figure,) = ModelCard.load("model/README.md").data.eval_results
    assert (figure.dataset_name, figure.dataset_split) == ("easy-VQA", "test")
    assert figure.metric_value == found["metrics"]["accuracy"]["value"]
    assert len(Path("out/predictions.jsonl").read_text().splitlines()) == 4


def test_settings_reach_the_evaluation(here):
    result = run(*ASKED, "--limit", 2, "--set", "max_new_tokens=2", "--set", "num_beams=2", "--prompt", "{question}!",
                 "--form", "few_shot", "--shots", 1, "--seed", 3, "--batch-size", 1, "--dtype", "float32",
                 "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["asking"]["generation"] == {"max_new_tokens": 2, "num_beams": 2}
    assert (found["asking"]["prompt"], found["asking"]["form"]) == ("{question}!", "few_shot")
    assert (found["shots"], found["seed"], found["batch_size"]) == (1, 3, 1)
    folder = Path("results/model/easy_vqa-test-1-shots-random-2-samples-seed-3")
    assert json.loads((folder / "results.json").read_text()) == found


def test_tasks_are_listed():
    result = run("--list")
    assert result.exit_code == 0
    assert "vqav2                VQAv2; v2_OpenEnded_mscoco_SPLIT_questions.json" in result.stdout


def test_what_is_wrong_with_the_command_line(here):
    refused(2, "name a task: --task", "model")
    refused(2, "data is missing: name the folder that holds", "model", "--task", "vqav2")
    refused(2, "task is 'vqa'; expected one of classification, ", "model", "--task", "vqa", "--data", "data")
    refused(2, "--set num_beams: expected KEY=VALUE", *ASKED, "--set", "num_beams")
    refused(2, "easy_vqa has no split 'val'; expected one of test, train", *ASKED, "--split", "val")
    refused(
        2, "demonstrations are 'best'; expected one of random, rices", *ASKED, "--shots", 1, "--demonstrations", "best"
    )
    refused(2, "prompt '{answer}' has {answer}; expected", *ASKED, "--prompt", "{answer}")
    refused(2, "--card needs a model in a folder; 'org/name' is none", "org/name", *ASKED[1:], "--card")
    refused(2, "--dtype is 'float8'", *ASKED, "--dtype", "float8")


def test_what_is_wrong_with_model_and_data(here):
    refused(1, "cannot load './nowhere': no such folder", "./nowhere", *ASKED[1:])
    refused(1, "nowhere is no folder; expected the data set's", *ASKED[:4], "nowhere", "--device", "cpu")
    (here / "data" / "test" / "images" / "1.png").unlink()
    refused(1, "1-0: ", *ASKED)


def test_a_run_with_other_settings_is_not_overwritten(here):
    assert run(*ASKED, "--limit", 2, "--output", "out").exit_code == 0
    before = Path("out/results.json").read_bytes()
    refused(1, "out holds a run with other settings: samples was 2, now 3", *ASKED, "--limit", 3, "--output", "out")
    assert Path("out/results.json").read_bytes() == before


def test_a_package_that_is_missing(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "vlbridge.evaluation", None)
    refused(1, 'evaluation needs more packages: pip install "vlbridge[eval]"', *ASKED)
