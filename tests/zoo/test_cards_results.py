"""Results on model cards: the header that the Hub reads, the table, and all else that stays."""

from __future__ import annotations

import pytest
from huggingface_hub import EvalResult, ModelCard
from tiny import tiny_model

from vlbridge.cards_results import add_results


def result(
    metric: str = "accuracy", value: float = 51.25, split: str = "test", dataset: str = "easy-VQA"
) -> EvalResult:
    return EvalResult(
        task_type="image-text-to-text", dataset_type=dataset.lower(), dataset_name=dataset, dataset_split=split,
        metric_type=metric.lower(), metric_name=metric, metric_value=value,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    model, processor = tiny_model("mlp")
    model.save_pretrained(tmp_path / "model", processor=processor)
    return tmp_path / "model"


@pytest.mark.core
def test_a_saved_model_gets_the_real_names(folder):
    add_results(folder, [result(), result("accuracy, 4 shots", 60.0)])
    card = ModelCard.load(folder / "README.md")
    found = [(r.dataset_name, r.dataset_split, r.metric_name, r.metric_value) for r in card.data.eval_results]
    assert found == [("easy-VQA", "test", "accuracy", 51.25), ("easy-VQA", "test", "accuracy, 4 shots", 60.0)]
    assert card.data.model_name and card.data.metrics == ["accuracy", "accuracy, 4 shots"]
    assert "| easy-VQA | test | accuracy | 51.25 |\n| easy-VQA | test | accuracy, 4 shots | 60.0 |" in card.text
    assert card.text.index("## Evaluation") < card.text.index("## Intended use and limits")


def test_a_second_run_replaces_its_own_figures(folder):
    path = add_results(folder, [result(), result(dataset="POPE", split="popular (COCO)")])
    text = path.read_text()
    path.write_text(text.replace("## Intended use", "## Mine\n\nWords of my own.\n\n## Intended use"))
    add_results(folder, [result(value=70.5)])
    card = ModelCard.load(path)
    assert [(r.dataset_name, r.metric_value) for r in card.data.eval_results] == [("easy-VQA", 70.5), ("POPE", 51.25)]
    assert "Words of my own." in card.text and "51.25 |" in card.text
    assert card.text.count("## Evaluation") == 1 and card.text.count("| easy-VQA |") == 1
    add_results(folder, [result(value=70.5)])
    assert path.read_text() == str(card), "the same again changes nothing"


def test_a_card_with_a_section_but_no_table(folder):
    path = folder / "README.md"
    path.write_text("---\nlicense: mit\n---\n\n# Mine\n\n## Evaluation\n\nTo come.\n\n## Limits\n\nMany.\n")
    add_results(folder, [result()])
    card = ModelCard.load(path)
    assert card.data.license == "mit" and "To come.\n\n| data set |" in card.text
    assert card.text.index("| easy-VQA |") < card.text.index("## Limits\n\nMany.")


def test_a_card_that_is_missing_is_made(folder):
    (folder / "README.md").unlink(missing_ok=True)
    card = ModelCard.load(add_results(folder, [result()]))
    assert card.data.library_name == "transformers" and "## Parts" in card.text


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json; expected the folder of a saved model"):
        add_results(tmp_path, [result()])
    (tmp_path / "README.md").write_text("---\n- a list\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"README.md: the card's header can't be read"):
        add_results(tmp_path, [result()])
