"""Packing: every answer behind the shared prefix is what it is alone."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_image, tiny_model

from vlbridge.training.training_easy_vqa import (
    COLORS,
    SHAPES,
    Example,
    PackedConversations,
    Stage,
    answer_all,
    blind_baseline,
    caption_of,
    conversation,
    kind_of,
    matched_pair,
    properties_of,
    warm_up,
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


@pytest.mark.parametrize("language", ["llama", "opt"])
def test_answers_from_a_shared_prefix_are_those_of_each_question_alone(language):
    model, processor = tiny_model("mlp", language)
    examples = [
        Example(None, [("what is it?", "a"), ("is there a red circle in the image?", "b"), ("why", "c")]),
        Example(None, [("one question", "d")]),
    ]
    pictures = [tiny_image(0), tiny_image(1)]
    features = model.get_patch_features(processor.image_processor(pictures, return_tensors="pt")["pixel_values"])
    expected = []
    for picture, example in zip(pictures, examples):
        for question, _ in example.questions:
            text = processor.apply_chat_template(conversation(question), add_generation_prompt=True)
            inputs = processor(images=[picture], text=text, add_special_tokens=False, return_tensors="pt")
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=5)[:, inputs["input_ids"].shape[1] :]
            expected.append(processor.batch_decode(ids, skip_special_tokens=True)[0].strip().lower())
    assert answer_all(model, processor, examples, features, max_new_tokens=5) == expected


def test_warm_up_gives_every_token_the_words_for_what_is_shown():
    torch.manual_seed(0)
    model, processor = tiny_model("mlp")
    examples = [Example(None, [("what color is it?", color), ("is there a circle?", "yes")]) for color in COLORS]
    examples.append(Example(None, [("is there a circle?", "no")]))  # nothing is known about it
    features = torch.randn(len(examples), 2, model.config.vision_feature_size)
    warm_up(model, processor, examples, features, steps=1500, learning_rate=1e-2)
    table = model.get_input_embeddings().weight

    def embedding(word):
        return table[processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]].mean(dim=0)

    wanted = torch.stack([embedding(color) + embedding("circle") for color in COLORS])
    given = model.bridge(features[:-1])
    torch.testing.assert_close(given, wanted[:, None].expand_as(given), atol=0.05, rtol=0)


def test_the_curriculum_asks_own_questions_then_pairs_about_more_and_more():
    _, processor = tiny_model("mlp")
    forms = ("is there a {} shape?", "is there not a {} shape?", "is there a {}?", "is no {} here?")
    own = [("what color is it?", "blue"), ("is there a circle?", "yes")]
    own += [(form.format(word), "no") for form, word in zip(forms[1:], ("blue", "square", "circle"))]
    curriculum = (Stage(2), Stage(3, 2, ("{shape}",), negated=False), Stage(40, 1))
    data = PackedConversations([Example(None, own)], torch.zeros(1, 1, 8), processor, 4, curriculum)
    asked = []
    data.prompt = lambda question: asked.append(question) or [len(asked), 1]
    per_step = []
    for _ in range(sum(stage.steps for stage in curriculum) + 1):  # the trainer may fetch one more
        data[0]
        per_step.append(asked[:])
        asked.clear()
    known = {question for question, _ in own} | {processor.caption_prompt}
    assert all(len(questions) == 4 for questions in per_step)
    assert all(set(questions) <= known for questions in per_step[:2])
    shapes = {f"is there a {shape}?" for shape in SHAPES}
    assert all(set(questions) <= shapes for questions in per_step[2:5])
    assert all(set(questions[2:]) <= known for questions in per_step[5:])
    pairs = {question for questions in per_step[5:] for question in questions[:2]}
    assert any("not" in question for question in pairs) and any(color in q for q in pairs for color in COLORS)


def test_blind_baseline():
    train = [Example(None, [("q", "yes"), ("q", "yes"), ("q", "no"), ("p", "no")])]
    assert blind_baseline(train, [Example(None, [("q", "yes"), ("p", "yes"), ("new", "yes"), ("q", "no")])]) == 0.25


def test_a_matched_pair_differs_in_what_is_shown_only_and_is_answered_rightly():
    examples = [
        Example(None, [("is there a red shape?", "yes"), ("is no circle present?", "no"), ("what is it?", "red")])
    ]
    templates = yes_no_templates(examples)
    assert templates == ["is no {shape} present?", "is there a {color} shape?"]
    generator = torch.Generator().manual_seed(0)
    found = {"color": "blue", "shape": "circle"}
    seen = set()
    for _ in range(400):
        pair = matched_pair(found, templates, lambda below: int(torch.randint(below, (), generator=generator)))
        assert {answer for _, answer in pair} == {"yes", "no"}
        assert [kind_of(*asked) for asked in pair] == ["yes/no, shown", "yes/no, absent"]
        for question, answer in pair:
            shown = "blue" in question or "circle" in question
            assert answer == ("yes" if shown != ("no" in question.split()) else "no")
            # what a question and its answer affirm is what was drawn from
            assert properties_of(Example(None, [(question, answer)])).items() <= found.items()
            seen.add(question)
    assert len(seen) == 8 + 3


@pytest.mark.parametrize(
    "question, answer, kind",
    [
        ("what color is the shape?", "teal", "color"),
        ("what shape is it?", "circle", "shape"),
        ("is there a red shape?", "yes", "yes/no, shown"),
        ("is there not a red shape?", "no", "yes/no, shown"),
        ("is no circle present?", "yes", "yes/no, absent"),
    ],
)
def test_kinds_of_questions(question, answer, kind):
    assert kind_of(question, answer) == kind
