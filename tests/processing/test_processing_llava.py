"""MLP-LLaVA's processor: placeholders for pictures of any shape, tiles, padding, the releases' conversations."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import LANGUAGE, VISION, tiny_image, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

import vlbridge
from vlbridge.processing.processing_llava import CONVERSATIONS, cut_into_tiles, expand_to_square


NARROW = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
BIG_VISION = {
    "clip336": lambda: CLIPVisionConfig(**NARROW, image_size=336, patch_size=14),
    "siglip384": lambda: SiglipVisionConfig(**NARROW, image_size=384, patch_size=14),
}

# ---------------------------------------------------------------------- placeholders equal features

SETTINGS = {
    "anyres": {"image_aspect_ratio": "anyres"},
    "anyres, pooled": {"image_aspect_ratio": "anyres", "pooling": "average", "pooling_factor": 2},
    "anyres, shuffled": {"image_aspect_ratio": "anyres", "pooling": "pixel_shuffle", "pooling_factor": 3},
    "spatial": {"image_aspect_ratio": "anyres", "patch_merge_type": "spatial"},
    "flat with CLS": {
        "image_aspect_ratio": "anyres",
        "patch_merge_type": "flat",
        "vision_feature_select_strategy": "full",
    },
    "pad": {"image_aspect_ratio": "pad", "pooling": "pixel_shuffle", "pooling_factor": 2},
    "square": {"pooling": "average", "pooling_factor": 4},
}
SMALL_SIZES = st.tuples(st.integers(1, 90), st.integers(1, 90))
EXTREME_SIZES = st.sampled_from([(1, 1), (1, 2000), (2000, 1), (3, 700), (2000, 10), (47, 3)])


@pytest.fixture(scope="module", params=itertools.product(SETTINGS, VISION), ids=", ".join)
def composed(request):
    setting, vision = request.param
    return tiny_model("mlp", vision=vision, **SETTINGS[setting])


def check_counts(model, processor, sizes):
    images = [tiny_image(index, size) for index, size in enumerate(sizes)]
    inputs = processor(images=images, text=["<image>" * len(images) + "what"], return_tensors="pt")
    arguments = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    with torch.no_grad():
        features = model.get_image_features(**arguments).pooler_output
    counts = [len(of_one) for of_one in features]
    planned = processor._get_num_multimodal_tokens(image_sizes=[size[::-1] for size in sizes])
    assert list(planned.num_image_tokens) == counts
    assert sum(planned.num_image_patches) == len(inputs["pixel_values"])
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == sum(counts)
    if "image_sizes" in inputs:
        assert inputs["image_sizes"].tolist() == [list(size[::-1]) for size in sizes]
        assert counts == [model.config.num_image_tokens(*size[::-1]) for size in sizes]
    fewest, most = model.config.image_token_range()
    assert all(fewest <= count <= most for count in counts)


@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(SMALL_SIZES | EXTREME_SIZES, min_size=1, max_size=3))
def test_placeholders_equal_features(composed, sizes):
    check_counts(*composed, sizes)


@pytest.mark.parametrize("vision", BIG_VISION)
def test_placeholders_equal_features_at_full_resolution(vision):
    torch.manual_seed(0)
    for setting in ("anyres", "anyres, pooled"):
        model, processor = vlbridge.compose(
            BIG_VISION[vision](), LANGUAGE["llama"](), "mlp", tokenizer=tiny_tokenizer(), **SETTINGS[setting]
        )
        check_counts(model, processor, [(1, 1), (640, 480), (1, 2000), (1999, 31), (337, 1021)])


# ---------------------------------------------------------------------- pictures


def test_tiles_of_a_wide_picture():
    """8 x 6 pixels at 12 x 24: twice as large in the middle of two tiles, 4 black columns left and right."""
    pixels = np.random.default_rng(0).integers(1, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    base, *tiles = cut_into_tiles(image, 12, [[12, 24]])
    assert [tile.size for tile in (base, *tiles)] == [(12, 12)] * 3
    picture = np.concatenate([np.asarray(tile) for tile in tiles], axis=1)
    assert not picture[:, :4].any() and not picture[:, 20:].any()
    assert np.array_equal(picture[:, 4:20], np.asarray(image.resize((16, 12), Image.Resampling.BICUBIC)))
    assert np.array_equal(np.asarray(base), np.asarray(image.resize((12, 12), Image.Resampling.BICUBIC)))


SIZES = [(100, 40), (37, 90), (61, 61), (28, 20), (1, 200)]


@pytest.mark.core
def test_anyres_is_transformers_up_to_its_resizing():
    """LlavaNext's image processor resizes tensors with torchvision, the official code resizes PIL pictures.

    They differ by a few of 255 levels; one level is 1/67 after division by CLIP's standard deviation.
    """
    _, processor = tiny_model("mlp", image_aspect_ratio="anyres")
    theirs = LlavaNextImageProcessor(
        size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30},
        image_grid_pinpoints=processor.image_grid_pinpoints,
    )  # fmt: skip
    for number, size in enumerate(SIZES):
        image = tiny_image(number, size)
        found = processor(images=[image], text=["<image>"], return_tensors="pt")
        expected = theirs([image], return_tensors="pt")
        assert found["image_sizes"].tolist() == expected["image_sizes"].tolist()
        assert found["pixel_values"].shape == expected["pixel_values"][0].shape
        assert (found["pixel_values"] - expected["pixel_values"][0]).abs().max() < 4 / 67


def test_pad_is_transformers_up_to_its_resizing():
    _, processor = tiny_model("mlp", image_aspect_ratio="pad")
    theirs = LlavaImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}, do_pad=True)
    for number, size in enumerate(SIZES[:4]):
        image = tiny_image(number, size)
        found = processor(images=[image], text=["<image>"], return_tensors="pt")["pixel_values"]
        assert (found - theirs([image], return_tensors="pt")["pixel_values"]).abs().max() < 4 / 67
    square = expand_to_square(Image.new("RGB", (3, 6), (9, 9, 9)), (1, 2, 3))
    assert square.size == (6, 6) and square.getpixel((0, 5)) == (1, 2, 3) == square.getpixel((4, 0))
    assert {square.getpixel((x, y)) for x in (1, 2, 3) for y in range(6)} == {(9, 9, 9)}


@pytest.mark.parametrize("ratio", ["pad", "anyres"])
def test_arrays_tensors_and_other_modes_are_pictures_too(ratio):
    _, processor = tiny_model("mlp", image_aspect_ratio=ratio)
    image = tiny_image(0, (50, 30))
    array = np.asarray(image)
    expected = processor(images=[image], text=["<image>"], return_tensors="pt")["pixel_values"]
    for other in (array, torch.tensor(array).movedim(-1, 0), array.astype(np.float32) / 255, image.convert("RGBA")):
        found = processor(images=[other], text=["<image>"], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0)  # floats lose up to one of 255 levels
    with pytest.raises(ValueError, match="leave do_rescale on"):
        processor(images=[image], text=["<image>"], do_rescale=False)


def test_an_image_processor_without_crop_gives_tiles():
    processor = SiglipImageProcessor(size={"height": 30, "width": 30})
    model, processor = tiny_model("mlp", vision="siglip", image_processor=processor, image_aspect_ratio="anyres")
    check_counts(model, processor, SIZES)


# ---------------------------------------------------------------------- composing, saving, errors


@pytest.mark.core
def test_options_reach_configuration_and_processor(tmp_path):
    pinpoints = [[30, 60], [90, 30]]
    model, processor = tiny_model(
        "mlp", image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints, patch_merge_type="spatial",
        pooling="average", pooling_factor=2, conversation="plain", caption_prompt="Say.",
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    for each in (processor, AutoProcessor.from_pretrained(tmp_path)):
        assert each.image_aspect_ratio == "anyres" and each.caption_prompt == "Say."
        for source in (each, model.config):
            assert source.image_grid_pinpoints == pinpoints and source.patch_merge_type == "spatial"
            assert (source.pooling, source.pooling_factor) == ("average", 2)
        assert each.apply_chat_template(TURNS[:2]) == "<image><image>It is a cat.\n"
        assert "image_sizes" in each.model_input_names
        each.check(model.config)
    assert tiny_model("mlp", image_grid_pinpoints=pinpoints)[1].image_aspect_ratio == "anyres"
    model, processor = tiny_model("mlp", image_aspect_ratio="anyres")
    assert model.config.image_grid_pinpoints == [[30, 60], [60, 30], [60, 60], [90, 30], [30, 90]]
    assert "image_sizes" not in tiny_model("mlp")[1].model_input_names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_aspect_ratio": "crop"}, "expected 'square', 'pad' or 'anyres'"),
        ({"image_aspect_ratio": "pad", "image_grid_pinpoints": [[30, 60]]}, "expected 'anyres' with resolutions"),
        ({"image_grid_pinpoints": [[30, 61]]}, "multiples of the vision encoder's image_size, 30"),
        ({"conversation": "vicuna"}, "expected one of v0, vicuna_v0"),
        ({"conversation": "v1", "chat_template": "x"}, "not both"),
        ({"image_aspect": "pad"}, "it has caption_prompt, class_name_scale"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("mlp", **options)


def test_a_processor_of_another_model_is_refused():
    _, processor = tiny_model("mlp", image_aspect_ratio="anyres")
    for options in ({}, {"image_aspect_ratio": "anyres", "pooling": "average", "pooling_factor": 2}):
        other, _ = tiny_model("mlp", **options)
        with pytest.raises(ValueError, match="that was saved with the model"):
            processor.check(other.config)


# ---------------------------------------------------------------------- conversations

TURNS = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is in both pictures?"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "It is a cat."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And here? I see [a dog]."}]},
    {"role": "assistant", "content": "A dog; sure: a dog"},
]
ASKED = ["<image>\n<image>\nWhat is in both pictures?", "<image>\nAnd here? I see [a dog]."]
ANSWERED = ["It is a cat.", "A dog; sure: a dog"]
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USER = HUMAN.replace("human", "user")
LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."


def official(name, system=None):
    """A conversation as `Conversation.get_prompt` writes it, in pieces of (text, whether the assistant says it)."""
    if name in ("v0", "vicuna_v0", "llava_v0"):
        pieces = [((HUMAN if system is None else system) + "###", False)]
        for asked, answered in zip(ASKED, ANSWERED):
            pieces += [(f"Human: {asked}###Assistant:", False), (f" {answered}###", True)]
    elif name in ("v1", "vicuna_v1", "llava_v1"):
        default = HUMAN if name == "llava_v1" else USER
        pieces = [((default if system is None else system) + " ", False)]
        for asked, answered in zip(ASKED, ANSWERED):
            pieces += [(f"USER: {asked} ASSISTANT:", False), (f" {answered}</s>", True)]
    elif name in ("llava_llama_2", "mistral_instruct"):
        system = (LLAVA if name == "llava_llama_2" else "") if system is None else system
        opening = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
        begin = "<s>" if name == "llava_llama_2" else ""
        pieces = [(f"[INST] {opening}{ASKED[0]} [/INST]", False), (f" {ANSWERED[0]} </s>", True)]
        pieces += [(f"{begin}[INST] {ASKED[1]} [/INST]", False), (f" {ANSWERED[1]} </s>", True)]
    elif name in ("chatml_direct", "mpt"):
        default = "Answer the questions." if name == "chatml_direct" else MPT
        system = default if system is None else system
        pieces = [(f"<|im_start|>system\n{system}<|im_end|>", False)]
        for asked, answered in zip(ASKED, ANSWERED):
            pieces += [(f"<|im_start|>user\n{asked}<|im_end|><|im_start|>assistant\n", False)]
            pieces += [(f"{answered}<|im_end|>", True)]
    elif name == "plain":
        pieces = [(system or "", False), ("<image><image>", False), (ANSWERED[0] + "\n", True)]
        pieces += [("<image>", False), (ANSWERED[1] + "\n", True)]
    return pieces


def trained_tokenizer(kind):
    """A tokenizer that merges letters: `byte-level` as GPT-2's, `metaspace` as Llama's, which begins with `<s>`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "byte-level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    texts = ["".join(text for text, _ in official(name)) for name in CONVERSATIONS]
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=list(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "metaspace":
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module", params=["letters", "byte-level", "metaspace"])
def tokenizer(request):
    return tiny_tokenizer() if request.param == "letters" else trained_tokenizer(request.param)


def processor_with(tokenizer, **options):
    language = LANGUAGE["llama"]()
    language.vocab_size = len(tokenizer)
    return vlbridge.compose(VISION["clip"](), language, "mlp", tokenizer=tokenizer, **options)


@pytest.mark.core
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_texts_are_the_official_ones(name, system):
    _, processor = processor_with(tiny_tokenizer(), conversation=name)
    first = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    pieces = official(name, system)
    assert processor.apply_chat_template(first + TURNS) == "".join(text for text, _ in pieces)
    # what is asked for ends where the assistant's words begin
    prompt = processor.apply_chat_template(first + TURNS[:3], add_generation_prompt=True)
    assert prompt == "".join(text for text, _ in pieces[:-1])


@pytest.mark.parametrize("ratio", ["square", "anyres"])
@pytest.mark.parametrize(
    ("name", "space"),
    [(name, False) for name in CONVERSATIONS] + [(name, True) for name in CONVERSATIONS if name != "plain"],
)
def test_loss_masks_are_on_the_assistants_words_only(tokenizer, name, space, ratio):
    """Against prefixes tokenised one by one: a piece's tokens are those that its end has more than its beginning."""
    model, processor = processor_with(tokenizer, conversation=name, image_aspect_ratio=ratio)
    processor.space_after_image = space
    images = [tiny_image(number, size) for number, size in enumerate([(40, 33), (90, 11), (7, 8)])]
    pictures = iter(images)
    messages = [
        {**turn, "content": [{**item, "image": next(pictures)} if item["type"] == "image" else item
                             for item in turn["content"]]}
        if isinstance(turn["content"], list) else turn
        for turn in TURNS
    ]  # fmt: skip
    counts = iter(processor._get_num_multimodal_tokens([(i.height, i.width) for i in images]).num_image_tokens)
    lengths, ids, text = [], None, ""
    for piece, said in official(name):
        for part in re.split("(<image>)", piece):
            if part == "<image>":
                text += "<image>" * next(counts)
            else:
                text += (" " if space and part and text.endswith("<image>") else "") + part
        ids = processor.tokenizer(text)["input_ids"]
        lengths.append((len(ids), said))
    expected, done = [], 0
    for length, said in lengths:
        expected += [int(said)] * (length - done)
        done = length

    short = [{"role": "user", "content": "no picture"}, {"role": "assistant", "content": "true"}]
    out = processor.apply_chat_template(
        [messages, short], tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True},
    )  # fmt: skip
    assert out["input_ids"][0].tolist() == ids
    assert out["assistant_masks"][0].tolist() == expected
    assert "pixel_values" in out and ("image_sizes" in out) == (ratio == "anyres")
    said = processor.tokenizer.decode(out["input_ids"][0][out["assistant_masks"][0].bool()], skip_special_tokens=True)
    for answer in ANSWERED:
        assert answer in said
    assert "picture" not in said and "system" not in said
    assert not out["assistant_masks"][1][out["attention_mask"][1] == 0].any()
    said = processor.tokenizer.decode(out["input_ids"][1][out["assistant_masks"][1].bool()], skip_special_tokens=True)
    assert said.removesuffix("###").removesuffix("<|im_end|>").strip() == "true"

    labels = out["input_ids"].masked_fill(out.pop("assistant_masks") == 0, -100)
    assert model(**out, labels=labels).loss.isfinite()


def test_bad_conversations_are_refused():
    _, processor = processor_with(tiny_tokenizer(), conversation="llava_llama_2")
    with pytest.raises(Exception, match="The first message must be the user's"):
        processor.apply_chat_template([{"role": "assistant", "content": "hm"}])
    with pytest.raises(Exception, match="A tool message stands where only user and assistant can"):
        processor.apply_chat_template([{"role": "user", "content": "hm"}, {"role": "tool", "content": "hm"}])


def test_the_tokenizers_own_template_stays_the_default():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }};{% endfor %}"
    assert processor_with(tokenizer)[1].apply_chat_template(TURNS[:2]) == f"{ASKED[0]};{ANSWERED[0]};"
    named = processor_with(tokenizer, conversation="vicuna_v1")[1].apply_chat_template(TURNS[:2])
    assert named == f"{USER} USER: {ASKED[0]} ASSISTANT: {ANSWERED[0]}</s>"
