"""The small language model of exercises: what it learns, and that bridges are composed with it."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import BRIDGE_OPTIONS, VISION, clip_image_processor, tiny_image, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import vlbridge
from vlbridge.training.training_language import train_language_model


TEXTS = [f"a {color} {shape}" for color in ("red", "blue") for shape in ("circle", "square", "house")]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "batch_size": 12, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("language")
    return folder, train_language_model(TEXTS, folder, tokenizer=tokenizer, steps=120, **SMALL)


def test_it_learns_its_texts_and_nothing_more(trained):
    folder, loss = trained
    words = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [torch.tensor([[*words(text, add_special_tokens=False)["input_ids"], words.eos_token_id]]) for text in TEXTS]
    with torch.no_grad():
        losses = [float(model(row, labels=row).loss) * (row.shape[1] - 1) for row in rows]
    # behind the first token, nobody can do better than to draw one of six texts
    best = math.log(len(TEXTS))
    assert best * 0.95 < sum(losses) / len(losses) < best * 1.1
    assert loss == pytest.approx(sum(losses) / sum(row.shape[1] - 1 for row in rows), rel=0.2)
    written = model.generate(rows[0][:, :1], max_new_tokens=20, do_sample=False)
    assert words.decode(written[0], skip_special_tokens=True) in TEXTS


def test_the_same_seed_gives_the_same_model(tmp_path, tokenizer):
    before = torch.get_rng_state()
    losses = [
        train_language_model(TEXTS, tmp_path / str(number), tokenizer=tokenizer, steps=3, seed=seed, **SMALL)
        for number, seed in enumerate((0, 0, 1))
    ]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bridge", ["mlp", "qformer", "perceiver"])
def test_bridges_are_composed_with_it(trained, tmp_path, bridge):
    AutoModel.from_config(VISION["clip"]()).save_pretrained(tmp_path)
    clip_image_processor().save_pretrained(tmp_path)
    model, processor = vlbridge.compose(tmp_path, trained[0], bridge, **BRIDGE_OPTIONS[bridge])
    inputs = processor(images=[tiny_image(0)], text="<image>a red", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_the_special_tokens_and_the_chat_template_stay(tmp_path):
    train_language_model(["<|im_start|>user\na red circle<|im_end|>\n", *TEXTS], tmp_path, steps=1, **SMALL)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert words.decode(words("<|im_start|>a", add_special_tokens=False)["input_ids"][:1]) == "<|im_start|>"
    turns = [{"role": "user", "content": "a red circle"}]
    assert "<|im_start|>user\na red circle<|im_end|>" in words.apply_chat_template(turns, tokenize=False)
    assert len(words) <= 400 and words.tokenize("red circle")[-1] == "Ġcircle"


def test_bad_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="0 texts"):
        train_language_model([], tmp_path)
    with pytest.raises(ValueError, match="hidden_size=100"):
        train_language_model(TEXTS, tmp_path, hidden_size=100)
    with pytest.raises(ValueError, match="steps=0"):
        train_language_model(TEXTS, tmp_path, steps=0)
