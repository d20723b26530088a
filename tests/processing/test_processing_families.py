"""Processors: the right number of placeholders, whatever the encoder and the picture; chat templates; saving."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import VISION, tiny_image, tiny_model, tiny_tokenizer
from transformers import AutoProcessor, CLIPImageProcessor

import vlbridge


families = pytest.mark.parametrize("bridge", vlbridge.FAMILIES)


@pytest.fixture(
    scope="module", params=[(b, v) for b in vlbridge.FAMILIES for v in ("clip", "siglip", "timm")], ids="-".join
)
def composed(request):
    bridge, vision = request.param
    return tiny_model(bridge, vision=vision)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=0, max_size=3))
def test_placeholders_equal_features_for_any_picture(composed, sizes):
    model, processor = composed
    images = [tiny_image(index, size) for index, size in enumerate(sizes)]
    inputs = processor(images=images or None, text=["<image>" * len(images) + "what"], return_tensors="pt")
    placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    if not images:
        assert placeholders == 0 and "pixel_values" not in inputs
        return
    visual_tokens = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    expected = visual_tokens.shape[0] * (visual_tokens.shape[1] if model.config.visual_tokens_in_prompt else 1)
    assert placeholders == expected
    planned = processor._get_num_multimodal_tokens(image_sizes=[size[::-1] for size in sizes])
    assert sum(planned["num_image_tokens"]) == expected
    model(**inputs)


@families
def test_saved_processor_is_the_same(bridge, tmp_path):
    _, processor = tiny_model(bridge)
    processor.caption_prompt = "Say what you see."
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    for name in (
        "image_token_id",
        "patch_size",
        "num_prefix_tokens",
        "num_query_tokens",
        "caption_prompt",
        "chat_template",
    ):
        assert getattr(again, name) == getattr(processor, name), name
    texts = ["<image>a", "a longer one"]
    one, other = (p(images=[tiny_image()], text=texts, return_tensors="pt", padding=True) for p in (processor, again))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(one["pixel_values"], other["pixel_values"])


@families
def test_padding_is_on_the_left_also_after_saving(bridge, tmp_path):
    _, processor = tiny_model(bridge)
    processor.save_pretrained(tmp_path)
    for each in (processor, AutoProcessor.from_pretrained(tmp_path)):
        ids = each(text=["a", "abc"], return_tensors="pt", padding=True)["input_ids"]
        assert ids[0, 0] == each.tokenizer.pad_token_id != ids[0, -1]


# ---------------------------------------------------------------------- chat templates

TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    {"role": "user", "content": "and now?"},
]


@pytest.mark.parametrize(
    ("bridge", "expected"),
    [
        ("mlp", "USER: <image>\nwhat is it? ASSISTANT: a cat</s>USER: and now? ASSISTANT:"),
        ("qformer", "<image>what is it? a cat\nand now?"),
        ("perceiver", "<image>what is it?a cat<|endofchunk|>and now?"),
    ],
)
def test_plain_template_where_the_language_model_has_none(bridge, expected):
    _, processor = tiny_model(bridge)
    assert processor.apply_chat_template(TURNS, add_generation_prompt=True) == expected


@families
def test_the_language_models_own_template_takes_images(bridge):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    family = vlbridge.FAMILIES[bridge]
    processor = vlbridge.compose(VISION["clip"](), tiny_language(), bridge, tokenizer=tokenizer)[1]
    separator = family.processor_class.image_separator
    text = processor.apply_chat_template(TURNS, add_generation_prompt=True)
    assert text == f"[user]<image>{separator}what is it?[assistant]a cat[user]and now?[assistant]"


def tiny_language():
    from tiny import LANGUAGE

    return LANGUAGE["llama"]()


# ---------------------------------------------------------------------- errors


@families
def test_images_and_placeholders_must_agree(bridge):
    _, processor = tiny_model(bridge)
    with pytest.raises(ValueError, match="number of <image> tokens"):
        processor(images=[tiny_image()], text=["<image> and <image>"])
    with pytest.raises(ValueError, match="no images were passed"):
        processor(text=["<image>"])


@families
def test_a_tokenizer_without_the_placeholder_is_refused(bridge):
    family = vlbridge.FAMILIES[bridge]
    with pytest.raises(ValueError, match="splits '<image>'"):
        family.processor_class(CLIPImageProcessor(), tiny_tokenizer())


def test_a_processor_of_another_model_is_refused():
    _, processor = tiny_model("mlp")
    bigger = VISION["clip"]()
    bigger.image_size = 36
    other, _ = vlbridge.compose(bigger, tiny_language(), "mlp", tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="30x30 pixels, but the vision encoder was made for 36x36"):
        processor.check(other.config)
    processor.image_size, processor.num_prefix_tokens = 30, 0
    model, _ = tiny_model("mlp", vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="writes 25 image tokens, but the model makes 26"):
        processor.check(model.config)
    processor.image_token_id = 3
    with pytest.raises(ValueError, match="image_token_id"):
        processor.check(model.config)
