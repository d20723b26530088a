"""Summaries: parts, parameters and token budget of every kind of model that the package registers."""

from __future__ import annotations

import pytest
import torch
from tiny import (
    BRIDGE_OPTIONS,
    LANGUAGE,
    VISION,
    bert_like_tokenizer,
    clip_image_processor,
    tiny_model,
    tiny_stage1,
    tiny_tokenizer,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import vlbridge
from vlbridge import FAMILIES
from vlbridge.configuration import BridgedConfig
from vlbridge.summary import summarize, summary_lines


TOKENS = {"mlp": 25, "qformer": 5, "perceiver": 6}  # visual tokens of one image of 30 x 30 pixels
STAGE1 = {"pretraining": vlbridge.QFormerBlip2ForPreTraining, "retrieval": vlbridge.QFormerBlip2ForImageTextRetrieval}
KINDS = [*FAMILIES, *(f"{family} classifier" for family in FAMILIES), *STAGE1]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders `eye` and `old` with a vision encoder and a language model, which bridges can pin."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    AutoModel.from_config(VISION["clip"]()).save_pretrained(root / "eye")
    clip_image_processor().save_pretrained(root / "eye")
    AutoModelForCausalLM.from_config(LANGUAGE["llama"]()).save_pretrained(root / "old")
    tiny_tokenizer().save_pretrained(root / "old")
    return root


def model_of(kind: str, parts):
    """A fresh model of a kind, its frozen parts from the folders."""
    family = kind.removesuffix(" classifier")
    if kind in FAMILIES:
        return vlbridge.compose(parts / "eye", parts / "old", kind, **BRIDGE_OPTIONS[kind])[0]
    if family in FAMILIES:
        options = {**BRIDGE_OPTIONS, "mlp": {"hidden_size": 24}}[family]
        return FAMILIES[family].classifier_class.from_vision(parts / "eye", num_labels=3, **options)[0]
    qformer_config = {**BRIDGE_OPTIONS["qformer"]["qformer_config"], "max_position_embeddings": 40}
    return STAGE1[kind].from_vision(parts / "eye", bert_like_tokenizer(), qformer_config=qformer_config)[0]


@pytest.mark.core
@pytest.mark.parametrize("bridge_only", [False, True], ids=["whole", "bridge_only"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_registered_model(parts, tmp_path, kind, bridge_only):
    model = model_of(kind, parts)
    model.save_pretrained(tmp_path, bridge_only=bridge_only)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()  # a summary needs the configuration alone
    summary = summarize(tmp_path)
    assert summary["model_type"] == model.config.model_type and summary["class"] == type(model).__name__
    generates = kind in FAMILIES
    names = ["vision_model", "bridge", "language_model"][: 3 if generates else 2]
    assert [part["name"] for part in summary["parts"]] == names
    assert summary["parts"][0]["source"] == str(parts / "eye")
    assert summary["parts"][1]["source"] == str(tmp_path)
    for part in summary["parts"]:
        real = getattr(model, part["name"])
        assert part["class"] == type(real).__name__
        assert part["parameters"] == sum(p.numel() for p in real.parameters())
        assert part["trainable_parameters"] == (part["parameters"] if part["name"] == "bridge" else 0)
    assert summary["parameters"] == sum(part["parameters"] for part in summary["parts"])
    tokens = model.config.num_image_tokens(30, 30)
    assert tokens == TOKENS.get(kind.removesuffix(" classifier"), tokens)
    assert (summary["image_size"], summary["fewest_image_tokens"], summary["image_tokens"]) == (30, tokens, tokens)
    if generates:
        in_prompt = 1 if kind == "perceiver" else tokens
        assert summary["prompt_tokens_per_image"] == in_prompt
        assert (summary["context_window"], summary["context_left"]) == (512, 512 - in_prompt)
    else:
        assert summary["prompt_tokens_per_image"] == 0
        assert summary["context_window"] is summary["context_left"] is None
        assert list(summary_lines(summary))[-2:] == [
            f"visual tokens per image: {tokens} (30 x 30 pixels)",
            "context window: none, because there is no language model",
        ]


def test_no_registered_model_is_left_out(parts):
    """Whatever configuration class the package defines with a model type of its own is summarized above."""

    def subclasses(cls: type) -> set[type]:
        return {cls}.union(*(subclasses(below) for below in cls.__subclasses__()))

    own = {cls for cls in subclasses(BridgedConfig) if cls.__module__.startswith("vlbridge.") and cls.model_type}
    registered = {cls.model_type for cls in own if type(AutoConfig.for_model(cls.model_type)) is cls}
    assert registered == {model_of(kind, parts).config.model_type for kind in KINDS}


def test_sources_have_revisions(tmp_path):
    model, _ = tiny_model("mlp")
    model.config.frozen_parts = {
        "vision_model": {"source": "someone/clip", "revision": "0123456789abcdef", "sha256": "00"},
        "language_model": {"source": "someone/llama", "revision": None, "sha256": "11"},
    }
    model.config.save_pretrained(tmp_path)
    sources = [part["source"] for part in summarize(tmp_path)["parts"]]
    assert sources == ["someone/clip@0123456789ab", str(tmp_path), "someone/llama"]


def test_a_class_of_another_library_is_built_as_usual(tmp_path):
    """Such as that of a model which was saved with its code under another name."""
    model, _ = tiny_stage1()
    model.config.architectures = ["Renamed"]
    model.config.save_pretrained(tmp_path)
    assert summarize(tmp_path)["class"] == "QFormerBlip2ForPreTraining"


@pytest.mark.parametrize("bridge", FAMILIES)
def test_tokens_are_those_of_the_model(tmp_path, bridge):
    model, _ = tiny_model(bridge)
    model.config.save_pretrained(tmp_path)
    summary = summarize(tmp_path)
    pixels = torch.zeros(1, 3, summary["image_size"], summary["image_size"])
    assert (
        summary["image_tokens"]
        == TOKENS.get(bridge, summary["image_tokens"])
        == model.get_image_features(pixels).pooler_output.shape[1]
    )


def test_lines(tmp_path):
    model, _ = tiny_model("mlp")
    model.config.save_pretrained(tmp_path)
    lines = list(summary_lines(summarize(tmp_path)))
    assert lines[0] == f"{tmp_path}: mlp_llava, MLPLlavaForConditionalGeneration"
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.bridge.parameters())
    assert lines[-4].split() == ["total", f"{trainable:,}", f"{total:,}"]
    assert lines[-2:] == [
        "visual tokens per image: 25 (30 x 30 pixels), 25 in the prompt",
        "context window: 512 tokens; one image leaves 487 (95.1%) for text",
    ]


def test_any_resolution_shows_a_range(tmp_path):
    model, _ = tiny_model("mlp", image_aspect_ratio="anyres")
    model.config.save_pretrained(tmp_path)
    summary = summarize(tmp_path)
    # 1 x 2 tiles of 5 x 5 features: no column of a thin picture is left, but 5 line ends; 2 x 2 tiles are most
    assert (summary["fewest_image_tokens"], summary["image_tokens"]) == (25 + 5, 25 + 10 * 11)
    assert summary["context_left"] == 512 - 135
    assert "visual tokens per image: 30 to 135 (tiles of 30 x 30 pixels)" in summary_lines(summary)


@pytest.mark.core
@pytest.mark.parametrize("language", ["t5", "gpt2"])
@pytest.mark.parametrize("vision", ["timm", "resnet"])
def test_other_parts(tmp_path, vision, language):
    model, _ = tiny_model("mlp", language=language, vision=vision)
    model.config.save_pretrained(tmp_path)
    summary = summarize(tmp_path)
    side = summary["image_size"]
    assert summary["image_tokens"] == model.get_image_features(torch.zeros(1, 3, side, side)).pooler_output.shape[1]
    # T5's positions are relative: no limit
    assert summary["context_window"] == (None if language == "t5" else 512)
    assert summary["context_left"] == (None if language == "t5" else 512 - summary["image_tokens"])
    assert ("sets no limit" in list(summary_lines(summary))[-1]) == (language == "t5")


def test_window_that_is_too_small(tmp_path):
    config = LANGUAGE["llama"]()
    config.max_position_embeddings = 20
    vlbridge.MLPLlavaConfig(vision_config=VISION["clip"](), text_config=config).save_pretrained(tmp_path)
    assert "20 tokens; one image does not fit (5 too many)" in list(summary_lines(summarize(tmp_path)))[-1]


def test_other_models_are_refused(tmp_path):
    LANGUAGE["gpt2"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is a 'gpt2' model, not a bridged one"):
        summarize(tmp_path)
