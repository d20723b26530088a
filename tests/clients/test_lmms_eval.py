"""The real lmms-eval: its answers and accuracies are those of `vlbridge evaluate` and of single prompts."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest


pytest.importorskip("lmms_eval")

import datasets
from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from local_tasks import answered_questions, write_tasks
from tiny import tiny_image, tiny_model

from vlbridge import FAMILIES
from vlbridge.evaluation import evaluate
from vlbridge.evaluation.evaluation_lmms_eval import few_shot_messages, generation_options
from vlbridge.evaluation.evaluation_models import in_chat_form
from vlbridge.inference import answer, answer_few_shot, generate_texts


ROOT = Path(__file__).parents[2]
COMBINATIONS = [*((family, "llama") for family in FAMILIES), ("qformer", "t5")]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a saved tiny model, its model and its processor."""
    made: dict = {}

    def of(family: str, language: str = "llama"):
        if (family, language) not in made:
            folder = tmp_path_factory.mktemp(f"{family}_{language}")
            model, processor = tiny_model(family, language)
            model.eval().save_pretrained(folder)
            processor.save_pretrained(folder)
            made[family, language] = folder, model, processor
        return made[family, language]

    return of


def run(task: str, tasks, folder, form: str = "chat", **options):
    """What lmms-eval finds, and its samples in the order of the questions."""
    result = evaluator.simple_evaluate(
        model="vlbridge",
        model_args=f"pretrained={folder},dtype=float32,form={form}",
        tasks=[task],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False, model_name="vlbridge"),
        device="cpu",
        bootstrap_iters=0,
        process_docs_parallel=1,
        **options,
    )
    return result["results"][task], sorted(result["samples"][task], key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("family", "language"), COMBINATIONS)
def test_accuracy_is_that_of_vlbridge_evaluate(saved, tmp_path, family, language, batch_size):
    folder, model, processor = saved(family, language)
    said = answered_questions(tmp_path / "data", model, processor)
    own = evaluate(
        str(folder), task="easy_vqa", data=tmp_path / "data", batch_size=batch_size, device="cpu", dtype="float32"
    )
    found, samples = run("local", write_tasks(tmp_path / "tasks", tmp_path / "data", "lmms_eval"), folder,
                         batch_size=batch_size)  # fmt: skip
    assert [sample["filtered_resps"] for sample in samples] == [[text] for text in said]
    accuracy = own["metrics"]["accuracy"]["value"] / 100
    assert 0 < accuracy < 1
    assert found["accuracy,none"] == pytest.approx(accuracy, abs=1e-6)  # `evaluate` rounds


@pytest.mark.parametrize("family", FAMILIES)
def test_later_rounds_follow_from_earlier_answers(saved, tmp_path, family):
    folder, model, processor = saved(family)
    answered_questions(tmp_path / "data", model, processor)
    _, samples = run("local_rounds", write_tasks(tmp_path / "tasks", tmp_path / "data", "lmms_eval"), folder, limit=2)
    for sample in samples:
        image, question, texts = sample["doc"]["picture"], sample["doc"]["question"], []
        for _ in range(3):
            texts += answer(model, processor, [image], question, max_new_tokens=8)
            question = f"is {texts[-1]} right?"
        assert sample["filtered_resps"] == [texts]


@pytest.mark.parametrize("form", ["chat", "few_shot"])
def test_the_task_in_the_documents(saved, tmp_path, form):
    """docs/harnesses.md: its files, with and without its demonstrations, on other pictures."""
    folder, model, processor = saved("perceiver")
    said = answered_questions(tmp_path / "data", model, processor)
    tasks = write_tasks(tmp_path / "tasks", tmp_path / "data", "lmms_eval")  # for the rows
    page = (ROOT / "docs" / "harnesses.md").read_text(encoding="utf-8")
    (settings,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    utils, more_utils = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    settings = settings.replace("/data/rows.jsonl", str(tasks / "rows.jsonl"))
    (tasks / "local.yaml").write_text(settings)
    (tasks / "utils.py").write_text(utils)
    if form == "few_shot":
        (tasks / "local.yaml").write_text(settings + "doc_to_messages: !function utils.doc_to_messages\n")
        shown = tmp_path / "data" / "test" / "images" / "0.png"
        (tasks / "utils.py").write_text(utils + more_utils.replace("/data/train/1.png", str(shown)))
    found, samples = run("my_task", tasks, folder, form)
    if form == "few_shot":
        shown = {"image": str(shown), "question": "what color is it?", "answer": "red"}
        asked = [{"image": row["doc"]["picture"], "question": row["doc"]["question"]} for row in samples]
        said = [answer_few_shot(model, processor, [[shown]], [query], max_new_tokens=8)[0] for query in asked]
    assert [sample["filtered_resps"] for sample in samples] == [[text] for text in said]
    right = [text == sample["doc"]["answer"] for text, sample in zip(said, samples)]
    assert found["accuracy,none"] == pytest.approx(sum(right) / len(right))


# ---------------------------------------------------------------------- the model by itself


def ask(model, messages: list, **generation) -> list[str]:
    """Answers to messages, which are the documents of a task here."""
    model.task_dict["any"] = {"test": messages}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=("", lambda document: document, generation, number, "any", "test"),
            idx=0,
            metadata={"task": "any", "doc_id": number, "repeats": 1},
        )
        for number in range(len(messages))
    ]
    return model.generate_until(requests)


def text_of(words: str) -> dict:
    return {"type": "text", "text": words}


def picture_of(seed: int) -> dict:
    return {"type": "image", "url": tiny_image(seed)}


def single(model, processor, conversation: list, **options) -> str:
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return generate_texts(model, processor, inputs, **options)[0]


@pytest.mark.parametrize(("family", "language"), COMBINATIONS)
def test_any_number_of_images_and_a_system_prompt(saved, family, language):
    folder, model, processor = saved(family, language)
    contents = [
        [picture_of(0), picture_of(1), text_of("which is larger?")],
        [text_of("no picture at all")],
        [text_of("before"), picture_of(2), text_of("and behind the picture")],
    ]
    harness = get_model("vlbridge")(str(folder), batch_size=3, device="cpu", system_prompt="Be brief.")
    found = ask(harness, [[{"role": "user", "content": content}] for content in contents], max_new_tokens=6)
    for text, content in zip(found, contents):
        said = [{"type": "image", "image": part["url"]} if "url" in part else part for part in content]
        conversation = [{"role": "system", "content": [text_of("Be brief.")]}, {"role": "user", "content": said}]
        assert text == single(model, processor, conversation, max_new_tokens=6)
    assert len(set(found)) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_demonstrations(saved, family):
    folder, model, processor = saved(family)
    shown = [{"image": tiny_image(n), "question": f"what is {n}?", "answer": f"it is {n}"} for n in range(3)]
    queries = [{"image": tiny_image(10 + n), "question": f"and {n}?"} for n in range(3)]
    messages = [few_shot_messages(shown, query) for query in queries]
    for form, own in (("few_shot", processor), ("chat", in_chat_form(processor))):
        harness = get_model("vlbridge")(str(folder), batch_size=2, device="cpu", form=form)
        expected = [answer_few_shot(model, own, [shown], [query], max_new_tokens=6)[0] for query in queries]
        assert ask(harness, messages, max_new_tokens=6) == expected


def test_answers_end_where_the_task_says(saved):
    folder, model, processor = saved("mlp")
    harness = get_model("vlbridge")(str(folder), device="cpu")
    messages = [[{"role": "user", "content": [picture_of(0), text_of("what?")]}]]
    (whole,) = answer(model, processor, [tiny_image(0)], "what?", max_new_tokens=8)
    assert ask(harness, messages, max_new_tokens=8) == [whole]
    ends = whole[len(whole) // 2]
    assert ask(harness, messages, max_new_tokens=8, until=["never said", ends]) == [whole.split(ends)[0].strip()]


def test_beams_are_searched(saved):
    folder, model, processor = saved("qformer")
    harness = get_model("vlbridge")(str(folder), device="cpu")
    messages = [[{"role": "user", "content": [picture_of(0), text_of("what?")]}]]
    assert ask(harness, messages, max_new_tokens=6, num_beams=3) == answer(
        model, processor, [tiny_image(0)], "what?", max_new_tokens=6, num_beams=3
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"do_sample": False, "until": None}, {"max_new_tokens": 256, "do_sample": False}),
        ({"temperature": 0.0, "top_p": 0.9, "top_k": 3, "max_gen_toks": 5}, {"max_new_tokens": 5, "do_sample": False}),
        ({"temperature": 0.7, "max_new_tokens": 5}, {"max_new_tokens": 5, "temperature": 0.7, "do_sample": True}),
        ({"temperature": 0, "do_sample": True}, {"max_new_tokens": 256, "do_sample": False}),
        ({"temperature": 0.7, "do_sample": False}, {"max_new_tokens": 256, "do_sample": False}),
    ],
)
def test_generation_settings(given, expected):
    assert generation_options(given) == (expected, ())


def test_settings_of_other_models_are_ignored_aloud(caplog):
    with caplog.at_level(logging.WARNING):
        options, until = generation_options({"image_aspect_ratio": "pad", "until": "\n"})
    assert (options, until) == ({"max_new_tokens": 256, "do_sample": False}, ("\n",))
    assert "image_aspect_ratio" in caplog.text


def test_what_can_not_be_done_is_refused(saved):
    folder, _, _ = saved("mlp")
    model_class = get_model("vlbridge")
    with pytest.raises(ValueError, match="batch_size is 'auto'"):
        model_class(str(folder), batch_size="auto")
    with pytest.raises(ValueError, match="form is 'chats'; expected one of chat, few_shot"):
        model_class(str(folder), form="chats")
    with pytest.raises(ValueError, match="no place for a system prompt"):
        model_class(str(folder), form="few_shot", system_prompt="Be brief.")
    harness = model_class(str(folder), device="cpu")
    with pytest.raises(ValueError, match="the task gives video to read"):
        ask(harness, [[{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]])
    with pytest.raises(ValueError, match="num_return_sequences is 3; expected 1"):
        ask(harness, [[{"role": "user", "content": "hello"}]], num_return_sequences=3)
    with pytest.raises(NotImplementedError, match="vlbridge evaluate --method rank"):
        harness.loglikelihood([])
    harness = model_class(str(folder), device="cpu", form="few_shot")
    with pytest.raises(ValueError, match="takes one image per question; the task has 2"):
        ask(harness, [[{"role": "user", "content": [picture_of(0), picture_of(1), text_of("?")]}]])
    with pytest.raises(ValueError, match="messages of system, user"):
        ask(harness, [[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]])
