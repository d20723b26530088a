"""Whether answers depend on pictures: likelihoods by hand, and occlusion that finds what a model looks at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import COMBINATIONS, tiny_image, tiny_model

from vlbridge.inference import answer, question_inputs
from vlbridge.inspection import inspection_looking as looking
from vlbridge.inspection.inspection_looking import (
    answer_of,
    covered,
    did_it_look,
    ids_of,
    occlusion,
    token_log_likelihoods,
    words_of,
)


def by_hand(model, inputs, ids) -> list[float]:
    """One token after the other, each in a pass of its own."""
    found = []
    for number in range(ids.shape[1]):
        before = ids[:, :number]
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                start = torch.full((1, 1), model.config.decoder_start_token_id)
                logits = model(**inputs, decoder_input_ids=torch.cat([start, before], dim=1)).logits
            else:
                whole = torch.cat([inputs["input_ids"], before], dim=1)
                mask = torch.ones_like(whole)
                logits = model(**{**inputs, "input_ids": whole, "attention_mask": mask}).logits
        found.append(float(logits[0, -1].log_softmax(dim=-1)[ids[0, number]]))
    return found


@pytest.mark.core
@pytest.mark.parametrize(("bridge", "language"), COMBINATIONS)
def test_words_are_as_likely_as_computed_by_hand(bridge, language):
    model, processor = tiny_model(bridge, language)
    picture, other = tiny_image(0), tiny_image(1)
    ids = ids_of(model, processor, "ab c")
    rows = did_it_look(model, processor, picture, "what?", ids, other)
    assert [row.word for row in rows] == ["ab", "c"]
    groups = [tokens for _, tokens in words_of(processor, ids[0].tolist())]
    blank = Image.new("RGB", picture.size, (128, 128, 128))
    for name, image in (("picture", picture), ("blank", blank), ("other", other)):
        expected = by_hand(model, question_inputs(processor, [image], "what?"), ids)
        found = [getattr(row, name) for row in rows]
        assert found == pytest.approx([sum(expected[token] for token in group) for group in groups], abs=1e-4)
    assert rows[0].gain == rows[0].picture - rows[0].blank != 0


def test_the_answer_is_what_the_command_line_prints():
    model, processor = tiny_model("qformer")
    picture = tiny_image(0)
    ids = answer_of(model, processor, picture, "what?", max_new_tokens=6)
    (text,) = answer(model, processor, [picture], "what?", max_new_tokens=6)
    assert processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip() == text


def test_given_answers_stand_where_the_template_puts_them():
    model, processor = tiny_model("mlp")
    processor.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{{ c.text if c.type == 'text' else '<image>' }}{% endfor %}{% endif %};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    assert processor.tokenizer.decode(ids_of(model, processor, " red ")[0]) == "red"
    model, processor = tiny_model("mlp")  # the plain template puts a space before the answer
    assert processor.tokenizer.decode(ids_of(model, processor, "red")[0]) == " red"
    with pytest.raises(ValueError, match="answer is empty"):
        ids_of(model, processor, "  ")


def test_words():
    _, processor = tiny_model("mlp")
    ids = processor.tokenizer("ab c  de", add_special_tokens=False)["input_ids"]
    words = words_of(processor, ids)
    assert [word for word, _ in words] == ["ab", "c", "de"]
    assert sorted(number for _, tokens in words for number in tokens) == list(range(len(ids)))


@pytest.mark.parametrize("options", [{}, {"image_aspect_ratio": "anyres"}])
def test_occlusion_finds_what_the_answer_depends_on(monkeypatch, options):
    """A stand-in for the model that reads how white one place is."""
    model, processor = tiny_model("mlp", **options)
    picture = Image.new("RGB", (90, 60))
    picture.paste((255, 255, 255), (62, 22, 74, 34))
    shown = []

    def inputs_of(processor, pictures, question):
        shown.extend(pictures)
        return pictures

    def likelihoods(model, pictures, ids):
        white = [sum(image.getpixel((x, y))[0] > 200 for x in range(90) for y in range(60)) for image in pictures]
        return torch.tensor(white)[:, None].float()

    monkeypatch.setattr(looking, "question_inputs", inputs_of)
    monkeypatch.setattr(looking, "token_log_likelihoods", likelihoods)
    found = occlusion(model, processor, picture, "?", torch.tensor([[1]]), cells=5)
    x, y = found.peak
    assert 54 <= x <= 78 and 12 <= y <= 40
    assert found.log_likelihood == 144 and float(found.drop.sum()) == pytest.approx(144, abs=8)
    assert len(shown) == 26 and found.drop.shape == (5, 5)
    assert float(found.drop[0, 0]) == 0


@pytest.mark.parametrize(("bridge", "language"), [("mlp", "llama"), ("qformer", "t5"), ("perceiver", "opt")])
def test_occlusion_is_the_drop_of_each_covered_picture(bridge, language):
    model, processor = tiny_model(bridge, language)
    picture, ids = tiny_image(3, (60, 60)), ids_of(model, processor, "ab")
    found = occlusion(model, processor, picture, "what?", ids, cells=2, batch_size=3)
    color = tuple(int(value) for value in np.median(np.asarray(picture).reshape(-1, 3), axis=0))
    hidden = covered(picture, found.grid.cell(1, 0), color)
    whole, part = (
        float(token_log_likelihoods(model, question_inputs(processor, [image], "what?"), ids).sum())
        for image in (picture, hidden)
    )
    assert found.log_likelihood == pytest.approx(whole, abs=1e-4)
    assert float(found.drop[1, 0]) == pytest.approx(whole - part, abs=1e-4)
    with pytest.raises(ValueError, match="cells is 0"):
        occlusion(model, processor, picture, "what?", ids, cells=0)
