"""Classes from recipes: a warm-up on pictures and notes, then outcomes; and what is refused."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from tiny import BRIDGE_OPTIONS, QFORMER, VISION, clip_image_processor, tiny_image
from toy_runs import save_parts
from transformers import pipeline

from vlbridge import FAMILIES
from vlbridge.training.training_data import load
from vlbridge.training.training_encoding import SampleError, encoder_for
from vlbridge.training.training_images import PreparedImage
from vlbridge.training.training_models import build_model
from vlbridge.training.training_recipes import RecipeError, read_recipe, shipped
from vlbridge.training.training_run import train


OPTIONS = {**BRIDGE_OPTIONS, "mlp": {"hidden_size": 16}}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Parts, and six pictures of two classes with notes."""
    folder = tmp_path_factory.mktemp("toys")
    parts, data = save_parts(folder), folder / "data"
    data.mkdir()
    rows = []
    for number in range(6):
        tiny_image(number).save(data / f"{number}.png")
        rows.append(
            {"file_name": f"{number}.png", "label": ("dog", "cat")[number % 2], "notes": f"w{number} w{number + 9}"}
        )
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**parts, "data": str(data)}


def classifier(family: str = "qformer", **options):
    torch.manual_seed(0)
    return FAMILIES[family].classifier_class.from_vision(
        VISION["clip"](), image_processor=clip_image_processor(), **{"num_labels": 2, **OPTIONS[family], **options}
    )


FAST = ["arguments.max_steps=2", "arguments.warmup_steps=1", "arguments.save_steps=2", "arguments.use_cpu=true"]


@pytest.mark.core
def test_a_warm_up_and_then_outcomes(toys, tmp_path):
    qformer = {**QFORMER, "max_position_embeddings": 64}
    settings = [f"vision={toys['vision']}", f"tokenizer={toys['tokenizer']}", f"data.0.path={toys['data']}"]
    settings += [f"bridge_options.qformer_config={json.dumps(qformer)}", "arguments.per_device_train_batch_size=3"]
    train(read_recipe("classification_warm_up", [*settings, *FAST]), tmp_path / "warm_up")
    settings = [f"from={tmp_path / 'warm_up'}", f"data.0.path={toys['data']}", f"evaluation.0.path={toys['data']}"]
    settings += [
        "bridge_options.num_labels=2",
        "arguments.per_device_train_batch_size=3",
        "samples={every: 1, count: 2}",
    ]
    summary = train(read_recipe("classification", [*settings, *FAST]), tmp_path / "classes")
    found = {row["metric"]: row["value"] for row in summary["evaluation"]}
    assert found["loss"] > 0 and found["exact_match"] in {right / 6 for right in range(7)}
    assert json.loads((tmp_path / "classes" / "config.json").read_text())["bridge_only"]
    classify = pipeline("image-classification", model=str(tmp_path / "classes"))
    assert {each["label"] for each in classify(tiny_image())} == {"cat", "dog"}
    samples = (tmp_path / "classes" / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["wanted"] for line in samples} == {"cat", "dog"}
    # and what was trained goes on
    settings = [f"from={tmp_path / 'classes'}", "bridge_options={}", *settings[1:3], *settings[4:], *FAST]
    assert train(read_recipe("classification", settings), tmp_path / "more")["steps"] == 2


def test_the_start_without_notes_that_the_recipe_names_is_small(toys):
    text = shipped()["classification"].read_text()
    words = shlex.split(" ".join(line.strip("# ") for line in text.splitlines() if line.startswith("#   --set")))
    settings = [word for word in words if word != "--set"]
    assert {setting.partition("=")[0] for setting in settings} == {
        "from", "vision", "bridge", "bridge_options.qformer_config",
    }  # fmt: skip
    own = [f"vision={toys['vision']}", f"data.0.path={toys['data']}", "bridge_options.num_labels=2"]
    model, _ = build_model(read_recipe("classification", [*settings, *own]))
    assert sum(parameter.numel() for parameter in model.bridge.parameters()) < 1e6


@pytest.mark.parametrize("family", FAMILIES)
def test_records_become_batches(family, toys):
    model, processor = classifier(family)
    encoder, records = encoder_for(model, processor), load("imagefolder", toys["data"])
    encoder.check_records(records)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    batch = encoder.collate([encoder.encode(record) for record in records])
    assert batch["labels"].tolist() == [1, 0] * 3
    expected = processor([tiny_image(number) for number in range(6)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_features_take_the_place_of_pixels(family, toys):
    model, processor = classifier(family)
    model.eval()
    encoder, records = encoder_for(model, processor), load("imagefolder", toys["data"])
    samples = [encoder.encode(record) for record in records]
    features = [model.get_patch_features(sample["pixel_values"]) for sample in samples]
    images = [PreparedImage((3, 30, 30), (40, 33), 1, patch_features=features) for features in features]
    cached = encoder.collate([encoder.encode(record, images=[image]) for record, image in zip(records, images)])
    assert cached.keys() == {"patch_features", "labels"}
    torch.testing.assert_close(model(**cached).loss, model(**encoder.collate(samples)).loss)


def test_what_is_no_record(toys):
    model, processor = classifier()
    encoder = encoder_for(model, processor)
    record = load("imagefolder", toys["data"])[0]
    for wrong, error in (
        ({"label": None}, "1 and the label None"),
        ({"images": []}, "has 0 and the label 1"),
        ({"label": 2}, "label is 2; expected 0 to 1"),
    ):
        with pytest.raises(SampleError, match=error):
            encoder.encode({**record, **wrong})


def test_other_classes_are_refused(toys):
    model, processor = classifier(id2label={0: "dog", 1: "cat"}, num_labels=None)
    with pytest.raises(ValueError, match="the data's classes are cat, dog; the model's dog, cat"):
        encoder_for(model, processor).check_records(load("imagefolder", toys["data"]))


def test_what_recipes_and_encoders_refuse(toys):
    with pytest.raises(RecipeError, match="vision and bridge missing"):
        read_recipe("classification", ["from=null"])
    with pytest.raises(RecipeError, match="no use for language"):
        read_recipe("classification", ["language=gpt2"])
    model, processor = classifier(problem_type="regression")
    with pytest.raises(ValueError, match="records have one class each"):
        encoder_for(model, processor)
    model, processor = classifier()
    with pytest.raises(ValueError, match="no option prompt"):
        encoder_for(model, processor, prompt="a")


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_features_give_the_same_losses(family, toys, tmp_path):
    def losses(name: str, *settings: str) -> torch.Tensor:
        options = json.dumps({"num_labels": 2, **OPTIONS[family]})
        settings = ["from=null", f"vision={toys['vision']}", f"bridge={family}", f"bridge_options={options}",
                    f"data.0.path={toys['data']}", "arguments.per_device_train_batch_size=3",
                    f"evaluation.0.path={toys['data']}", "arguments.logging_steps=1", *FAST, *settings]  # fmt: skip
        summary = train(read_recipe("classification", settings), tmp_path / name)
        state = json.loads((tmp_path / name / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
        found = [row["loss"] for row in state if "loss" in row]
        return torch.tensor(found + [row["value"] for row in summary["evaluation"]])

    plain = losses("plain")
    assert len(plain) == 4
    cached = losses("cached", f"cache_features.folder={tmp_path / 'features'}")
    torch.testing.assert_close(cached, plain, atol=1e-5, rtol=1e-5)
    shards = list((tmp_path / "features").rglob("*"))
    assert any(path.is_file() and path.stat().st_size > 1000 for path in shards)
