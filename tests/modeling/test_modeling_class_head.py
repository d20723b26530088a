"""Bridges that begin as a classifier, against the classifiers' own logits and the language models' own embeddings."""

from __future__ import annotations

import pytest
import torch
from tiny import LANGUAGE, QFORMER, SMALL, tiny_image, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    Dinov2Config,
    ResNetConfig,
    TimmWrapperConfig,
    ViTConfig,
)

import vlbridge
from vlbridge import demo
from vlbridge.modeling.modeling_class_head import class_tokens, class_words


SIDE = 64
NAMES = ["red", "green", "blue", "yellow"]
COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.9], [0.9, 0.9, 0.1]])
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}


def timm_config(architecture: str, **model_args) -> TimmWrapperConfig:
    config = TimmWrapperConfig(
        architecture=architecture, pretrained_cfg={"input_size": [3, SIDE, SIDE]}, model_args=model_args, **LABELS
    )
    return config


VIT = {"img_size": SIDE, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
CONVNEXT = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 24]}
# every kind, and what its head reads: the pooling, and whether a layer norm stands behind it
KINDS = {
    "resnet": (
        lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
                             image_size=SIDE, **LABELS),
        ("average", False),
    ),
    "vit": (lambda: ViTConfig(**SMALL, image_size=SIDE, patch_size=16, **LABELS), ("cls", False)),
    "convnext": (lambda: ConvNextConfig(**CONVNEXT, image_size=SIDE, **LABELS), ("average", True)),
    "timm resnet": (lambda: timm_config("resnet10t"), ("average", False)),
    "timm vit": (lambda: timm_config("vit_tiny_patch16_224", **VIT), ("cls", False)),
    "timm vit, averaged": (lambda: timm_config("vit_tiny_patch16_224", global_pool="avg", **VIT), ("average", True)),
    "timm convnext": (
        lambda: timm_config("convnext_atto", depths=[1, 1, 1, 1], dims=[8, 12, 16, 24]), ("average", True)
    ),
}  # fmt: skip


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)


def classifier_of(kind: str, seed: int = 0):
    """A random classifier whose logits are large, whose norms are not neutral, and whose encoder is `base_model`."""
    torch.manual_seed(seed)
    model = AutoModelForImageClassification.from_config(KINDS[kind][0]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def drawn(colours: torch.Tensor, seed: int) -> torch.Tensor:
    """Squares of a colour at random places on grey noise, `(num_images, 3, SIDE, SIDE)`."""
    generator = torch.Generator().manual_seed(seed)
    pixels = 0.5 + 0.1 * torch.randn(len(colours), 3, SIDE, SIDE, generator=generator)
    corners = torch.randint(0, SIDE - 32, (len(colours), 2), generator=generator).tolist()
    for image, (top, left), colour in zip(pixels, corners, colours.tolist()):
        image[:, top : top + 32, left : left + 32] = COLOURS[colour][:, None, None]
    return (pixels - 0.5) / 0.5


def saved(kind: str, folder, model=None):
    """A classifier's folder; `compose` takes encoder and head from it."""
    model = model or classifier_of(kind)
    model.save_pretrained(folder)
    return model


def begin(folder, language="llama", bridge="mlp", **options):
    return vlbridge.compose(
        folder, LANGUAGE[language](), bridge, tokenizer=tiny_tokenizer(), image_processor=image_processor(),
        **{"projector_init_from": folder, **options},
    )  # fmt: skip


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_units_are_the_logits_above_a_threshold(kind, tmp_path):
    classifier = saved(kind, tmp_path)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    model, _ = begin(tmp_path, free_units=3)
    pixels = torch.randn(3, 3, SIDE, SIDE)
    seen = []
    model.bridge.linear_1.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    with torch.no_grad():
        logits = classifier(pixel_values=pixels).logits
        tokens = model.get_image_features(pixel_values=pixels).pooler_output
    (units,) = seen
    assert units.shape == (3, 1, 4 + 3) and tokens.shape == (3, 1, 32)  # one visual token
    torch.testing.assert_close(units[:, 0, :4], logits - 4.5, atol=2e-5, rtol=2e-5)
    pooling, norm = KINDS[kind][1]
    assert (model.config.pooling, model.config.projector_norm_eps is not None) == (pooling, norm)
    # the visual token, class by class, from the language model's own table
    tokenizer, table = tiny_tokenizer(), model.get_input_embeddings().weight
    expected = torch.zeros(3, 32)
    for index, name in enumerate(NAMES):
        word = sum(table[token] for token in tokenizer(" " + name, add_special_tokens=False)["input_ids"])
        expected += torch.nn.functional.gelu(logits[:, index, None] - 4.5) * 0.25 * word
    torch.testing.assert_close(tokens[:, 0], expected, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


@pytest.fixture(scope="module", params=["resnet", "vit", "convnext"])
def trained(request):
    """A classifier that was trained on drawn squares, and test pictures with their colours."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(KINDS[request.param][0]()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2 if request.param != "vit" else 3e-3)
    for step in range(80):
        colours = torch.randint(0, 4, (16,))
        loss = model(pixel_values=drawn(colours, step), labels=colours).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    colours = torch.arange(24) % 4
    return model, drawn(colours, 1000), colours


def test_a_sure_picture_is_nearest_to_its_own_name(trained):
    classifier, pixels, colours = trained
    assert classifier.training  # as it is after training: reading it must not depend on that, nor change it
    model, _ = vlbridge.compose(
        classifier.base_model, LANGUAGE["llama"](), tokenizer=tiny_tokenizer(),
        image_processor=image_processor(), projector_init_from=classifier, class_threshold=1.0,
    )  # fmt: skip
    assert all(module.training for module in classifier.children() if module is not classifier.base_model)
    classifier.eval()
    with torch.no_grad():
        shares = classifier(pixel_values=pixels).logits.softmax(dim=-1)
        tokens = model.get_image_features(pixel_values=pixels).pooler_output[:, 0]
        table = model.get_input_embeddings()
        names = torch.stack([table(torch.tensor(ids)).sum(dim=0) for ids in class_tokens(tiny_tokenizer(), NAMES)])
    sure = shares.max(dim=-1).values > 0.8
    assert sure.sum() >= 16 and torch.equal(shares.argmax(dim=-1)[sure], colours[sure])
    similarity = torch.nn.functional.cosine_similarity(tokens[:, None], names[None], dim=-1)
    assert torch.equal(similarity.argmax(dim=-1)[sure], colours[sure])


def test_free_units_are_silent_and_learn():
    classifier = classifier_of("resnet")
    given = {"tokenizer": tiny_tokenizer(), "image_processor": image_processor(), "projector_init_from": classifier}
    plain, processor = vlbridge.compose(classifier.base_model, LANGUAGE["llama"](), **given)
    wide, _ = vlbridge.compose(classifier.base_model, plain.language_model, **given, free_units=8)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    one, other = (model.get_image_features(pixel_values=pixels).pooler_output for model in (plain, wide))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    inputs = processor(images=[tiny_image()], text=["A photo of a<image>. b"], return_tensors="pt")
    assert (inputs["input_ids"] == plain.config.image_token_id).sum() == 1
    wide(**inputs, labels=inputs["input_ids"].clamp(max=90)).loss.backward()
    assert (wide.bridge.linear_2.weight.grad[:, 4:] != 0).any(dim=0).all()


def units_and_logits(model, classifier) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first layer makes of two pictures, and what the classifier says of them."""
    pixels, seen = torch.randn(2, 3, SIDE, SIDE), []
    model.bridge.linear_1.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    with torch.no_grad():
        model.get_image_features(pixel_values=pixels)
        return seen[0], classifier(pixel_values=pixels).logits


def test_several_visual_tokens_each_name_what_their_place_shows(tmp_path):
    classifier = saved("resnet", tmp_path)
    model, processor = begin(tmp_path, pooling="average", pooling_factor=2)
    count = processor.num_image_tokens(SIDE, SIDE)
    places, logits = units_and_logits(model, classifier)
    # the class head is linear: the mean of what it says of places is what it says of the picture
    assert places.shape == (2, count, 4) and count > 1
    torch.testing.assert_close(places.mean(dim=1), logits - 4.5, atol=2e-5, rtol=2e-5)


def test_with_global_context_each_visual_token_names_the_whole_picture(tmp_path):
    classifier = saved("resnet", tmp_path)
    model, processor = begin(tmp_path, global_context=True, free_units=2)
    count = processor.num_image_tokens(SIDE, SIDE)
    units, logits = units_and_logits(model, classifier)
    assert units.shape == (2, count, 4 + 2) and count > 1
    torch.testing.assert_close(units[..., :4], (logits - 4.5)[:, None].expand(-1, count, -1), atol=2e-5, rtol=2e-5)
    assert units[..., 4:].std(dim=1).min() > 0  # free units see their own place


@pytest.mark.parametrize(("kind", "reads"), [("vit", "the CLS feature"), ("convnext", "it behind a layer norm")])
def test_global_context_is_an_average(kind, reads, tmp_path):
    saved(kind, tmp_path)
    with pytest.raises(ValueError, match=f"average over all patches, but the class head reads {reads}"):
        begin(tmp_path, global_context=True)


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_it_is_saved_loaded_and_moved_like_any_bridge(kind, tmp_path):
    saved(kind, tmp_path / "eye")
    model, processor = begin(tmp_path / "eye", "llama", class_names={"red": "a b", 2: "dog"})
    inputs = processor(images=[tiny_image(1)], text=["A photo of a<image>."], return_tensors="pt")
    options = {"max_new_tokens": 4, "do_sample": False}
    model.save_pretrained(tmp_path / "full")
    loaded = AutoModel.from_pretrained(tmp_path / "full")
    assert torch.equal(loaded.generate(**inputs, **options), model.generate(**inputs, **options))
    done = vlbridge.transplant((model, processor), LANGUAGE["opt"](), tokenizer=tiny_tokenizer())
    names = ("pooling", "pooling_factor", "projector_norm_eps", "projector_hidden_size")
    assert [getattr(done.model.config, name) for name in names] == [getattr(model.config, name) for name in names]


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_half_precision(kind, tmp_path):
    saved(kind, tmp_path)
    model, _ = begin(tmp_path, dtype="bfloat16")
    assert model.bridge.linear_1.weight.dtype == torch.bfloat16
    assert model.config.pooling == KINDS[kind][1][0]


def test_words_for_classes():
    names = ["tench, Tinca tinca", "great_white_shark", "crane", "crane"]
    assert class_words(names) == ("tench", "great white shark", "crane", "crane")
    assert class_words(names, {"tench": "fish", 1: "shark", "crane": "bird"}) == ("fish", "shark", "bird", "bird")
    assert class_words(names, {"tench, Tinca tinca": "fish", 3: "machine"})[::3] == ("fish", "machine")
    assert class_words(names, ["a", "b", "c", "d"]) == ("a", "b", "c", "d")
    for wrong, error, message in (
        (["a"], ValueError, "1 words, but the classifier has 4"),
        ({"cat": "dog"}, ValueError, "'cat', which no class is called: the classes are 0 to 3"),
        ("names.txt", TypeError, "class_names is a str"),
        ("everyday", ValueError, "ImageNet's 1,000 classes, but this classifier has 4, beginning with 'tench, Tinca"),
        ({0: " "}, ValueError, "Class 0 of the classifier has no name"),
        ({0: None}, ValueError, "Class 0 of the classifier has no name"),
    ):
        with pytest.raises(error, match=message):
            class_words(names, wrong)
    with pytest.raises(ValueError, match=r"Class 0 of the classifier has no name \(it is 'LABEL 0'\). Pass class"):
        class_words(["LABEL_0", "LABEL_1"])
    with pytest.raises(ValueError, match="Class 1 of the classifier has no name"):
        class_words(["LABEL_0", "LABEL_1"], {0: "cat"})
    assert class_words(["0", "1"]) == ("0", "1")


def test_everyday_words_of_imagenet():
    names = list(AutoConfig.from_pretrained(demo.resolve(demo.VISION)).id2label.values())
    words = class_words(names, "everyday")
    assert len(words) == 1000 and 550 < len(set(words)) < 700
    assert {words[index] for index in range(151, 269)} == {"dog"}  # all breeds
    assert [words[index] for index in (281, 292, 670, 134, 517)] == ["cat", "tiger", "motor scooter", "crane", "crane"]
    spelled = [name.replace(" ", "_") for name in names]
    assert class_words([*spelled[:-3], "other", "names", "here"], "everyday") == words
    with pytest.raises(ValueError, match="Pass a list or a mapping"):
        class_words(names[::-1], "everyday")


def test_words_as_in_a_sentence():
    tokenizer = tiny_tokenizer()
    texts = tokenizer.batch_decode(class_tokens(tokenizer, ["cat", "guinea pig"]))
    assert texts == [" cat", " guinea pig"]
    with pytest.raises(ValueError, match="does not know the word 'Käfer'"):
        class_tokens(tokenizer, ["Käfer"])


# ---------------------------------------------------------------------- refusals


def test_what_is_no_classifier_is_refused(tmp_path):
    saved("resnet", tmp_path / "eye")
    CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=SIDE, patch_size=16)).save_pretrained(tmp_path / "clip")
    for source, message in (
        (tmp_path / "clip", "has no trained class head: classifier.weight|is not an image classifier"),
        (AutoModel.from_config(KINDS["resnet"][0]()), "ResNetModel is not an image classifier"),
    ):
        with pytest.raises(ValueError, match=message):
            begin(tmp_path / "eye", projector_init_from=source)
    language = LANGUAGE["llama"]()
    language.save_pretrained(tmp_path / "language")
    with pytest.raises(ValueError, match="is not an image classifier that transformers or timm can load"):
        begin(tmp_path / "eye", projector_init_from=tmp_path / "language")
    with pytest.raises(TypeError, match="The classifier is a bool; expected a Hub id"):
        begin(tmp_path / "eye", projector_init_from=True)


def test_what_the_bridge_cannot_compute_is_refused(tmp_path):
    saved("resnet", tmp_path / "eye")
    with pytest.raises(ValueError, match="this is not the classifier's own encoder"):
        begin(tmp_path / "eye", projector_init_from=classifier_of("resnet", seed=1))
    with pytest.raises(ValueError, match="reads 32 channels, but the vision encoder gives 16"):
        begin(tmp_path / "eye", projector_init_from=classifier_of("vit"))
    # its head reads the CLS feature beside the mean of the patches
    dinov2 = AutoModelForImageClassification.from_config(
        Dinov2Config(**{**SMALL, "mlp_ratio": 2}, image_size=SIDE, patch_size=16, **LABELS)
    )
    dinov2.save_pretrained(tmp_path / "dinov2")
    with pytest.raises(ValueError, match="reads 64 channels, but the vision encoder gives 32"):
        begin(tmp_path / "dinov2")
    # a layer with an activation between pooling and head
    torch.manual_seed(0)
    mobile = AutoModelForImageClassification.from_config(timm_config("mobilenetv3_small_050"))
    mobile.save_pretrained(tmp_path / "mobile")
    with pytest.raises(ValueError, match="class head reads"):
        begin(tmp_path / "mobile")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_init_from": None, "free_units": 2}, "go with projector_init_from"),
        ({"free_units": -1}, "free_units is -1"),
        ({"projector_type": "linear"}, "projector_type is 'linear'; a bridge that begins as a classifier"),
        ({"projector_hidden_size": 4}, "projector_hidden_size is 4"),
        ({"pooling": "pixel_shuffle", "pooling_factor": 2}, "pooling is 'pixel_shuffle', but the class head reads the"),
        ({"class_threshold": float("nan")}, "class_threshold is nan"),
        ({"class_name_scale": 0.0}, "class_name_scale is 0.0"),
        ({"language": "t5"}, "The language model is a t5, an encoder-decoder"),
        ({"bridge": "qformer", "qformer_config": QFORMER}, "bridge='qformer' has no option projector_init_from"),
        ({"bridge": "perceiver"}, "bridge='perceiver' has no option projector_init_from"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, tmp_path):
    saved("resnet", tmp_path)
    with pytest.raises(ValueError, match=message):
        begin(tmp_path, **options)
