"""Image classification on every family's visual tokens: logits and losses, saving and loading, beginnings, errors."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import (
    BRIDGE_OPTIONS,
    QFORMER,
    VISION,
    bert_like_tokenizer,
    checkpoint_activations,
    clip_image_processor,
    spread_weights,
    tiny_image,
    tiny_model,
    tiny_stage1,
)
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, pipeline

import vlbridge
from vlbridge import FAMILIES, FrozenPartError, QFormerBlip2ForImageClassification
from vlbridge.cards import card_of_folder
from vlbridge.modeling.modeling_classification import TokenPooling


OPTIONS = {**BRIDGE_OPTIONS, "mlp": {"hidden_size": 24}}
CLASSES = {0: "cat", 1: "dog", 2: "tree"}
families = pytest.mark.parametrize("family", FAMILIES)


def tiny_classifier(family: str = "qformer", vision="clip", seed: int = 0, **options):
    torch.manual_seed(seed)
    options = {"image_processor": clip_image_processor(), **OPTIONS[family], **options}
    if not {"num_labels", "id2label"} & options.keys():
        options["id2label"] = CLASSES
    vision = VISION[vision]() if vision in VISION else vision
    model, processor = FAMILIES[family].classifier_class.from_vision(vision, **options)
    spread_weights(model)
    return model, processor


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a vision encoder, so that it can be pinned."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    AutoModel.from_config(VISION["clip"]()).save_pretrained(folder)
    clip_image_processor().save_pretrained(folder)
    return folder


def pictures(count: int = 3, side: int = 30) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model, images=None):
    return model(pictures() if images is None else images).logits


# ---------------------------------------------------------------------- logits


def test_pooling_begins_as_the_mean_and_weighs_tokens():
    torch.manual_seed(0)
    tokens, pooler = torch.randn(2, 5, 8), TokenPooling(8)
    torch.testing.assert_close(pooler(tokens), tokens.mean(dim=1))
    nn.init.normal_(pooler.query)
    for image, pooled in zip(tokens, pooler(tokens)):
        weights = torch.stack([token @ pooler.query / 8**0.5 for token in image]).exp()
        expected = sum(weight * token for weight, token in zip(weights / weights.sum(), image))
        torch.testing.assert_close(pooled, expected)


@pytest.mark.core
@families
def test_logits_are_of_the_visual_tokens(family):
    model, _ = tiny_classifier(family)
    tokens = model.get_image_features(pictures(), return_dict=True).pooler_output
    assert tokens.shape[1] == model.config.num_image_tokens(30, 30)
    head = model.bridge.classifier
    expected = model.bridge.pooler(tokens) @ head.weight.T + head.bias
    torch.testing.assert_close(logits_of(model), expected)
    assert expected.shape == (3, 3) and expected.std(dim=0).min() > 1e-3  # images matter


@families
def test_cached_features_and_batches_change_nothing(family):
    model, _ = tiny_classifier(family)
    together = logits_of(model)
    with torch.no_grad():
        cached = model(patch_features=model.get_patch_features(pictures())).logits
    torch.testing.assert_close(cached, together)
    torch.testing.assert_close(torch.cat([logits_of(model, image[None]) for image in pictures()]), together)


@families
@pytest.mark.parametrize(("vision", "side"), [("resnet", 64), ("timm", 64), ("siglip", 30)])
def test_other_encoders(family, vision, side, tmp_path):
    model, _ = tiny_classifier(family, vision)
    images = pictures(2, side)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(again, images), logits_of(model, images), atol=0, rtol=0)


def test_vision_outputs_on_demand():
    model, _ = tiny_classifier()
    outputs = model(pictures(), output_hidden_states=True)
    assert len(outputs.hidden_states) == 3 and outputs.hidden_states[0].shape[-1] == 32
    assert model(pictures()).hidden_states is None
    assert isinstance(model(pictures(), return_dict=False), tuple)


def test_pooled_patches_are_the_generating_models_own():
    generating, _ = tiny_model("mlp", pooling="average", pooling_factor=2)
    model, _ = FAMILIES["mlp"].classifier_class.from_bridge(generating, num_labels=3)
    tokens = [each.get_image_features(pictures(), return_dict=True).pooler_output for each in (model, generating)]
    torch.testing.assert_close(*tokens, atol=0, rtol=0)
    assert tokens[0].shape[1] == 9


# ---------------------------------------------------------------------- losses and gradients


def test_loss_of_one_class():
    model, _ = tiny_classifier()
    labels = torch.tensor([2, -100, 0])
    found = model(pictures(), labels=labels)
    scores = found.logits.log_softmax(dim=-1)
    torch.testing.assert_close(found.loss, -(scores[0, 2] + scores[2, 0]) / 2)
    assert model.config.problem_type == "single_label_classification"
    assert model(pictures(), labels=torch.full((3,), -100)).loss == 0


def test_loss_of_several_classes():
    model, _ = tiny_classifier(problem_type="multi_label_classification")
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])
    found = model(pictures(), labels=labels)
    shares = found.logits.sigmoid()
    expected = -(labels * shares.log() + (1 - labels) * (1 - shares).log()).mean()
    torch.testing.assert_close(found.loss, expected)


@pytest.mark.parametrize(("num_labels", "shape"), [(1, (3,)), (1, (3, 1)), (2, (3, 2))])
def test_loss_of_values(num_labels, shape):
    model, _ = tiny_classifier(num_labels=num_labels, problem_type="regression")
    labels = torch.linspace(-1, 1, 3 * num_labels).view(shape)
    found = model(pictures(), labels=labels)
    expected = ((found.logits - labels.view(3, num_labels)) ** 2).mean()
    torch.testing.assert_close(found.loss, expected)


@families
def test_the_bridge_alone_is_trained(family):
    model, _ = tiny_classifier(family)
    model.train()
    assert not model.vision_model.training and model.bridge.training
    model(pictures(), labels=torch.tensor([0, 1, 2])).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("bridge.")}
    assert {"bridge.classifier.weight", "bridge.pooler.query"} < trained
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert model.language_model is None
    model.freeze(vision_model=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


@families
def test_a_few_pictures_are_learned(family):
    model, _ = tiny_classifier(family)
    labels = torch.tensor([0, 1, 2])
    optimizer = torch.optim.Adam(model.bridge.parameters(), lr=3e-3)
    model.train()
    for _ in range(40):
        loss = model(pictures(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits_of(model.eval()).argmax(dim=-1).equal(labels)


@pytest.mark.core
@families
def test_gradient_checkpointing(family):
    model, _ = tiny_classifier(family)
    labels, gradients = torch.tensor([0, 1, 2]), []
    for _ in range(2):
        model.zero_grad()
        model.train()
        torch.manual_seed(0)
        model(pictures(), labels=labels).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.bridge.parameters()])
        checkpoint_activations(model)
    torch.testing.assert_close(*gradients)


@families
def test_adapters(family, tmp_path):
    model, _ = tiny_classifier(family)
    before = logits_of(model)
    layers = [name for name, layer in model.bridge.named_modules() if isinstance(layer, nn.Linear)]
    targets = [f"bridge.{name}" for name in layers if re.fullmatch(model.bridge.adapter_targets, name)]
    assert targets and "bridge.classifier" not in targets  # the head is trained as it is
    tuned = get_peft_model(
        model,
        LoraConfig(target_modules=targets, modules_to_save=["pooler", "classifier"], init_lora_weights=False),
    )
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or "pooler" in name or "classifier" in name for name in trained)
    tuned(pixel_values=pictures(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in tuned.parameters() if parameter.requires_grad)
    with torch.no_grad():
        found = tuned(pixel_values=pictures()).logits
        assert not torch.allclose(found, before)
        merged = tuned.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), found, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- saving and loading


@pytest.mark.core
@families
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageClassification])
def test_whole(family, auto_class, tmp_path):
    model, processor = tiny_classifier(family, problem_type="single_label_classification")
    model.save_pretrained(tmp_path, processor=processor)
    assert not (tmp_path / "generation_config.json").exists()
    again = auto_class.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config.id2label == CLASSES and again.config.label2id == {"cat": 0, "dog": 1, "tree": 2}
    assert again.config.problem_type == "single_label_classification"
    assert not any(parameter.requires_grad for parameter in again.vision_model.parameters())
    torch.testing.assert_close(logits_of(again), logits_of(model), atol=0, rtol=0)


@pytest.mark.core
@families
def test_bridge_alone(family, encoder, tmp_path):
    model, processor = tiny_classifier(family, vision=encoder)
    torch.manual_seed(1)
    for parameter in model.bridge.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    # the encoder as it is on disk: `spread_weights` has changed it
    model.vision_model.load_state_dict(AutoModel.from_pretrained(encoder).state_dict())
    model.save_pretrained(tmp_path / "bridge", bridge_only=True, processor=processor)
    weights = load_file(tmp_path / "bridge" / "model.safetensors")
    assert weights.keys() == {f"bridge.{name}" for name in model.bridge.state_dict()}
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "bridge")
    torch.testing.assert_close(logits_of(again), logits_of(model), atol=0, rtol=0)
    assert again.config.frozen_parts["vision_model"]["sha256"]
    classify = pipeline("image-classification", model=str(tmp_path / "bridge"))
    assert {found["label"] for found in classify(tiny_image())} == set(CLASSES.values())
    card = str(card_of_folder(tmp_path / "bridge"))
    assert "pipeline_tag: image-classification" in card and "A classifier on" in card


def test_another_encoder_is_refused(encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "encoder")
    model, _ = QFormerBlip2ForImageClassification.from_vision(tmp_path / "encoder", num_labels=2, **OPTIONS["qformer"])
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    torch.manual_seed(3)
    AutoModel.from_config(VISION["clip"]()).save_pretrained(tmp_path / "encoder")
    with pytest.raises(FrozenPartError, match="not the one that this bridge was trained with"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "bridge")


def test_bridge_alone_needs_a_source(tmp_path):
    model, _ = tiny_classifier()
    with pytest.raises(ValueError, match="needs to know where the vision_model comes from"):
        model.save_pretrained(tmp_path, bridge_only=True)


def test_another_head_is_refused(encoder, tmp_path):
    model, _ = QFormerBlip2ForImageClassification.from_vision(encoder, num_labels=3, **OPTIONS["qformer"])
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    model.save_pretrained(tmp_path / "whole")
    for name, error in (("bridge", "bridge.classifier.weight has shape"), ("whole", "mismatch")):
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        config["id2label"], config["label2id"] = {"0": "a", "1": "b", "2": "c", "3": "d"}, None
        path.write_text(json.dumps(config))
        with pytest.raises((ValueError, RuntimeError), match=error):
            AutoModelForImageClassification.from_pretrained(tmp_path / name)


def test_generating_models_are_no_classifiers(tmp_path):
    model, _ = tiny_model("mlp")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.core
def test_pipeline_gives_the_models_scores(tmp_path):
    model, processor = tiny_classifier()
    classify = pipeline("image-classification", model=model, image_processor=processor)
    inputs = processor([tiny_image(0), tiny_image(1)], return_tensors="pt")
    expected = logits_of(model, inputs["pixel_values"]).softmax(dim=-1)
    for found, scores in zip(classify([tiny_image(0), tiny_image(1)], top_k=3), expected):
        assert [each["label"] for each in found] == [CLASSES[int(k)] for k in scores.argsort(descending=True)]
        torch.testing.assert_close(torch.tensor([each["score"] for each in found]), scores.sort(descending=True).values)
    model.config.problem_type = "multi_label_classification"
    (best, *_) = classify(tiny_image(0))
    assert best["score"] == pytest.approx(logits_of(model, inputs["pixel_values"][:1]).sigmoid().max().item(), rel=1e-5)


# ---------------------------------------------------------------------- beginnings


@families
def test_begins_with_a_generating_models_bridge(family, tmp_path):
    generating, _ = tiny_model(family)
    kind = FAMILIES[family].classifier_class
    model, _ = kind.from_bridge(generating, id2label=CLASSES)
    theirs = generating.bridge.state_dict()
    taken = {name: value for name, value in model.bridge.state_dict().items() if name.startswith(kind.takes_over)}
    fresh = model.bridge.state_dict().keys() - taken.keys()
    assert taken and all(name.startswith(("pooler.", "classifier.")) for name in fresh)
    for name, value in taken.items():
        assert torch.equal(value, theirs[name]) and value.data_ptr() != theirs[name].data_ptr()
    assert model.vision_model is generating.vision_model
    if family != "qformer":  # whose generating model projects the queries
        tokens = [each.get_image_features(pictures(), return_dict=True).pooler_output for each in (model, generating)]
        torch.testing.assert_close(*tokens, atol=0, rtol=0)


def test_begins_with_the_base_image_of_a_model_for_any_resolution():
    generating, _ = tiny_model("mlp", image_aspect_ratio="anyres", image_grid_pinpoints=[[30, 60], [60, 30]])
    model, _ = FAMILIES["mlp"].classifier_class.from_bridge(generating, num_labels=2)
    expected = generating.bridge.project(generating.get_patch_features(pictures()))
    found = model.get_image_features(pictures(), return_dict=True).pooler_output
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_begins_with_a_perceiver_that_knows_places_in_documents():
    generating, _ = tiny_model("perceiver", max_num_media=3)
    model, _ = FAMILIES["perceiver"].classifier_class.from_bridge(generating, num_labels=2)
    expected = generating.bridge(
        generating.get_patch_features(pictures()), media_index=torch.zeros(3, dtype=torch.long)
    )
    found = model.get_image_features(pictures(), return_dict=True).pooler_output
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("from_folder", [False, True])
def test_begins_with_stage_1(from_folder, tmp_path):
    stage1, processor = tiny_stage1()
    source = stage1
    if from_folder:
        source = tmp_path
        stage1.save_pretrained(source)
        processor.save_pretrained(source)
    model, image_processor = QFormerBlip2ForImageClassification.from_stage1(source, id2label=CLASSES)
    for name, value in model.bridge.state_dict().items():
        if not name.startswith(("pooler.", "classifier.")):
            assert torch.equal(value, stage1.bridge.state_dict()[name]), name
    with torch.no_grad():
        expected = stage1.get_image_features(pictures(), return_dict=True).last_hidden_state
        found = model.get_image_features(pictures(), return_dict=True).pooler_output
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    # no text side: nothing that an image's classes don't depend on
    assert not any("text" in name or "word" in name for name in model.bridge.state_dict())
    assert model.language_model is None and logits_of(model).shape == (3, 3)
    assert image_processor([tiny_image()], return_tensors="pt")["pixel_values"].shape[1] == 3


def test_stage_1_of_a_pinned_encoder_is_saved_without_it(encoder, tmp_path):
    stage1, _ = vlbridge.QFormerBlip2ForPreTraining.from_vision(
        encoder, bert_like_tokenizer(), qformer_config={**QFORMER, "max_position_embeddings": 40}, embed_dim=16
    )
    stage1.save_pretrained(tmp_path / "stage1", bridge_only=True)
    clip_image_processor().save_pretrained(tmp_path / "stage1")
    model, _ = QFormerBlip2ForImageClassification.from_stage1(tmp_path / "stage1", num_labels=2)
    model.save_pretrained(tmp_path / "classifier", bridge_only=True)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "classifier")
    torch.testing.assert_close(logits_of(again), logits_of(model), atol=0, rtol=0)


# ---------------------------------------------------------------------- errors


@families
def test_labels_must_be_said(family):
    kind = FAMILIES[family].classifier_class
    with pytest.raises(ValueError, match="How many classes"):
        kind.from_vision(VISION["clip"](), **OPTIONS[family])
    with pytest.raises(ValueError, match="num_labels is 2, but id2label names 3"):
        kind.from_vision(VISION["clip"](), num_labels=2, id2label=CLASSES)
    with pytest.raises(ValueError, match="num_labels is 0"):
        kind.from_vision(VISION["clip"](), num_labels=0)
    with pytest.raises(ValueError, match="has no option num_classes"):
        kind.from_vision(VISION["clip"](), num_labels=2, num_classes=2)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        kind.from_vision(VISION["clip"](), id2label={1: "a", 2: "b"}, **OPTIONS[family])
    with pytest.raises(ValueError, match="names a class twice"):
        kind.from_vision(VISION["clip"](), id2label={0: "a", 1: "a"}, **OPTIONS[family])
    with pytest.raises(ValueError, match="label2id is"):
        kind.from_vision(VISION["clip"](), id2label=CLASSES, label2id={"cat": 1}, **OPTIONS[family])
    with pytest.raises(ValueError, match="text_config must be None"):
        kind.config_class(text_config={"model_type": "llama"})


@pytest.mark.parametrize(
    ("problem", "labels", "error"),
    [
        (None, torch.tensor([0, 3, 1]), "expected 0 to 2, or -100"),
        (None, torch.tensor([0, -1, 1]), "expected 0 to 2, or -100"),
        (None, torch.tensor([0, 1]), r"shape \(2,\); expected one number of a class per image"),
        (None, torch.zeros(3), "multi_label_classification expects floats of shape"),
        ("single_label_classification", torch.zeros(3, 3), "expected one number of a class per image"),
        ("multi_label_classification", torch.zeros(3, 3, dtype=torch.long), "expects floats"),
        ("multi_label_classification", torch.zeros(3), r"expects floats of shape \(3, 3\)"),
        ("regression", torch.zeros(3), r"expects floats of shape \(3, 3\)"),
    ],
)
def test_labels_that_do_not_fit(problem, labels, error):
    model, _ = tiny_classifier(problem_type=problem)
    with pytest.raises(ValueError, match=error):
        model(pictures(), labels=labels)


def test_exactly_one_kind_of_image():
    model, _ = tiny_classifier()
    with pytest.raises(ValueError, match="exactly one of pixel_values and patch_features"):
        model()
    with pytest.raises(ValueError, match="exactly one of pixel_values and patch_features"):
        model(pictures(), patch_features=torch.zeros(3, 25, 32))


def test_wrong_beginnings(tmp_path):
    stage1, _ = tiny_stage1()
    mlp, _ = tiny_model("mlp")
    with pytest.raises(ValueError, match="How many classes"):
        QFormerBlip2ForImageClassification.from_stage1(stage1)
    with pytest.raises(ValueError, match="num_query_tokens|qformer_config can't be chosen here"):
        QFormerBlip2ForImageClassification.from_stage1(stage1, num_labels=2, qformer_config={})
    with pytest.raises(ValueError, match="stage1 is a 'mlp_llava' model; expected a QFormerBlip2ForPreTraining"):
        QFormerBlip2ForImageClassification.from_stage1(mlp, num_labels=2)
    with pytest.raises(ValueError, match="the source is a MLPLlavaForConditionalGeneration"):
        QFormerBlip2ForImageClassification.from_bridge(mlp, num_labels=2)
    stage1.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'qformer_blip2_pretraining' model"):
        FAMILIES["mlp"].classifier_class.from_bridge(tmp_path, num_labels=2)


def test_one_tile_per_image():
    with pytest.raises(ValueError, match="image_grid_pinpoints must be None"):
        FAMILIES["mlp"].classifier_class.config_class(image_grid_pinpoints=[[30, 60]])
