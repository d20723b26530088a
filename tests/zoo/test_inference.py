"""Inference: batches, few-shot prompts, refused images, and what is loaded by name."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny import BRIDGE_OPTIONS, LANGUAGE, VISION, clip_image_processor, tiny_image, tiny_model, tiny_stage1

from vlbridge import FAMILIES, cli, default_model, inference


families = pytest.mark.parametrize("bridge", FAMILIES)


@pytest.fixture
def folder(tmp_path):
    """A saved tiny model."""
    model, processor = tiny_model("mlp")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------- answers


@families
def test_batches_equal_single_images(bridge):
    model, processor = tiny_model(bridge)
    images = [Image.new("RGB", (40, 33), colour) for colour in ("red", "white", "black")]
    alone = [inference.answer(model, processor, [image], "What?", max_new_tokens=6)[0] for image in images]
    assert inference.answer(model, processor, images, "What?", max_new_tokens=6, batch_size=2) == alone
    assert len(set(alone)) > 1, "the images must matter"


def test_options_of_generate_hold_for_every_batch():
    model, processor = tiny_model("mlp")
    images = [tiny_image(seed) for seed in range(3)]

    def sampled(seed: int, batch_size: int) -> list[str]:
        torch.manual_seed(seed)
        return inference.answer(model, processor, images, "What?", batch_size=batch_size, do_sample=True, top_k=0)

    assert sampled(0, 1) == sampled(0, 1)
    assert all(a != b for a, b in zip(sampled(0, 1), sampled(1, 1), strict=True))


def test_no_images():
    model, processor = tiny_model("mlp")
    assert inference.answer(model, processor, [], "What?") == []
    assert inference.answer_each(model, processor, [], "What?") == []


@families
def test_captions_ask_what_the_processor_says(bridge):
    model, processor = tiny_model(bridge, caption_prompt="ab:")
    images = [tiny_image(0), tiny_image(1)]
    expected = inference.answer(model, processor, images, "ab:", max_new_tokens=6)
    assert inference.caption(model, processor, images, max_new_tokens=6) == expected


def test_a_refused_image_costs_no_other(monkeypatch):
    model, processor = tiny_model("mlp")
    images = [tiny_image(seed) for seed in range(3)]
    expected = inference.answer(model, processor, images, "What?", max_new_tokens=6)
    apply = processor.apply_chat_template

    def refuse_second(conversations, **kwargs):
        if any(content["image"] is images[1] for [turn] in conversations for content in turn["content"][:1]):
            raise ValueError("not this one")
        return apply(conversations, **kwargs)

    monkeypatch.setattr(processor, "apply_chat_template", refuse_second)
    first, second, third = inference.answer_each(model, processor, images, "What?", max_new_tokens=6)
    assert [first, third] == [expected[0], expected[2]]
    assert isinstance(second, ValueError) and str(second) == "not this one"


@families
def test_few_shot_batches_equal_single_prompts(bridge):
    """Each answer is what `generate` gives for the processor's own prompt, and the demonstrations matter."""
    model, processor = tiny_model(bridge)
    shown = [
        [{"image": tiny_image(0), "question": "a?", "answer": "b"}],
        [{"image": tiny_image(seed), "caption": "dog"} for seed in (1, 2)],
        [],
    ]
    queries = [
        {"image": tiny_image(3), "question": "where is it?"},
        {"image": tiny_image(4)},
        {"image": tiny_image(5), "question": "?"},
    ]
    expected = []
    for demonstrations, query in zip(shown, queries, strict=True):
        inputs = processor.few_shot(demonstrations, query)
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(ids, skip_special_tokens=True).strip())
    found = inference.answer_few_shot(model, processor, shown, queries, max_new_tokens=12, batch_size=2)
    assert found == expected
    without = inference.answer_few_shot(model, processor, [[], [], []], queries, max_new_tokens=12)
    assert found[:2] != without[:2] and found[2] == without[2]


def test_few_shot_wants_demonstrations_for_every_query():
    model, processor = tiny_model("mlp")
    with pytest.raises(ValueError, match="2 queries, but demonstrations for 1: give a list per query"):
        inference.answer_few_shot(model, processor, [[]], [{"image": tiny_image()}] * 2)


# ---------------------------------------------------------------------- loading


@pytest.mark.parametrize(("dtype", "expected"), [(None, "float32"), ("bfloat16", "bfloat16"), ("auto", "float32")])
def test_dtype_on_the_cpu(folder, dtype, expected):
    model, processor = inference.load(folder, "cpu", dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, expected)}
    assert not model.training and len(inference.caption(model, processor, [tiny_image()], max_new_tokens=2)) == 1


def test_device_and_dtype_that_do_not_exist(folder):
    with pytest.raises(ValueError, match="dtype is 'int8'; expected one of auto, float32"):
        inference.load(folder, "cpu", "int8")
    with pytest.raises(ValueError, match="device is 'toaster'; expected cpu"):
        inference.load(folder, "toaster")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here cuda is not missing")
def test_device_that_this_machine_lacks(folder):
    with pytest.raises(RuntimeError, match="device cuda: "):
        inference.load(folder, "cuda")


def test_the_embedded_bridge_is_the_default():
    assert inference.model_source() == default_model()
    assert inference.bridged_config(inference.model_source(), generates=True).model_type == "mlp_llava"


def test_home_folders(monkeypatch, folder):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert inference.model_source(f"~/{folder.name}") == str(folder)


@pytest.mark.parametrize("kind", [*FAMILIES, "stage 1"])
def test_models_without_a_language_model_are_refused(tmp_path, kind):
    if kind == "stage 1":
        model, processor = tiny_stage1(image_processor=clip_image_processor())
    else:
        options = {**BRIDGE_OPTIONS, "mlp": {"hidden_size": 24}}[kind]
        model, processor = FAMILIES[kind].classifier_class.from_vision(
            VISION["clip"](), num_labels=2, image_processor=clip_image_processor(), **options
        )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"it is a '{model.config.model_type}' model, which has no language model"):
        inference.load(tmp_path, "cpu")


def test_other_models_are_refused(tmp_path):
    LANGUAGE["gpt2"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is a 'gpt2' model, not a bridged one"):
        inference.load(tmp_path, "cpu")


def test_former_names():
    """`answer` and `load` were in `vlbridge.cli`, and can still be imported from there."""
    assert (cli.answer, cli.load) == (inference.answer, inference.load)
    with pytest.raises(AttributeError, match="has no attribute 'describe'"):
        cli.describe  # noqa: B018
