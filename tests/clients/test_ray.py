"""Bulk work on Ray Data: the rows of one process, and one row per picture after kills."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_image, tiny_model

from vlbridge.bulk import Question, plan
from vlbridge.bulk_ray import run_on_ray
from vlbridge.inference import load


ray = pytest.importorskip("ray")

NUM_PICTURES = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ray")
    model, processor = tiny_model("mlp")
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    (root / "pictures").mkdir()
    for seed in range(NUM_PICTURES):
        tiny_image(seed).save(root / "pictures" / f"{seed:02}.png")
    (root / "pictures" / "07.png").write_bytes(b"no picture")
    return root


def test_killed_with_everything(folder):
    script = Path(__file__).parents[1] / "killed_ray.py"
    command = [sys.executable, script, folder / "model", folder / "pictures", folder / "killed", "2", "2", "2"]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    *tries, result = [json.loads(line) for line in output.splitlines() if line.startswith(b"{")]
    assert result == {"rows": NUM_PICTURES, "different": NUM_PICTURES, "failed": 1}
    assert 0 < tries[0]["files"] <= tries[1]["files_before"] < tries[1]["files"] < tries[2]["files"] == 30
    question = Question.of(folder / "model", max_new_tokens=6, device="cpu")
    whole = plan([folder / "pictures"], folder / "whole", question, rows_per_file=2)
    from vlbridge.bulk import run

    list(run(whole, range(30), *load(folder / "model", "cpu"), batch_size=16))
    killed = plan([folder / "pictures"], folder / "killed", question, rows_per_file=2)
    assert list(killed.files.rows()) == list(whole.files.rows())


def test_an_actor_that_fails(folder):
    question = Question.of(folder / "model", max_new_tokens=6, device="cpu")
    job = plan([folder / "pictures"], folder / "failed", question)
    weights = folder / "model" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(b"no weights")
    try:
        with pytest.raises(RuntimeError, match="an actor has failed"):
            list(run_on_ray(job, 1, device="cpu"))
    finally:
        weights.write_bytes(kept)
