"""Bulk work on Ray Data: the rows of one process, and one row per picture after kills."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from tiny import tiny_image, tiny_model

from vlbridge.bulk import Question, plan, run
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


def test_shards_in_and_out(folder, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    contents = [path.read_bytes() for path in sorted((folder / "pictures").iterdir())[:12]]
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        for number, content in enumerate(contents):
            info = tarfile.TarInfo(f"{number:02}.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    parquet.write_table(pyarrow.table({"image": contents[:5]}), tmp_path / "two.parquet")
    question = Question.of(folder / "model", max_new_tokens=6, device="cpu")
    jobs = [
        plan([tmp_path], tmp_path / name, question, file_format=kind, rows_per_file=4)
        for name, kind in (("tars", "tar"), ("alone", "parquet"))
    ]
    assert sum(done.pictures for done in run_on_ray(jobs[0], 1, device="cpu")) == 17
    assert not list(run_on_ray(jobs[0], 1, device="cpu")), "nothing is left"
    list(run(jobs[1], range(5), *load(folder / "model", "cpu")))
    rows = [list(job.files.rows()) for job in jobs]
    assert rows[0] == rows[1] and [row["error"] is None for row in rows[0]].count(False) == 1
