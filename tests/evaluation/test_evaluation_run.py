"""`evaluate`: answers are those of single rows, baselines, results, resuming; every family and every kind of task."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_layouts as layouts
import pytest
import torch
from PIL import Image
from tiny import (
    BRIDGE_OPTIONS,
    VISION,
    clip_image_processor,
    tiny_image,
    tiny_model,
    tiny_stage1,
)

from vlbridge import FAMILIES, QFormerBlip2ForImageTextRetrieval
from vlbridge.evaluation import TaskError, evaluate, evaluation_captions
from vlbridge.evaluation.evaluation_answers import GREY, shuffled_pictures
from vlbridge.evaluation.evaluation_metrics import rank_of_best
from vlbridge.evaluation.evaluation_models import in_chat_form
from vlbridge.evaluation.evaluation_samples import read_samples
from vlbridge.evaluation.evaluation_scores import eval_results, table_lines
from vlbridge.few_shot import draw, rank_answers
from vlbridge.inference import answer, answer_few_shot
from vlbridge.retrieval import ImageIndex


pytestmark = pytest.mark.filterwarnings("ignore:.*no_split_modules")


@pytest.fixture(autouse=True)
def without_java(monkeypatch):
    """Java's programs take a while to start; they have tests of their own."""
    monkeypatch.setattr(evaluation_captions, "has_java", lambda: False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder with every benchmark's files."""
    folder = tmp_path_factory.mktemp("data")
    for name, write in (
        ("vqav2", layouts.write_vqav2),
        ("easy_vqa", layouts.write_easy_vqa),
        ("coco", layouts.write_karpathy),
        ("pope", layouts.write_pope),
        ("scienceqa", layouts.write_scienceqa),
        ("classes", layouts.write_classes),
        ("nocaps", layouts.write_nocaps),
    ):
        (folder / name).mkdir()
        write(folder / name)
    layouts.write_classes(folder / "classes", "train")
    return folder


@pytest.fixture(scope="module")
def models():
    made: dict = {}

    def model(family: str, language: str = "llama"):
        if (family, language) not in made:
            made[family, language] = tiny_model(family, language)
        return made[family, language]

    return model


def rows_of(folder: Path, name: str = "predictions") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- answers


@pytest.mark.core
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_single_prompts(data, models, family, tmp_path):
    model, processor = models(family)
    result = evaluate(model, processor, "vqav2", data / "vqav2", tmp_path / "out", batch_size=2)
    samples = read_samples("vqav2", data / "vqav2", "val2014")
    prompt, options = {
        "mlp": ("{}\nAnswer the question using a single word or phrase.", {"max_new_tokens": 128}),
        "qformer": ("Question: {} Short answer:", {"num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 10}),
        "perceiver": ("{}", {"num_beams": 3, "length_penalty": 0.0, "max_new_tokens": 5}),
    }[family]
    for row, sample in zip(rows_of(tmp_path / "out"), samples, strict=True):
        query = {"image": sample.open(), "question": prompt.format(sample.question)}
        (text,) = answer_few_shot(model, processor, [[]], [query], **options)
        if family == "perceiver":
            for stop in ("Question", "Answer", "Short", ", "):
                text = text.split(stop)[0]
        assert row["prediction"] == text.strip()
        assert (row["id"], row["references"]) == (sample.id, list(sample.references))
    assert result["model"]["family"] == family
    assert result["asking"]["generation"] == options


def test_an_encoder_decoder(data, models):
    model, processor = models("qformer", "t5")
    assert evaluate(model, processor, "vqav2", data / "vqav2")["samples"] == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_easy_vqa_is_asked_as_a_conversation(data, models, family, tmp_path):
    model, processor = models(family)
    evaluate(model, processor, "easy_vqa", data / "easy_vqa", tmp_path / "out")
    for row, sample in zip(rows_of(tmp_path / "out"), read_samples("easy_vqa", data / "easy_vqa", "test")):
        assert [row["prediction"]] == answer(model, processor, [sample.open()], sample.question, max_new_tokens=8)
    text, _ = in_chat_form(processor).few_shot([], {"image": tiny_image(), "question": "a?"}, tokenize=False)
    assert "Question:" not in text
    if family == "perceiver":
        text, _ = processor.few_shot([], {"image": tiny_image(), "question": "a?"}, tokenize=False)
        assert text == "<image>Question:a? Short answer:", "the processor itself is not changed"


@pytest.mark.parametrize("family", FAMILIES)
def test_baselines(data, models, family, tmp_path):
    model, processor = models(family)
    result = evaluate(
        model, processor, "easy_vqa", data / "easy_vqa", tmp_path / "out", blind=True, grey=True, shuffled=True
    )
    samples = read_samples("easy_vqa", data / "easy_vqa", "test")
    chat, options = in_chat_form(processor), {"max_new_tokens": 8}
    others = shuffled_pictures(samples, 0)
    for number in (0, 7):
        sample, question = samples[number], {"question": samples[number].question}
        grey = Image.new("RGB", sample.open().size, GREY)
        for name, query in (
            ("blind", question),
            ("grey", {"image": grey, **question}),
            ("shuffled", {"image": others[number].open(), **question}),
        ):
            expected = answer_few_shot(model, chat, [[]], [query], **options)
            assert [rows_of(tmp_path / "out", name)[number]["prediction"]] == expected, name
    assert set(result["baselines"]) == {"blind", "grey", "shuffled"}
    assert result["baselines"]["blind"]["how"] == "The same prompts without pictures."
    assert set(result["baselines"]["shuffled"]["breakdown"]) == set(result["breakdown"])


def test_shuffled_pictures_are_others_and_the_same_for_all_questions(data):
    samples = read_samples("easy_vqa", data / "easy_vqa", "test")
    given = shuffled_pictures(samples, 3)
    pairs = {(sample.image_key, other.image_key) for sample, other in zip(samples, given)}
    assert len(pairs) == 4 == len({other for _, other in pairs})
    assert all(own != other for own, other in pairs)
    with pytest.raises(TaskError, match="at least two pictures"):
        shuffled_pictures(samples[:3])


# ---------------------------------------------------------------------- demonstrations


@pytest.mark.parametrize("family", FAMILIES)
def test_demonstrations_that_all_share(data, models, family, tmp_path):
    model, processor = models(family)
    result = evaluate(
        model, processor, "easy_vqa", data / "easy_vqa", tmp_path / "out", shots=2, seed=5, limit=4, blind=True
    )
    pool = read_samples("easy_vqa", data / "easy_vqa", "train")
    shown = [pool[number] for number in draw(len(pool), 2, 5)]
    assert result["demonstrations"] == {
        "how": "random", "text_only": False, "pool": 18, "seed": 5, "ids": [one.id for one in shown],
    }  # fmt: skip
    turns = [{"image": one.open(), "question": one.question, "answer": one.references[0]} for one in shown]
    blind = [{key: value for key, value in turn.items() if key != "image"} for turn in turns]
    by_id = {sample.id: sample for sample in read_samples("easy_vqa", data / "easy_vqa", "test")}
    for name, demonstrations in (("predictions", turns), ("blind", blind)):
        rows = rows_of(tmp_path / "out", name)
        assert len(rows) == 4
        for row in rows:
            query = {"image": by_id[row["id"]].open(), "question": row["question"]}
            if name == "blind":
                del query["image"]
            expected = answer_few_shot(model, in_chat_form(processor), [demonstrations], [query], max_new_tokens=8)
            assert [row["prediction"]] == expected


@pytest.mark.parametrize("how", ["random", "rices"])
@pytest.mark.parametrize("family", FAMILIES)
def test_demonstrations_without_their_pictures(data, models, family, how, tmp_path):
    model, processor = models(family)
    evaluate(
        model, processor, "easy_vqa", data / "easy_vqa", tmp_path / "out", shots=2, demonstrations=how, text_only=True,
        limit=2,
    )  # fmt: skip
    pool = read_samples("easy_vqa", data / "easy_vqa", "train")
    by_id = {sample.id: sample for sample in read_samples("easy_vqa", data / "easy_vqa", "test")}
    for row in rows_of(tmp_path / "out"):
        image = by_id[row["id"]].open()
        numbers = draw(len(pool), 2, 0)
        if how == "rices":
            (nearest,) = ImageIndex.build(model, processor, [one.open() for one in pool]).nearest([image], 2)
            numbers = nearest[::-1]
        turns = [{"question": pool[number].question, "answer": pool[number].said} for number in numbers]
        query = {"image": image, "question": row["question"]}
        expected = answer_few_shot(model, in_chat_form(processor), [turns], [query], max_new_tokens=8)
        assert [row["prediction"]] == expected


def test_captions_as_demonstrations(data, models, tmp_path):
    model, processor = models("perceiver")
    evaluate(model, processor, "coco_karpathy", data / "coco", tmp_path / "out", shots=1)
    (shown,) = (read_samples("coco_karpathy", data / "coco", "train")[number] for number in draw(2, 1, 0))
    turn = {"image": shown.open(), "caption": shown.references[0]}
    sample = read_samples("coco_karpathy", data / "coco", "test")[0]
    options = {"num_beams": 3, "length_penalty": 0.0, "max_new_tokens": 20}
    (text,) = answer_few_shot(model, processor, [[turn]], [{"image": sample.open()}], **options)
    assert rows_of(tmp_path / "out")[0]["prediction"] == text.split("Output")[0].strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_demonstrations_with_the_most_similar_pictures(data, models, family, tmp_path):
    model, processor = models(family)
    result = evaluate(
        model, processor, "easy_vqa", data / "easy_vqa", tmp_path / "out", shots=2, demonstrations="rices", limit=3,
        grey=True,
    )  # fmt: skip
    pool = read_samples("easy_vqa", data / "easy_vqa", "train")
    index = ImageIndex.build(model, processor, [one.open() for one in pool])
    by_id = {sample.id: sample for sample in read_samples("easy_vqa", data / "easy_vqa", "test")}
    for row in rows_of(tmp_path / "out"):
        image = by_id[row["id"]].open()
        (nearest,) = index.nearest([image], 2)
        shown = [pool[number] for number in reversed(nearest)]
        turns = [{"image": one.open(), "question": one.question, "answer": one.said} for one in shown]
        query = {"image": image, "question": row["question"]}
        expected = answer_few_shot(model, in_chat_form(processor), [turns], [query], max_new_tokens=8)
        assert [row["prediction"]] == expected
    assert result["demonstrations"]["ids"] is None
    assert "drawn at random here: the nearest ones would tell" in result["baselines"]["grey"]["how"]
    assert len(list((tmp_path / "vlbridge_cache" / "rices").iterdir())) == 1


# ---------------------------------------------------------------------- other kinds of tasks


def test_captions(data, models, tmp_path):
    model, processor = models("qformer")
    result = evaluate(model, processor, "coco_karpathy", data / "coco", tmp_path / "out")
    cider = next(value for name, value in result["metrics"].items() if name.startswith("CIDEr"))
    assert cider["low"] <= cider["value"] <= cider["high"]
    assert next(v for n, v in result["metrics"].items() if n.startswith("BLEU-4"))["low"] is None
    assert any("SPICE" in note for note in result["notes"]) or "SPICE" in result["metrics"]
    assert (result["dataset"], result["split_name"]) == ("COCO Captions", "Karpathy test")


def test_a_prompt_for_captions(data, models, tmp_path):
    model, processor = models("mlp")
    evaluate(
        model, processor, "nocaps", data / "nocaps", tmp_path / "out", prompt="Say.", generation={"max_new_tokens": 4}
    )
    sample = read_samples("nocaps", data / "nocaps", "val")[0]
    assert [rows_of(tmp_path / "out")[0]["prediction"]] == answer(
        model, processor, [sample.open()], "Say.", max_new_tokens=4
    )


def test_choices_are_ranked_or_generated(data, models, tmp_path):
    model, processor = models("qformer")
    result = evaluate(model, processor, "scienceqa_img", data / "scienceqa", tmp_path / "out", blind=True)
    samples = read_samples("scienceqa", data / "scienceqa", "test")
    questions = ["Question: Which 1? Answer:", "Question: Which 2? Look. Answer:"]
    queries = [{"image": s.open(), "question": q} for s, q in zip(samples, questions)]
    scores = rank_answers(model, processor, [], queries, [list(s.choices) for s in samples])
    for row, values in zip(rows_of(tmp_path / "out"), scores, strict=True):
        order = sorted("ABC", key=lambda letter: -values["ABC".index(letter)])
        assert row["ranked"] == order and row["prediction"] == order[0]
        assert row["scores"] == pytest.approx(sorted(values, reverse=True), abs=1e-4)
    assert result["metrics"]["accuracy"]["value"] in (0, 50, 100)
    letters = evaluate(*models("mlp"), "scienceqa_img", data / "scienceqa", tmp_path / "letters",
                       generation={"max_new_tokens": 3})  # fmt: skip
    assert letters["asking"]["method"] == "generate" and "ranked" not in rows_of(tmp_path / "letters")[0]


def test_pope(data, models):
    result = evaluate(*models("mlp"), "pope", data / "pope", generation={"max_new_tokens": 3})
    assert list(result["metrics"]) == ["accuracy", "precision", "recall", "F1", "yes ratio"]
    # texts of random letters have no "no" in them: yes to everything
    assert [result["metrics"][name]["value"] for name in ("accuracy", "recall", "yes ratio")] == [50, 100, 100]
    assert result["breakdown"]["popular"]["F1"] == pytest.approx(66.6667)


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_by_a_classifier(data, family, tmp_path):
    torch.manual_seed(0)
    options = {**BRIDGE_OPTIONS, "mlp": {"hidden_size": 16}}[family]
    model, processor = FAMILIES[family].classifier_class.from_vision(
        VISION["clip"](), image_processor=clip_image_processor(), id2label={0: "hot_dog", 1: "cat"}, **options
    )
    result = evaluate(model, processor, "classification", data / "classes", tmp_path / "out", grey=True, batch_size=3)
    for row, sample in zip(rows_of(tmp_path / "out"), read_samples("imagefolder", data / "classes", "test")):
        logits = model(**processor(images=sample.open(), return_tensors="pt")).logits
        assert row["prediction"] == ("hot dog", "cat")[int(logits.argmax())]
    assert len({row["prediction"] for row in rows_of(tmp_path / "out", "grey")}) == 1
    assert result["baselines"]["grey"]["metrics"]["accuracy"]["value"] == 50
    assert (result["dataset"], result["split_name"]) == ("classes", "test")
    model.config.id2label = {0: "dog", 1: "cat"}
    with pytest.raises(ValueError, match="the data have the class 'hot dog', which the model does not know"):
        evaluate(model, processor, "classification", data / "classes")
    with pytest.raises(ValueError, match="classifier, which answers no questions"):
        evaluate(model, processor, "vqav2", data / "vqav2")
    with pytest.raises(ValueError, match="use grey instead of blind"):
        evaluate(model, processor, "classification", data / "classes", blind=True)


def test_classes_by_the_likeliest_caption(data, models, tmp_path):
    model, processor = models("perceiver")
    evaluate(model, processor, "classification", data / "classes", tmp_path / "out", shots=1)
    (shown,) = (read_samples("imagefolder", data / "classes", "train")[number] for number in draw(4, 1, 0))
    sample = read_samples("imagefolder", data / "classes", "test")[0]
    turn = {"image": shown.open(), "caption": shown.references[0]}
    (scores,) = rank_answers(model, processor, [turn], [{"image": sample.open()}], [["cat", "hot dog"]])
    assert rows_of(tmp_path / "out")[0]["prediction"] == ("cat", "hot dog")[scores[1] > scores[0]]


def test_the_split_of_a_folder_is_its_real_name(data, models):
    model, processor = models("mlp")
    result = evaluate(model, processor, "classification", data / "classes" / "train", dataset_name="My pictures")
    assert (result["dataset"], result["split_name"], result["samples"]) == ("My pictures", "train", 4)
    result = evaluate(model, processor, "classification", data / "classes", split="train")
    assert (result["dataset"], result["split_name"]) == ("classes", "train")
    with pytest.raises(TaskError, match="has no folder 'val'"):
        evaluate(model, processor, "classification", data / "classes", split="val")


def test_retrieval(data, tmp_path):
    model, processor = tiny_stage1(cls=QFormerBlip2ForImageTextRetrieval)
    result = evaluate(model, processor, "retrieval_coco", data / "coco", tmp_path / "out", top_k=3, shuffled=True)
    samples = read_samples("coco_karpathy", data / "coco", "test")
    texts = [text for sample in samples for text in sample.references]
    inputs = processor(images=[sample.open() for sample in samples], text=texts, return_tensors="pt")
    ranked = model.rank(**inputs, top_k=3)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 4 + 8
    for number in range(4):
        right = [2 * number, 2 * number + 1]
        assert rows[number]["rank_itc"] == rank_of_best(ranked.itc_scores[number].tolist(), right)
        assert rows[number]["rank_itm"] == rank_of_best(ranked.image_to_text[number].tolist(), right)
    for text in range(8):
        assert rows[4 + text]["rank_itc"] == rank_of_best(ranked.itc_scores[:, text].tolist(), [text // 2])
        assert rows[4 + text]["rank_itm"] == rank_of_best(ranked.text_to_image[text].tolist(), [text // 2])
    hits = sum(row["rank_itm"] <= 1 for row in rows[:4])
    assert result["metrics"]["image to text R@1, ITM"]["value"] == 25 * hits
    assert result["metrics"]["text to image R@10, ITC"]["value"] == 100
    with pytest.raises(TaskError, match="has no blind baseline"):
        evaluate(model, processor, "retrieval_coco", data / "coco", blind=True)
    with pytest.raises(TaskError, match="has no demonstrations"):
        evaluate(model, processor, "retrieval_coco", data / "coco", shots=1)
    with pytest.raises(ValueError, match="has no language model to answer with"):
        evaluate(model, processor, "vqav2", data / "vqav2")


def test_retrieval_is_for_stage_1(data, models):
    with pytest.raises(ValueError, match="is for models of stage 1"):
        evaluate(*models("qformer"), "retrieval_coco", data / "coco")


# ---------------------------------------------------------------------- results


@pytest.mark.core
def test_results_say_what_was_done(data, models, tmp_path):
    model, processor = models("mlp")
    out = tmp_path / "out"
    result = evaluate(model, processor, "easy_vqa", data / "easy_vqa", out, limit=5, seed=2, shuffled=True)
    assert json.loads((out / "results.json").read_text()) == result
    assert (result["samples"], result["samples_of_split"]) == (5, 12)
    assert result["asking"]["prompt"] == "{question}" and result["asking"]["source"] == "the recipes small_*"
    assert {"vlbridge", "torch", "transformers"} <= set(result["versions"])
    assert set(result["model"]["frozen_parts"]) == {"vision_model", "language_model"}
    assert result["files"] == {"predictions": "predictions.jsonl", "shuffled": "shuffled.jsonl"}
    values = [100 * float(row["prediction"].lower() == row["references"][0]) for row in rows_of(out)]
    assert result["metrics"]["accuracy"]["value"] == sum(values) / 5
    lines = table_lines(result)
    assert lines[0].endswith("easy-VQA (test), 5 samples") and "shuffled" in lines[2]
    (timed,) = json.loads((out / "timing.json").read_text())["runs"]
    assert [timed["answered"][name]["answers"] for name in ("predictions", "shuffled")] == [5, 5]
    assert 0 < sum(part["seconds"] for part in timed["answered"].values()) <= timed["seconds"] + 0.1
    assert timed["peak_memory"]["process"] > 50e6
    (figure,) = eval_results(result)
    assert (figure.dataset_name, figure.dataset_split) == ("easy-VQA", "test")
    assert figure.metric_name == "accuracy, 5 of 12 samples"


def test_the_same_samples_are_drawn_for_every_model(data, models, tmp_path):
    for family in ("mlp", "perceiver"):
        evaluate(*models(family), "easy_vqa", data / "easy_vqa", tmp_path / family, limit=5)
    chosen = [[row["id"] for row in rows_of(tmp_path / family)] for family in ("mlp", "perceiver")]
    assert chosen[0] == chosen[1]


def test_a_model_from_its_folder(data, models, tmp_path):
    model, processor = models("mlp")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    found = evaluate(tmp_path / "model", None, "easy_vqa", data / "easy_vqa", device="cpu", limit=3)
    expected = evaluate(model, processor, "easy_vqa", data / "easy_vqa", limit=3)
    assert found["metrics"] == expected["metrics"]
    assert found["model"]["trained_sha256"] == expected["model"]["trained_sha256"]


def test_what_is_refused(data, models, tmp_path):
    model, processor = models("mlp")

    def run(task="easy_vqa", place="easy_vqa", **options):
        return evaluate(model, processor, task, data / place, **options)

    for options, message in (
        ({"task": "nothing"}, "task is 'nothing'; expected one of"),
        ({"split": "val"}, "easy_vqa has no split 'val'; expected one of test, train"),
        ({"shots": 99}, "shots is 99, but there are only 18 samples to show"),
        ({"shots": -1}, "shots is -1; expected 0 or more"),
        ({"shots": 1, "demonstrations": "best"}, "demonstrations are 'best'; expected one of random, rices"),
        ({"shots": 1, "demonstration_split": "test"}, "demonstrations are from 'test', which is evaluated"),
        ({"task": "nocaps", "place": "nocaps", "shots": 1}, "nocaps has no split for demonstrations: name one"),
        ({"limit": 0}, "limit is 0; expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"prompt": "{answer}"}, r"has \{answer\}; expected"),
    ):
        with pytest.raises(TaskError, match=message):
            run(**options)
    with pytest.raises(TaskError, match="data is missing: name the folder that holds v2_OpenEnded"):
        evaluate(model, processor, "vqav2")
    with pytest.raises(ValueError, match="a loaded model needs its processor"):
        evaluate(model, None, "easy_vqa", data / "easy_vqa")
    with pytest.raises(TypeError, match="shot"):
        run(shot=1)


def test_a_picture_that_is_missing_is_named(models, tmp_path):
    layouts.write_easy_vqa(tmp_path)
    (tmp_path / "test" / "images" / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2-0: .*2.png"):
        evaluate(*models("mlp"), "easy_vqa", tmp_path)
