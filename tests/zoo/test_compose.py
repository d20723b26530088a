"""`compose`: what it takes, what it refuses, and that it leaves the parts as they are."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BRIDGE_OPTIONS, LANGUAGE, VISION, tiny_tokenizer
from toy_runs import save_parts
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    FalconConfig,
    TimmWrapperConfig,
    ViTConfig,
)
from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config

import vlbridge
from vlbridge.compose import native_image_processor


families = pytest.mark.parametrize("bridge", vlbridge.FAMILIES)


def compose(vision="clip", language="llama", bridge="mlp", **options):
    vision = VISION[vision]() if isinstance(vision, str) and vision in VISION else vision
    language = LANGUAGE[language]() if isinstance(language, str) and language in LANGUAGE else language
    options.setdefault("tokenizer", tiny_tokenizer())
    return vlbridge.compose(vision, language, bridge, **options)


@pytest.mark.core
@families
def test_loaded_models_are_used_as_they_are(bridge):
    torch.manual_seed(0)
    vision, language = AutoModel.from_config(VISION["clip"]()), AutoModelForCausalLM.from_config(LANGUAGE["llama"]())
    before = {name: tensor.clone() for part in (vision, language) for name, tensor in part.state_dict().items()}
    attention = language.config._attn_implementation
    tokenizer = tiny_tokenizer()
    model, processor = compose(vision, language, bridge, tokenizer=tokenizer, **BRIDGE_OPTIONS[bridge])
    assert model.vision_model is vision and model.language_model is language
    for part in (vision, language):
        for name, tensor in part.state_dict().items():
            assert torch.equal(tensor, before[name]), name
    assert language.config._attn_implementation == attention is not None
    assert language.get_input_embeddings().num_embeddings == 100
    assert "<image>" not in tokenizer.get_vocab() and "<image>" in processor.tokenizer.get_vocab()


@pytest.mark.core
@families
def test_folders(bridge, tmp_path):
    AutoModel.from_config(VISION["clip"]()).save_pretrained(tmp_path / "vision")
    CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}).save_pretrained(
        tmp_path / "vision"
    )
    AutoModelForCausalLM.from_config(LANGUAGE["llama"]()).save_pretrained(tmp_path / "language")
    tiny_tokenizer().save_pretrained(tmp_path / "language")
    model, _ = vlbridge.compose(tmp_path / "vision", str(tmp_path / "language"), bridge, **BRIDGE_OPTIONS[bridge])
    assert model.config.frozen_parts["language_model"]["source"] == str(tmp_path / "language")


def test_parts_that_zero3_would_leave_empty_are_refused(tmp_path):
    for name, part in (
        ("vision", AutoModel.from_config(VISION["clip"]())),
        ("language", AutoModelForCausalLM.from_config(LANGUAGE["llama"]())),
    ):
        part.save_pretrained(tmp_path / name)
    size = {"height": 30, "width": 30}
    options = {"tokenizer": tiny_tokenizer(), "image_processor": CLIPImageProcessor(size=size, crop_size=size)}
    model, _ = vlbridge.compose(tmp_path / "vision", tmp_path / "language", "mlp", **options)
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)

    class Zero3:  # as TrainingArguments leave one
        def is_zero3(self):
            return True

    config = Zero3()
    set_hf_deepspeed_config(config)
    try:
        for load in (
            lambda: vlbridge.compose(tmp_path / "vision", tmp_path / "language", "mlp", **options),
            lambda: AutoModel.from_pretrained(tmp_path / "bridge"),
        ):
            with pytest.raises(RuntimeError, match="Compose or load the model before the arguments are created"):
                load()
    finally:
        unset_hf_deepspeed_config()


def test_the_vision_tower_of_a_whole_clip(tmp_path):
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=VISION["clip"]().to_dict()))
    clip.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}).save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 30, 30)
    expected = clip.vision_model(pixels).last_hidden_state[:, 1:]
    for given in (str(tmp_path), clip):
        model, _ = compose(given, "llama")
        torch.testing.assert_close(model.get_patch_features(pixels), expected, atol=0, rtol=0)


@families
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype_is_of_all_parts(bridge, dtype):
    model, _ = compose(bridge=bridge, dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}


def test_padded_vocabularies_keep_their_rows():
    """Where the table has more rows than the tokenizer has tokens, a new token's row is still the bridge's."""
    config = LANGUAGE["llama"]()
    config.vocab_size = 128
    model, _ = compose(language=config, bridge="perceiver")
    assert model.config.special_token_ids == [100, 101]
    torch.testing.assert_close(model.embed_tokens(torch.tensor([[101]]))[0, 0], model.bridge.token_rows.input_rows[1])
    assert model(input_ids=torch.tensor([[5, 6]])).logits.shape[-1] == 128


# ---------------------------------------------------------------------- refusals


def test_unknown_bridge():
    with pytest.raises(ValueError, match="bridge is 'lora'; expected one of 'mlp', 'qformer', 'perceiver'"):
        compose(bridge="lora")


def test_unknown_option():
    with pytest.raises(ValueError, match="bridge='mlp' has no option num_latents"):
        compose(num_latents=4)


def test_wrong_type_of_part():
    with pytest.raises(TypeError, match="language is a int"):
        compose(language=7)


def test_a_configuration_has_no_tokenizer():
    with pytest.raises(ValueError, match="pass tokenizer="):
        compose(tokenizer=None)


def test_bad_projector():
    with pytest.raises(Exception, match="projector_type is 'mlp'"):
        compose(projector_type="mlp")


def test_a_language_model_is_no_vision_encoder():
    with pytest.raises(ValueError, match="can't serve as vision encoder"):
        compose(vision=LANGUAGE["llama"]())


def test_an_image_processor_of_another_size():
    with pytest.raises(ValueError, match="224x224 pixels, but the vision encoder was made for 30x30"):
        compose(image_processor=CLIPImageProcessor())


@pytest.mark.core
@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=100),
        FalconConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=100),
    ],
    ids=lambda config: config.model_type,
)
def test_language_models_that_keep_keywords_from_their_layers(config):
    """They work as language models of token bridges, and are refused for the perceiver at once."""
    model, processor = compose(language=config, bridge="mlp")
    assert model(**processor(text=["ab"], return_tensors="pt")).logits.isfinite().all()
    with pytest.raises(ValueError, match="does not hand keyword arguments on"):
        compose(language=config, bridge="perceiver")


# ---------------------------------------------------------------------- image processors


@pytest.mark.core
def test_timm_preprocessing_becomes_a_native_processor():
    config = TimmWrapperConfig(
        architecture="resnet10t",
        pretrained_cfg={
            "input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bicubic", "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.4], "crop_mode": "center",
        },
    )  # fmt: skip
    from PIL import Image
    from timm.data import create_transform, resolve_data_config
    from tiny import tiny_image

    image = tiny_image(size=(300, 260)).resize((500, 375), Image.Resampling.BICUBIC)
    theirs = create_transform(**resolve_data_config(config.pretrained_cfg), is_training=False)(image)
    ours = native_image_processor(config)(image, return_tensors="pt")["pixel_values"][0]
    assert ours.shape == theirs.shape
    # 8-bit rounding happens at other places: one grey level is 1 / 255 / std
    assert (ours - theirs).abs().max() < 2.5 / 255 / 0.2
    assert (ours - theirs).abs().mean() < 0.5 / 255 / 0.2
    config.pretrained_cfg["crop_mode"] = "border"
    with pytest.raises(ValueError, match="crop_mode 'border'"):
        native_image_processor(config)


def test_encoders_without_cls_and_with_registers():
    for config, prefix in (
        (VISION["siglip"](), 0),
        (VISION["dinov2"](), 1),
        (ViTConfig(**VISION["vit"]().to_dict()), 1),
    ):
        assert compose(config)[0].config.num_prefix_tokens == prefix


# ---------------------------------------------------------------------- the package


def test_a_bare_import_is_light():
    code = (
        "import sys, vlbridge; heavy = {'timm', 'gguf', 'datasets', 'gradio', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensors_that_a_part_does_not_need_are_no_news(tmp_path):
    """A classifier beside an encoder is not reported; a tensor that is missing is."""
    parts = save_parts(tmp_path)
    file = Path(parts["vision"]) / "model.safetensors"
    weights, said = load_file(file), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    loader = logging.getLogger("transformers.modeling_utils")
    loader.addHandler(handler)
    before = loader.level
    loader.setLevel(logging.WARNING)  # other tests make transformers quiet
    try:
        save_file({**weights, "classifier.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
        vlbridge.compose(parts["vision"], parts["language"], "mlp")
        assert not [text for text in said if "LOAD REPORT" in text] and not loader.filters
        first = next(name for name in weights if name.endswith("q_proj.weight"))
        save_file({name: weights[name] for name in weights if name != first}, file, {"format": "pt"})
        vlbridge.compose(parts["vision"], parts["language"], "mlp")
        (report,) = [text for text in said if "LOAD REPORT" in text]
        assert "MISSING" in report and "q_proj" in report
    finally:
        loader.setLevel(before)
        loader.removeHandler(handler)
