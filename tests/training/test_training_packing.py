"""Packing: every answer behind the shared prefix is what it is alone."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_image, tiny_model

from vlbridge.training.training_easy_vqa import (
    Example,
    balanced_question,
    blind_baseline,
    caption_of,
    properties_of,
    yes_no_templates,
)
from vlbridge.training.training_packing import PackedCollator, branch_mask, common_prefix, pack


PAIRS = [([5, 6, 7, 8], [30, 31, 2]), ([5, 6, 9], [32, 2]), ([5, 6, 7, 10, 11], [33, 34, 35, 2])]


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_prefix([[1], [2]]) == 0


def test_layout():
    packed = pack(PAIRS)
    assert packed["input_ids"].tolist() == [5, 6, 7, 8, 30, 31, 9, 32, 7, 10, 11, 33, 34, 35]
    assert packed["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 2, 3, 4, 5, 6, 7]
    assert packed["branch_ids"].tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    assert packed["next_ids"].tolist() == [-100] * 3 + [30, 31, 2, 32, 2] + [-100] * 2 + [33, 34, 35, 2]
    mask = branch_mask(packed["branch_ids"])[0, 0]
    assert mask[7].nonzero()[:, 0].tolist() == [0, 1, 6, 7]


@pytest.mark.parametrize("bridge", ["mlp", "qformer"])
@pytest.mark.parametrize("language", ["llama", "opt"])
def test_packed_loss_and_gradients_equal_unpacked(bridge, language):
    model, processor = tiny_model(bridge, language)
    prompts = ["<image>what is it?", "<image>what colour", "<image>why"]
    answers = ["a cat", "red", "no"]
    num_tokens = model.config.num_image_tokens(30, 30)
    pixel_values = processor(images=[tiny_image()], text=["<image>"], return_tensors="pt")["pixel_values"]
    features = model.get_patch_features(pixel_values)
    pairs = [
        (
            processor.tokenizer(prompt.replace("<image>", "<image>" * num_tokens))["input_ids"],
            [*processor.tokenizer(answer)["input_ids"], 2],
        )
        for prompt, answer in zip(prompts, answers)
    ]
    model.eval()
    inputs = PackedCollator()([{"patch_features": features[0], **pack(pairs)}])
    packed = model(**inputs).loss
    packed.backward()
    gradients = [parameter.grad.clone() for parameter in model.bridge.parameters()]
    model.zero_grad()
    total, count = 0, 0
    for prompt, answer in pairs:
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        total = total + model(input_ids=ids, patch_features=features, labels=labels).loss * len(answer)
        count += len(answer)
    (total / count).backward()
    torch.testing.assert_close(packed, total / count, atol=1e-5, rtol=1e-5)
    for gradient, parameter in zip(gradients, model.bridge.parameters()):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-3)


def test_one_row_a_step():
    with pytest.raises(ValueError, match="gradient accumulation"):
        PackedCollator()([pack(PAIRS), pack(PAIRS)])


@pytest.mark.parametrize(
    ("questions", "caption"),
    [
        ([("what color is the triangle?", "blue")], "a blue triangle"),
        ([("is there a red shape?", "yes"), ("is there not a circle?", "no")], "a red circle"),
        ([("is there not a red shape?", "yes"), ("what shape is present?", "circle")], None),
        ([("is no teal shape present?", "no"), ("is there a circle?", "no")], None),
        ([("what is the gray shape?", "rectangle")], "a gray rectangle"),
    ],
)
def test_captions_are_what_questions_and_answers_tell(questions, caption):
    assert caption_of(Example(None, questions)) == caption


def test_blind_baseline():
    train = [Example(None, [("q", "yes"), ("q", "yes"), ("q", "no"), ("p", "no")])]
    assert blind_baseline(train, [Example(None, [("q", "yes"), ("p", "yes"), ("new", "yes"), ("q", "no")])]) == 0.25


def test_balanced_questions_are_true_half_of_the_time_and_answered_rightly():
    examples = [
        Example(None, [("is there a red shape?", "yes"), ("is no circle present?", "no"), ("what is it?", "red")])
    ]
    templates = yes_no_templates(examples)
    assert templates == ["is no {shape} present?", "is there a {color} shape?"]
    generator = torch.Generator().manual_seed(0)
    found = {"color": "blue", "shape": "circle"}
    drawn = [
        balanced_question(found, templates, lambda below: int(torch.randint(below, (), generator=generator)))
        for _ in range(400)
    ]
    for question, answer in drawn:
        shown = "blue" in question or "circle" in question
        assert answer == ("yes" if shown != ("no" in question.split()) else "no")
        # what a question and its answer affirm is what was drawn from
        assert properties_of(Example(None, [(question, answer)])).items() <= found.items()
    assert 160 < sum("blue" in question or "circle" in question for question, _ in drawn) < 240
    assert len({question for question, _ in drawn}) == 8 + 3
