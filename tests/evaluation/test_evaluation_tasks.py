"""Tasks: their files, the papers' prompts, and what is refused."""

from __future__ import annotations

import pytest
import yaml

from vlbridge import FAMILIES
from vlbridge.evaluation.evaluation_samples import Sample
from vlbridge.evaluation.evaluation_tasks import TaskError, changed, load_task, task_names


SAMPLE = Sample("0", {"path": "x", "bytes": None}, ("B",), "What?", ("dog", "cat"), None, "Look.")
BARE = Sample("0", {"path": "x", "bytes": None}, ("B",), "What?", ("dog", "cat"))
SINGLE = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize("name", task_names())
def test_every_task_says_where_its_settings_are_from(name):
    task = load_task(name)
    assert task.title and task.layout
    assert not task.splits or {task.split, task.demonstration_split} - {None} <= set(task.splits)
    for family in (*FAMILIES, None):
        asking = task.asking(family)
        assert asking.source
        assert asking.method == "rank" or asking.generation or task.kind == "retrieval"


@pytest.mark.core
@pytest.mark.parametrize(
    ("task", "family", "prompt", "generation"),
    [
        ("vqav2", "perceiver", "What?", {"num_beams": 3, "length_penalty": 0.0, "max_new_tokens": 5}),
        ("vqav2", "qformer", "Question: What? Short answer:",
         {"num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 10}),
        ("vqav2", "mlp", "What?" + SINGLE, {"max_new_tokens": 128}),
        ("vizwiz", "mlp",
         "What?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SINGLE,
         {"max_new_tokens": 128}),
        ("scienceqa_img", "mlp",
         "What?\nLook.\nA. dog\nB. cat\nAnswer with the option's letter from the given choices directly.",
         {"max_new_tokens": 128}),
        ("scienceqa_img", "qformer", "Question: What? Look. Answer:", {}),
        ("easy_vqa", "perceiver", "What?", {"max_new_tokens": 8}),
    ],
)  # fmt: skip
def test_prompts_and_settings_are_the_papers(task, family, prompt, generation):
    asking = load_task(task).asking(family)
    assert asking.question_of(SAMPLE) == prompt
    assert asking.generation == generation


def test_captions_are_asked_for_in_the_processors_words_or_in_the_papers():
    sample = Sample("0", {"path": "x", "bytes": None}, ("a dog",))
    task = load_task("coco_karpathy")
    assert [task.asking(family).question_of(sample) for family in ("perceiver", "qformer")] == [None, None]
    assert task.asking("mlp").question_of(sample) == "Provide a one-sentence caption for the provided image."


def test_a_question_without_context_has_no_gap():
    task = load_task("scienceqa_img")
    assert task.asking("qformer").question_of(BARE) == "Question: What? Answer:"
    assert task.asking("mlp").question_of(BARE).startswith("What?\nA. dog\nB. cat\n")


def test_texts_end_where_the_next_part_would_begin():
    asking = load_task("vqav2").asking("perceiver")
    assert asking.cut(" red, blue") == "red"
    assert asking.cut("two Question:how") == "two"
    assert load_task("coco_karpathy").asking("perceiver").cut("a dog Output:a cat") == "a dog"
    assert load_task("vqav2").asking("mlp").cut(" red, Question ") == "red, Question"


def test_all_of_it_can_be_changed():
    asking = load_task("vqav2").asking("qformer")
    new = changed(asking, prompt="{question}!", generation={"num_beams": 1}, form="chat", method=None, top_k=None)
    assert new.question_of(SAMPLE) == "What?!"
    assert new.generation == {"num_beams": 1, "length_penalty": -1.0, "max_new_tokens": 10}
    assert new.source.endswith("; changed: form, generation, prompt")
    assert changed(asking, prompt=None, generation={}) is asking


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "{image}"}, r"prompt '\{image\}' has \{image\}; expected \{question\}, \{context\} or \{choices\}"),
        ({"prompt": "{"}, "write a brace twice"),
        ({"form": "plain"}, "form is 'plain'; expected 'chat' or 'few_shot'"),
        ({"method": "guess"}, "method is 'guess'; expected 'generate' or 'rank'"),
    ],
)
def test_wrong_changes_are_refused(given, message):
    with pytest.raises(TaskError, match=message):
        changed(load_task("vqav2").asking("mlp"), **given)


def test_a_task_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    content = {"title": "Mine", "reader": "vqav2", "kind": "answer", "score": "vqa", "split": "val2014"}
    path.write_text(yaml.safe_dump({**content, "families": {"default": {"prompt": "{question}?"}}}))
    task = load_task(str(path))
    assert (task.name, task.dataset, task.asking("mlp").prompt) == ("mine", None, "{question}?")
    for wrong, message in (
        ({"readr": 1}, r"mine.yaml has readr; expected some of dataset, "),
        ({"name": "x"}, r"mine.yaml has name"),
        ({"reader": "nothing"}, r"reader is 'nothing'; expected one of coco_karpathy, "),
        ({"title": None}, r"mine.yaml has no title"),
        ({"families": {"bridge": {}}}, r"families has \['bridge'\]; expected some of mlp, qformer, perceiver, default"),
        ({"families": {"mlp": {"promt": ""}}}, r"mine.yaml, mlp has promt; expected some of form, "),
        ({"splits": ["a"]}, r"splits is \['a'\]; expected their real names"),
    ):
        path.write_text(yaml.safe_dump({**content, **wrong}))
        with pytest.raises(TaskError, match=message):
            load_task(str(path))
    path.write_text("a: [")
    with pytest.raises(TaskError, match="mine.yaml is no YAML"):
        load_task(str(path))
    path.write_text("- a")
    with pytest.raises(TaskError, match="mine.yaml is a list; expected some of"):
        load_task(str(path))


def test_tasks_and_splits_that_are_not_there():
    with pytest.raises(TaskError, match=r"task is 'vqa'; expected one of classification, .* or a YAML file"):
        load_task("vqa")
    with pytest.raises(TaskError, match=r"nothing.yaml can't be read"):
        load_task("nothing.yaml")
    with pytest.raises(TaskError, match=r"vqav2 has no split 'val'; expected one of val2014, train2014"):
        load_task("vqav2").check_split("val")
