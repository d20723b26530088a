"""Bridges that begin with what another bridge tells the language model."""

from __future__ import annotations

from pathlib import Path

import imitation
import pytest
import torch
from class_maps import Head, Maps
from imitation import Drawings, exemplars, imitate_layers, imitate_tokens, layer_states
from three_bridges import SHOWS, Data, Questions
from tiny import tiny_model

from vlbridge.training.training_easy_vqa import Example


THINGS = (("blue", "circle"), ("red", "triangle"))


def about(color: str, shape: str) -> list[tuple[str, str]]:
    return [("what color is the shape?", color), ("what shape is it?", shape), (f"is there a {color} shape?", "yes"),
            ("is there not a rectangle?", "yes"), ("is there a rectangle?", "no")]  # fmt: skip


class Dim(Head):
    """A head whose features are the maps themselves, so that small models can be asked."""

    def __init__(self):
        self.words, self.names = [], []
        self.word_of_class = torch.zeros(3, dtype=torch.long)

    def features(self, maps):
        return maps


def make(bridge: str, **options):
    torch.manual_seed(0)
    model, processor = tiny_model(bridge, **options)
    processor.chat_template = processor.chat_template.replace("<image>", f"{SHOWS}<image>")
    dim, patches = model.config.vision_feature_size, model.config.num_image_tokens(*processor.output_size())
    if bridge == "qformer":  # so that an MLP gives as many visual tokens of these maps
        patches = model.config.qformer_config.num_query_tokens
    elif bridge == "perceiver":
        patches = 9  # any number
    places = torch.arange(12) % 2
    pictures = torch.randn(2, patches, dim)[places] + 0.1 * torch.randn(12, patches, dim)  # what they show decides
    data = Data(
        [Example(Path(str(place)), about(*THINGS[place])) for place in places], pictures, [None] * 4,
        torch.randn(4, patches, dim), Maps(torch.randn(3, patches, dim), torch.arange(3), torch.full((3,), 0.9)),
        Dim(), lambda maps: maps, held_back=0,
    )  # fmt: skip
    return model, processor, data


def test_drawings_are_sorted_by_what_they_show():
    _, processor, data = make("mlp")
    data.held_back = 2
    found = Drawings(data, (processor.caption_prompt, SHOWS))
    assert found.rows == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert found.captions[1] == (processor.caption_prompt, "The image shows a red triangle.")
    assert [set(asked) for asked in found.questions] == [set(about(*thing)) for thing in THINGS]


def test_exemplars_are_those_that_are_answered_best():
    model, processor, data = make("mlp")
    drawings = Drawings(data, (processor.caption_prompt, SHOWS))
    model.language_model.set_attn_implementation("eager")
    asked = Questions(data, processor, 1, 0, torch.float32)
    best = exemplars(model, asked, drawings)
    for thing, tokens in enumerate(best):
        losses = {}
        for row in drawings.rows[thing]:
            pairs = [drawings.captions[thing], *drawings.questions[thing]]
            features = data.easy_maps[row]
            # the order of the questions changes the loss by rounding alone
            losses[row] = model(**asked.batch([asked.sample(features, pairs)])).loss.item()
        row = min(losses, key=losses.get)
        torch.testing.assert_close(tokens, model.bridge(data.easy_maps[row][None])[0])


def test_a_qformer_learns_to_say_the_same():
    teacher, _, _ = make("mlp")
    model, processor, data = make("qformer")
    drawings = Drawings(data, (processor.caption_prompt, SHOWS))
    best = torch.randn(2, data.easy_maps.shape[1], teacher.config.text_config.hidden_size)
    monitored = data.easy_maps[:2]

    def away() -> float:
        with torch.no_grad():
            return ((model.bridge(monitored) - best).square().sum() / best.square().sum()).item()

    before = away()
    imitate_tokens(model, teacher, data, best, drawings, steps=60, learning_rate=5e-3)
    assert away() < 0.5 * before


@pytest.fixture
def perceiver():
    model, processor, data = make("perceiver", cross_attention_every_n_layers=1, gate_init=1.0)
    drawings = Drawings(data, (processor.caption_prompt, SHOWS))
    best = torch.randn(2, 5, model.config.text_config.hidden_size)
    return model, processor, data, drawings, best


def test_hidden_states_are_those_of_the_language_model(perceiver):
    model, processor, _, drawings, best = perceiver
    found = layer_states(model, processor, best, drawings, per_thing=50)
    assert [len(one.mask) for one in found] == [6, 6]
    decoder, tokenizer = model.language_model.model, processor.tokenizer
    embed = model.language_model.get_input_embeddings()
    for thing, states in enumerate(found):
        # questions lie by length: each is found again by its number of tokens and its answer's
        for question, answer in [drawings.captions[thing], *drawings.questions[thing]]:
            text = processor.apply_chat_template(imitation.conversation(question), add_generation_prompt=True)
            before, after = (
                tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split(processor.image_token)
            )
            answer = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            rest = embed(torch.tensor([after + answer]))
            with torch.no_grad():
                whole = torch.cat([embed(torch.tensor([before])), best[thing][None], rest], dim=1)
                hidden = decoder(inputs_embeds=whole, output_hidden_states=True).hidden_states
                wanted = torch.stack(hidden[:-1])[:, 0, len(before) + best.shape[1] - 1 :]  # what comes into each layer
                row = model.bridge.token_rows.fill(
                    torch.zeros(1, 1, rest.shape[-1]), torch.tensor([[model.config.image_token_id]])
                )
                blind = torch.cat([embed(torch.tensor([before])), row, rest], dim=1)
                first = decoder(inputs_embeds=blind, output_hidden_states=True).hidden_states[0][0, len(before) :]
            matches = [
                place
                for place in range(len(states.mask))
                if states.mask[place].sum() == wanted.shape[1]
                and torch.allclose(states.seen[:, place, : wanted.shape[1]].float(), wanted, atol=0.02)
            ]
            assert matches, question
            place = matches[0]
            torch.testing.assert_close(states.without[0, place, : len(first)].float(), first, atol=0.02, rtol=0.01)
            assert states.answers[place].nonzero()[:, 0].tolist() == [
                len(after) + number for number in range(len(answer))
            ]


def test_layers_learn_what_a_picture_changes(perceiver, monkeypatch):
    model, processor, data, drawings, best = perceiver
    states, shares, step_down = layer_states(model, processor, best, drawings, per_thing=50), [], imitation.step_down

    def noted(loss, *others):
        shares.append(loss.item())
        step_down(loss, *others)

    monkeypatch.setattr(imitation, "step_down", noted)
    imitate_layers(model.train(), data, states, drawings, steps=80, rates=(5e-3, 1e-3))
    assert sum(shares[-10:]) < 0.3 * sum(shares[:10])
    assert not [name for name, one in model.language_model.named_parameters() if one.grad is not None]
