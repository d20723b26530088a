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


@pytest.mark.core
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


@pytest.mark.core
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


@pytest.mark.core
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


@pytest.mark.core
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


@pytest.mark.core
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


# ---------------------------------------------------------------------- few-shot prompts

CAPTIONS = [{"image": 0, "caption": "a cat"}, {"image": 1, "caption": "two dogs"}]
ANSWERS = [{"image": 0, "question": "what is it?", "answer": "a cat"}, {"question": "sure?", "answer": "yes"}]


def with_pictures(turns):
    return [{**turn, "image": tiny_image(turn["image"])} if "image" in turn else turn for turn in turns]


@pytest.mark.parametrize(
    "demonstrations, query, prompt",
    [
        (CAPTIONS, {"image": 2}, "<image>Output:a cat<|endofchunk|><image>Output:two dogs<|endofchunk|><image>Output:"),
        (
            ANSWERS,
            {"image": 2, "question": "and this?"},
            "<image>Question:what is it? Short answer:a cat<|endofchunk|>Question:sure? Short answer:yes<|endofchunk|>"
            "<image>Question:and this? Short answer:",
        ),
        ([], {"image": 0}, "<image>Output:"),
    ],
)
def test_flamingo_prompts_are_the_official_ones(demonstrations, query, prompt):
    _, processor = tiny_model("perceiver")
    text, images = processor.few_shot(demonstrations, query, tokenize=False)
    assert text == prompt
    assert images == [turn["image"] for turn in [*demonstrations, query] if "image" in turn]


@pytest.mark.core
@families
def test_few_shot_is_a_prompt_that_generates(bridge):
    model, processor = tiny_model(bridge)
    demonstrations, query = with_pictures(ANSWERS), {"image": tiny_image(2), "question": "and this?"}
    inputs = processor.few_shot(demonstrations, query)
    assert len(inputs["pixel_values"]) == 2
    alone = model.generate(**inputs, do_sample=False, max_new_tokens=4, eos_token_id=None)[:, -4:]
    batch = processor.few_shot([demonstrations, with_pictures(CAPTIONS), []], [query, {"image": tiny_image(3)}, query])
    assert batch["input_ids"].shape[0] == 3 and len(batch["pixel_values"]) == 2 + 3 + 1
    together = model.generate(**batch, do_sample=False, max_new_tokens=4, eos_token_id=None)[:, -4:]
    assert torch.equal(together[:1], alone)
    text, _ = processor.few_shot(demonstrations, query, tokenize=False)
    positions = [text.index(part) for part in ("<image>", "what is it?", "a cat", "sure?", "yes", "and this?")]
    assert text.count("<image>") == 2 and positions == sorted(positions)


@families
@pytest.mark.parametrize(
    "demonstrations, query, message",
    [
        ([{"image": 0}], {"image": 1}, "demonstration 0 has neither caption nor answer"),
        ([{"caption": "a", "answer": "b", "question": "c"}], {}, "caption and answer; expected exactly one"),
        ([{"image": 0, "answer": "b"}], {}, "an answer but no question"),
        ([{"image": 0, "text": "b"}], {}, "has text; expected a dict of image, caption"),
        (["a cat"], {}, "is a str"),
        ([], {"image": 0, "caption": "a"}, "the query has a caption already"),
        ([], [{"image": 0}], "1 queries, but demonstrations for 0"),
    ],
)
def test_wrong_demonstrations_are_refused(bridge, demonstrations, query, message):
    _, processor = tiny_model(bridge)
    with pytest.raises(ValueError, match=message):
        processor.few_shot(demonstrations, query)
