"""The real lm-eval with `hf-multimodal`: its answers and accuracies are those of `vlbridge evaluate`."""

from __future__ import annotations

import pytest


pytest.importorskip("lm_eval")

import datasets
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from local_tasks import answered_questions, write_tasks
from tiny import tiny_model

from vlbridge import FAMILIES
from vlbridge.evaluation import evaluate


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_accuracy_is_that_of_vlbridge_evaluate(tmp_path, family, batch_size):
    model, processor = tiny_model(family)
    model.eval().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    said = answered_questions(tmp_path / "data", model, processor)
    own = evaluate(model, processor, "easy_vqa", tmp_path / "data", batch_size=batch_size)
    tasks = write_tasks(tmp_path / "tasks", tmp_path / "data", "lm_eval")
    result = evaluator.simple_evaluate(
        model="hf-multimodal",
        model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32"},
        tasks=["local"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=batch_size,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    samples = sorted(result["samples"]["local"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0].strip() for sample in samples] == said
    accuracy = own["metrics"]["accuracy"]["value"] / 100
    assert 0 < accuracy < 1
    assert result["results"]["local"]["accuracy,none"] == pytest.approx(accuracy, abs=1e-6)  # `evaluate` rounds
