"""What shipped bridges are trained on: scenes with their answers, feature maps of classes, and the steps of a run."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest
import three_bridges
import torch
from class_maps import SURE, Head, Maps, make_maps
from scenes import KINDS, NUMBERS, RGB, SIDE, ask, caption_of_scene, draw_scene, paint
from three_bridges import (
    NAMING,
    NEGATION,
    NOTHING,
    OPTIONS,
    PLAIN,
    SHOWS,
    ClassRows,
    Data,
    Questions,
    Scene,
    SharedMap,
    photo_answer,
    scene_targets,
)
from tiny import tiny_model
from torch.nn.utils import parametrize

from vlbridge.training.training_easy_vqa import COLORS, NEGATED, SHAPES, Example


# ---------------------------------------------------------------------- scenes


@pytest.fixture(scope="module")
def drawn():
    return [draw_scene(random.Random(f"test:{number}")) for number in range(60)]


def answer_of(question: str, shapes) -> str:
    """The answer from the shapes' places alone, by looking at every one of them."""
    count, kinds = Counter(one.shape for one in shapes), {one.name: one for one in shapes}
    if question == "how many shapes are there?":
        return NUMBERS[len(shapes)]
    if found := re.fullmatch(r"how many (\w+)s are there\?", question):
        return NUMBERS[count[found[1]]]
    if found := re.fullmatch(r"what color is the (\w+)\?", question):
        assert count[found[1]] == 1
        return next(one.color for one in shapes if one.shape == found[1])
    if found := re.fullmatch(r"what shape is (\w+)\?", question):
        (only,) = (one for one in shapes if one.color == found[1])
        return only.shape
    if found := re.fullmatch(r"is the (.+) to the (left|right) of the (.+)\?", question):
        left = kinds[found[1]].x < kinds[found[3]].x
        return "yes" if left == (found[2] == "left") else "no"
    found = re.fullmatch(r"is there a (.+)\?", question)
    return "yes" if found[1] in kinds else "no"


def test_answers_about_scenes_are_right_and_pairs_are_matched(drawn):
    asked = Counter()
    for shapes in drawn:
        rng = random.Random(1)
        for kind in KINDS:
            pairs = ask(shapes, kind, rng)
            asked[kind] += len(pairs)
            assert all(answer == answer_of(question, shapes) for question, answer in pairs)
            if kind in ("left or right", "yes/no"):
                assert sorted(answer for _, answer in pairs) in ([], ["no", "yes"])
        assert caption_of_scene(shapes).count(" a ") == len(shapes) - 1
    assert set(asked) == set(KINDS) and min(asked.values()) > 20
    assert set(map(len, drawn)) == {2, 3, 4, 5}


def test_shapes_do_not_overlap_and_have_their_colours(drawn):
    for shapes in drawn[:20]:
        picture = paint(shapes, random.Random(2))
        assert picture.size == (SIDE, SIDE)
        for one in shapes:
            assert max(abs(a - b) for a, b in zip(picture.getpixel((one.x, one.y)), RGB[one.color])) <= 14
            assert one.radius <= min(one.x, one.y, SIDE - one.x, SIDE - one.y)
        for one in shapes:
            assert all(
                max(abs(one.x - other.x), abs(one.y - other.y)) >= min(one.radius, other.radius)
                for other in shapes
                if other is not one
            )


def test_visual_tokens_begin_as_what_is_near_them_or_from_the_left(drawn):
    vectors = dict(zip((*COLORS, *SHAPES), torch.eye(len(COLORS) + len(SHAPES))))
    words = vectors.__getitem__

    for shapes in drawn[:10]:
        scene = Scene(shapes, Path())
        things = [words(one.color) + words(one.shape) for one in shapes]
        ordered = scene_targets(scene, words, 16, grid=False)
        assert torch.equal(ordered[0], things[0]) and torch.equal(ordered[-1], things[-1])
        placed = scene_targets(scene, words, 16, grid=True)
        torch.testing.assert_close(placed.sum(dim=1), torch.full((16,), 2.0))  # a colour and a shape, in shares
        for one, thing in zip(shapes, things):
            column, row = (min(3, int(place / SIDE * 4)) for place in (one.x, one.y))
            assert placed[4 * row + column] @ thing > 0.5


# ---------------------------------------------------------------------- maps of classes


@pytest.fixture(scope="module")
def head():
    return Head()


def test_maps_show_the_head_what_was_wanted(head):
    classes = torch.tensor([[281, 1, 2, 3], [504, 4, 5, 6], [817, 7, 8, 9], [11, 700, 800, 900]])
    found = make_maps(head, classes, torch.tensor([1, 1, 0, 3]), torch.Generator().manual_seed(0))
    assert found.maps.shape == (4, 49, 320)
    assert found.classes[:2].tolist() == [281, 504] and (found.sure[:2] > 0.3).all()
    assert found.sure[2] < 0.1  # noise
    assert found.sure[3] < SURE and int(found.classes[3]) in (11, 700, 800)
    again = head.logits(found.maps.float()).softmax(dim=-1).max(dim=-1)
    torch.testing.assert_close(again.values, found.sure, atol=0.02, rtol=0.02)


def test_the_end_of_the_encoder_is_the_encoder(head):
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        last = head.network.blocks(head.network.bn1(head.network.conv_stem(pixels)))
        maps = last.flatten(2).transpose(1, 2)
        torch.testing.assert_close(head.logits(maps), head.network(pixels), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------- training


def make_questions(head, drawn, bridge):
    model, processor = tiny_model(bridge)
    dim, patches = model.config.vision_feature_size, model.config.num_image_tokens(*processor.output_size())
    asked = [("what color is the shape?", "red"), ("what shape is it?", "circle"), ("is there a red shape?", "yes"),
             ("is there not a circle?", "no"), ("is there a circle?", "yes")]  # fmt: skip
    maps = Maps(torch.randn(3, patches, dim), torch.tensor([281, 504, 1]), torch.tensor([0.9, 0.8, 0.1]))
    data = Data(
        [Example(Path(), asked)] * 4, torch.randn(4, patches, dim), [Scene(one, Path()) for one in drawn[:3]],
        torch.randn(3, patches, dim), maps, head, lambda maps: maps, held_back=0,
    )  # fmt: skip
    return model, Questions(data, processor, 100, 0, torch.float32)


@pytest.fixture
def questions(head, drawn):
    return make_questions(head, drawn, "mlp")


@pytest.mark.parametrize("bridge", OPTIONS)
def test_each_bridge_learns_from_a_step(head, drawn, bridge):
    model, asked = make_questions(head, drawn, bridge)
    model(**asked.step(0)).loss.backward()
    grown = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grown and all(name.startswith("bridge.") for name in grown)


def test_a_step_is_a_function_of_its_number(questions):
    _, asked = questions
    one, same, other = asked.step(3), asked.step(3), asked.step(4)
    assert all(torch.equal(one[name], same[name]) for name in one if isinstance(one[name], torch.Tensor))
    assert not torch.equal(one["patch_features"], other["patch_features"])
    assert len(one["patch_features"]) == 14
    asked.begin = NEGATION  # everything from the first step on
    assert len(asked.step(3)["patch_features"]) == 12


def test_what_is_asked_about_drawings_grows(questions):
    _, asked = questions

    def draw(progress, *counts):
        return [pair for seed in range(30) for pair in asked.easy(0, progress, random.Random(seed), *counts)]

    naming, plain, later = draw(0.0, 0, 4), draw((NAMING + PLAIN) / 2, 5, 1), draw(0.9, 3, 3)
    about_shapes = re.compile("|".join(SHAPES))
    pairs = [pair for pair in plain if pair not in asked.data.easy[0].questions and pair[1] in ("yes", "no")]
    assert pairs and all(about_shapes.search(question) for question, _ in pairs)
    assert not any(NEGATED.search(question) for question, _ in pairs)
    assert {answer for _, answer in naming} >= {"red", "circle", f"{SHOWS} a red circle."}
    new = [pair for pair in later if pair not in asked.data.easy[0].questions and pair[1] in ("yes", "no")]
    assert any(NEGATED.search(question) for question, _ in new) and any("red" not in question for question, _ in new)


def test_bridges_that_begin_like_another_are_asked_about_drawings_alone(questions):
    _, asked = questions
    asked.alone = True
    counts = Counter(len(asked.step(number)["patch_features"]) for number in range(40))
    assert set(counts) == {3, 8} and 8 <= counts[8] <= 24  # two fifths of the steps name what there is
    for progress in (0.0, 0.9):  # the caption is always among it
        pairs = asked.easy(0, progress, random.Random(1), 0, 1)
        assert (asked.processor.caption_prompt, f"{SHOWS} a red circle.") in pairs


def test_photographs_are_named_only_where_the_encoder_is_sure(questions):
    _, asked = questions
    assert photo_answer("owl") == "The image shows an owl."
    for index, name in ((0, "cat"), (1, asked.data.head.names[int(asked.data.words[1])])):
        said = {answer for seed in range(40) for _, answer in asked.photo(index, random.Random(seed))}
        assert said == {photo_answer(name), "yes", "no"}
    said = {answer for seed in range(20) for _, answer in asked.photo(2, random.Random(seed))}
    assert said == {f"{SHOWS} {NOTHING}."}


def test_right_answers_are_counted_word_for_word(questions):
    model, asked = questions
    end = asked.processor.tokenizer.eos_token_id
    with torch.no_grad():  # a model that says nothing, and ends
        table = model.get_output_embeddings().weight
        table.zero_()
        last = model.language_model.get_decoder().norm
        last.weight.zero_()
        model.get_output_embeddings().register_forward_hook(
            lambda layer, inputs, output: torch.nn.functional.one_hot(
                torch.full(output.shape[:-1], end), output.shape[-1]
            ).float()
        )
    pairs = [[("what?", ""), ("what is it?", "red"), ("how?", "")], [("what?", "a")]]
    assert asked.right(model, asked.data.easy_maps[:2], pairs) == [[True, False, True], [False]]


def test_what_is_held_back_is_not_trained_on(head, drawn):
    _, processor = tiny_model("mlp")
    count, sure = 30, torch.tensor([0.9, 0.1, 0.4, 0.8, 0.7])
    data = Data(
        [Example(Path(str(number)), [("what?", "red")]) for number in range(count)], torch.zeros(count, 1, 1),
        [Scene(one, Path()) for one in drawn[:count]], torch.ones(count, 1, 1),
        Maps(torch.full((5, 1, 1), 2.0), torch.arange(5), sure), head, lambda maps: maps, held_back=1,
    )  # fmt: skip
    assert data.held_back_maps.tolist() == [3, 4] and data.usable.tolist() == [0, 1]
    data.easy_maps[-1:], data.scene_maps[-1:], data.maps.maps[2:] = -1, -1, -1
    asked = Questions(data, processor, 10, 0, torch.float32)
    assert all((asked.step(number)["patch_features"] >= 0).all() for number in range(30))


def test_a_bridge_that_knows_drawings_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(three_bridges, "CLASSES", 5)
    torch.manual_seed(0)
    drawings, _ = tiny_model("mlp")
    drawings.save_pretrained(tmp_path)
    before = drawings.bridge
    wide = tiny_model("mlp", projector_hidden_size=5 + before.linear_1.out_features, global_context=True)[0]
    features = torch.randn(2, 4, before.linear_1.in_features)
    kept = three_bridges.add_drawings(wide, tmp_path)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(wide.bridge.parameters(), kept.parameters()))
    with torch.no_grad():
        wide.bridge.linear_2.weight[:, :5] = 0  # the classes say nothing
    torch.testing.assert_close(wide.bridge(features), before(features))


def test_a_shared_map_is_folded_into_the_weights(monkeypatch):
    monkeypatch.setattr(three_bridges, "CLASSES", 3)
    one, two = torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)
    rows, columns, inputs = one.weight.detach().clone(), two.weight.detach().clone(), torch.randn(3, 5)
    parametrize.register_parametrization(one, "weight", ClassRows())
    parametrize.register_parametrization(two, "weight", SharedMap(4))
    torch.testing.assert_close(one.weight, rows)  # they begin as nothing
    torch.testing.assert_close(two.weight, columns)
    matrix = torch.randn(4, 4)
    with torch.no_grad():
        two.parametrizations.weight[0].matrix.copy_(matrix)
        one.parametrizations.weight.original1.zero_()
    expected = two(inputs)
    for layer in (one, two):
        parametrize.remove_parametrizations(layer, "weight")
        assert sorted(layer.state_dict()) == ["bias", "weight"]
    torch.testing.assert_close(two(inputs), expected)
    torch.testing.assert_close(two.weight, torch.cat([matrix @ columns[:, :3], columns[:, 3:]], dim=1))
    torch.testing.assert_close(one.weight, torch.cat([rows[:3], torch.zeros(2, 6)]))
