"""A model without its output layer, and the output layer alone: together they are `forward`, also for a fused head."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import COMBINATIONS, tiny_image, tiny_model
from torch import nn

from vlbridge import compat


ATOL = 1e-5  # the same sums, in matrices of other shapes


def inputs_of(processor, answers=(" yes", " no, two")):
    """A batch of two images with answers, and the labels of the answers' tokens alone."""
    texts = [f"<image>what is it?{answer}" for answer in answers]
    images = [tiny_image(number) for number in range(len(texts))]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    labels = inputs["input_ids"].clone()
    for row, answer in zip(labels, answers):  # padded on the left, one token per character
        row[: -len(answer)] = -100
    return inputs, labels


def put_fused_head(model) -> None:
    """Put a fused head in the place of `forward`, the way TRL 1.16 does (`trl.trainer.utils.add_fused_lm_head`)."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def fused(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return original(*args, labels=labels, **kwargs)
        states = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state[:, :-1]
        head = self.get_output_embeddings()
        logits = nn.functional.linear(states, head.weight, head.bias)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    model.forward = types.MethodType(fused, model)


@pytest.mark.core
@pytest.mark.parametrize("family, language", COMBINATIONS)
def test_the_two_make_forward(family, language):
    model, processor = tiny_model(family, language)
    inputs, labels = inputs_of(processor)
    if model.config.is_encoder_decoder:
        with pytest.raises(ValueError, match="needs labels or decoder_input_ids"):
            model.base_model(**inputs)
        labels[labels == -100] = 0
        inputs["decoder_input_ids"] = labels
    with torch.no_grad():
        states = model.base_model(**inputs, output_hidden_states=True)
        expected = model(**inputs)
        torch.testing.assert_close(model.output_head()(states.last_hidden_state), expected.logits, atol=ATOL, rtol=1e-4)
    torch.testing.assert_close(states.image_hidden_states, expected.image_hidden_states)
    assert compat.cache_of(states).get_seq_length() == compat.cache_of(expected).get_seq_length()
    assert states.hidden_states
    assert isinstance(model.get_output_embeddings(), nn.Module)  # the language model's own, for everybody else
    assert model.get_decoder() is model.language_model and model.base_model.config is model.config
    assert set(dict(model.named_children())) == {"vision_model", "bridge", "language_model"}


@pytest.mark.parametrize("family, language", COMBINATIONS)
def test_encoders_are_set_by_modality(family, language):
    model, _ = tiny_model(family, language)
    other = copy.deepcopy(model.vision_model)
    model.set_encoder(other, modality="image")
    assert model.vision_model is other
    if model.config.is_encoder_decoder:
        text = copy.deepcopy(model.get_encoder())
        model.set_encoder(text)
        assert model.get_encoder() is text
    else:
        with pytest.raises(ValueError, match="has no text encoder; expected modality='image'"):
            model.set_encoder(other)


def test_it_continues_a_cache():
    model, processor = tiny_model("perceiver")
    inputs, _ = inputs_of(processor)
    more = torch.tensor([[40, 41], [42, 43]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    with torch.no_grad():
        first = model.base_model(**inputs, use_cache=True)
        again = model.base_model(
            input_ids=more, attention_mask=mask, cache=compat.cache_of(first), visual_states=first.visual_states
        )
        whole = model.base_model(**{
            **inputs, "input_ids": torch.cat([inputs["input_ids"], more], dim=1), "attention_mask": mask,
        })  # fmt: skip
    torch.testing.assert_close(again.last_hidden_state, whole.last_hidden_state[:, -2:], atol=ATOL, rtol=1e-4)


def test_logits_that_are_capped_afterwards():
    model, processor = tiny_model("perceiver", "gemma2")
    inputs, _ = inputs_of(processor)
    cap = model.config.get_text_config().final_logit_softcapping
    with torch.no_grad():
        found = model.output_head()(model.base_model(**inputs).last_hidden_state)
        torch.testing.assert_close((found / cap).tanh() * cap, model(**inputs).logits, atol=ATOL, rtol=1e-4)


def test_special_tokens_far_beyond_the_table():
    model, processor = tiny_model("perceiver")
    rows = model.bridge.token_rows
    rows.token_ids = [rows.token_ids[0], rows.token_ids[1] + 7]
    inputs, _ = inputs_of(processor)
    with torch.no_grad():
        found = model.output_head()(model.base_model(**inputs).last_hidden_state)
        expected = model(**inputs).logits
    gap = range(rows.token_ids[0] + 1, rows.token_ids[1])
    others = [column for column in range(expected.shape[-1]) if column not in gap]
    torch.testing.assert_close(found[..., others], expected[..., others], atol=ATOL, rtol=1e-4)
    assert found.shape == expected.shape and found[..., list(gap)].max() < -1e30
    assert torch.isfinite(found / 0.1).all()


@pytest.mark.core
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", ["mlp", "qformer", "perceiver"])
def test_a_fused_head_has_the_loss_and_the_gradients_of_forward(family, adapter):
    model, processor = tiny_model(family)
    inputs, labels = inputs_of(processor)
    bare = model
    if adapter:
        config = LoraConfig(
            target_modules=r"language_model\..*q_proj", modules_to_save=["bridge"], init_lora_weights=False
        )
        model = get_peft_model(model, config)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    expected = model(**inputs, labels=labels).loss
    gradients = torch.autograd.grad(expected, list(trained.values()), allow_unused=True)
    put_fused_head(bare)
    loss = model(**inputs, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    for name, ours, theirs in zip(trained, found, gradients):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=1e-3, msg=name)
    assert any("token_rows" in name for name in trained) == (family == "perceiver")
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)  # the forward below is unchanged
    if adapter:
        return
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.bridge.token_rows = None
        for weight in other.language_model.parameters():
            weight.mul_(0.5)
    # a copy runs itself, not the original
    assert abs(other(**inputs, labels=labels, fused_lm_head=True) - expected) > 1e-3


@pytest.mark.parametrize("family", ["mlp", "qformer"])
def test_a_fused_head_refuses_placeholders(family):
    model, processor = tiny_model(family)
    inputs, labels = inputs_of(processor)
    put_fused_head(model)
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    with pytest.raises(ValueError, match=f"{count} labels are <image> placeholders.*assistant_only_loss=True"):
        model(**inputs, labels=inputs["input_ids"], fused_lm_head=True)
    assert model(**inputs, labels=inputs["input_ids"]).loss.isfinite()  # `forward` itself ignores them
    labels[0, -1] = 5000
    with pytest.raises(ValueError, match="labels go up to 5000; expected at most 99"):
        model(**inputs, labels=labels, fused_lm_head=True)


def test_an_adapter_of_the_output_layer_is_refused():
    model, processor = tiny_model("perceiver")
    tuned = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    inputs, labels = inputs_of(processor)
    put_fused_head(model)
    with pytest.raises(ValueError, match="output layer carries an adapter"):
        tuned(**inputs, labels=labels, fused_lm_head=True)
