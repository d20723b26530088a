"""Placeholders that come where they don't belong: among generated tokens, and in labels."""

from __future__ import annotations

import pytest
import torch
from tiny import COMBINATIONS, tiny_image, tiny_model
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList


IN_PROMPT = [pair for pair in COMBINATIONS if pair[0] != "perceiver"]
ATOL = 1e-5


def inputs_of(processor, rows: int = 2):
    texts = ["<image>what is it?", "hm, <image>"][:rows]
    return processor(images=[tiny_image(row) for row in range(rows)], text=texts, return_tensors="pt", padding=True)


def eager_to_write_images(bridge: str, language: str):
    """A model with a row for `<image>` in its table, which it would write nearly always."""
    model, processor = tiny_model(bridge, language)
    model.generation_config.eos_token_id = None
    if bridge == "perceiver":
        model.bridge.token_rows.requires_grad_(False)
        rows = model.bridge.token_rows.output_rows
        return model, processor, rows[model.config.special_token_ids.index(model.config.image_token_id)]
    model.resize_token_embeddings(model.config.image_token_id + 4)
    head = model.get_output_embeddings()
    head.weight.requires_grad_(False)
    return model, processor, head.weight[model.config.image_token_id]


def make_eager(model, row, inputs) -> None:
    """Let the row point along the states that the output layer reads."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    handle.remove()
    mean = torch.cat([states[:, -1] for states in seen]).mean(dim=0)
    row.copy_(20 * mean / mean.norm())


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 8},
    "top k": {"do_sample": True, "top_k": 1},
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeats": {"no_repeat_ngram_size": 2},
    "minimum": {"min_new_tokens": 6},
    "scores": {"output_scores": True, "return_dict_in_generate": True},
}


@pytest.mark.core
@pytest.mark.parametrize(("bridge", "language"), IN_PROMPT)
def test_placeholders_are_never_generated(bridge, language):
    model, processor, row = eager_to_write_images(bridge, language)
    inputs, image = inputs_of(processor), model.config.image_token_id
    make_eager(model, row, inputs)
    start = {"decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)} if model.config.is_encoder_decoder else {}
    assert (model(**inputs, **start).logits[:, -1].argmax(dim=-1) == image).any()  # it would
    for name, options in WAYS.items():
        torch.manual_seed(0)
        found = model.generate(**inputs, max_new_tokens=8, **{"do_sample": False, **options})
        found = getattr(found, "sequences", found)
        found = found if model.config.is_encoder_decoder else found[:, inputs["input_ids"].shape[1] :]
        assert (found != image).all(), name


class Add(LogitsProcessor):
    def __init__(self, token_id: int):
        self.token_id = token_id

    def __call__(self, input_ids, scores):
        return scores + 100.0 * (torch.arange(scores.shape[-1]) == self.token_id)


@pytest.mark.parametrize("given", ["name", "position", "with a configuration"])
def test_other_processors_of_the_logits_still_work(given):
    model, processor, row = eager_to_write_images("mlp", "llama")
    inputs = inputs_of(processor, rows=1)
    make_eager(model, row, inputs)
    both = LogitsProcessorList([Add(7), Add(model.config.image_token_id)])
    settings = {"max_new_tokens": 4, "do_sample": False}
    ids = inputs.pop("input_ids")
    if given == "position":
        found = model.generate(ids, None, both, **inputs, **settings)
    else:
        found = model.generate(ids, logits_processor=both, **inputs, **settings)
    assert found[0, ids.shape[1] :].tolist() == [7] * 4
    assert len(both) == 2  # the caller's list stays as it is


def test_greedy_is_the_loop_without_placeholders():
    """The best of all other tokens, not merely another one."""
    model, processor, row = eager_to_write_images("mlp", "llama")
    inputs, image = inputs_of(processor, rows=1), model.config.image_token_id
    make_eager(model, row, inputs)
    ids = inputs["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
        logits[:, image] = -torch.inf
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), ids)


def test_flamingo_generates_image_tokens_as_the_official_code_does():
    """`Flamingo.generate` of OpenFlamingo hands all tokens to the language model's `generate`."""
    model, processor, row = eager_to_write_images("perceiver", "llama")
    inputs, image = inputs_of(processor, rows=1), model.config.image_token_id
    make_eager(model, row, inputs)
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert (found[0, inputs["input_ids"].shape[1] :] == image).any()


# ---------------------------------------------------------------------- labels


def labels_of(model, inputs) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        return torch.tensor([[5, model.config.image_token_id, 2], [7, 2, -100]])
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def slow_loss(model, logits, labels) -> torch.Tensor:
    """The mean over the tokens that are predicted, one by one."""
    losses, shift = [], 0 if model.config.is_encoder_decoder else 1
    for scores, wanted in zip(logits.double(), labels.tolist()):
        for place in range(shift, len(wanted)):
            if wanted[place] not in (-100, model.config.image_token_id):
                losses.append(-scores[place - shift].log_softmax(dim=-1)[wanted[place]])
    return torch.stack(losses).mean().float()


@pytest.mark.core
@pytest.mark.parametrize("more", [0, 8], ids=["beyond the table", "with a row"])
@pytest.mark.parametrize(("bridge", "language"), IN_PROMPT)
def test_placeholders_in_labels_are_ignored(bridge, language, more):
    model, processor = tiny_model(bridge, language)
    if more:
        model.resize_token_embeddings(model.config.image_token_id + more)
    inputs = inputs_of(processor)
    labels = labels_of(model, inputs)
    before, image = labels.clone(), model.config.image_token_id
    assert (labels == image).any()
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, slow_loss(model, out.logits, labels), atol=ATOL, rtol=1e-5)
    masked = model(**inputs, labels=labels.masked_fill(labels == image, -100)).loss
    assert torch.equal(out.loss, masked)
    assert torch.equal(labels, before)
    if not model.config.is_encoder_decoder:
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        assert torch.equal(model(**inputs, labels=labels, shift_labels=shifted).loss, masked)


@pytest.mark.parametrize(("bridge", "language"), IN_PROMPT)
def test_placeholders_that_a_trainer_counted_are_refused(bridge, language):
    model, processor = tiny_model(bridge, language)
    inputs = inputs_of(processor)
    labels = labels_of(model, inputs)
    count = (labels != -100).sum()
    with pytest.raises(ValueError, match=r"labels are <image> placeholders.*= -100 in the collator"):
        model(**inputs, labels=labels, num_items_in_batch=count)
    labels[labels == model.config.image_token_id] = -100
    count = (labels != -100).sum() if model.config.is_encoder_decoder else (labels[:, 1:] != -100).sum()
    loss = model(**inputs, labels=labels, num_items_in_batch=count).loss
    torch.testing.assert_close(loss, model(**inputs, labels=labels).loss, atol=ATOL, rtol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 500])
@pytest.mark.parametrize(("bridge", "language"), [pair for pair in COMBINATIONS if pair[1] != "t5"])
def test_labels_beyond_the_logits_are_refused(bridge, language, wrong):
    model, processor = tiny_model(bridge, language)
    inputs = inputs_of(processor)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[1, -1] = wrong
    with pytest.raises(ValueError, match=rf"labels go from .*expected 0 to {model.num_logits - 1}"):
        model(**inputs, labels=labels)


def test_flamingo_learns_image_tokens_where_they_are_labels():
    """Its `<image>` has a row, and OpenFlamingo's `forward` leaves the choice to whoever makes the labels."""
    model, processor = tiny_model("perceiver")
    inputs = inputs_of(processor)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, -1] = model.config.image_token_id
    out = model(**inputs, labels=labels)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected, atol=ATOL, rtol=1e-5)
