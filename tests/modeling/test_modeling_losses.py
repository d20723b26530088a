"""The loss without logits is the loss on all logits, with the same gradients, and never holds more than a block."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import COMBINATIONS, VOCAB, tiny_model
from torch import nn
from toy_records import assert_same, caption, loss_and_gradients, talk

from vlbridge.modeling import modeling_losses
from vlbridge.modeling.modeling_losses import IGNORED, token_losses, tokens_per_block
from vlbridge.training.training_encoding import encoder_for
from vlbridge.training.training_packing import PackedEncoder


RECORDS = [caption("two dogs and a cat", 0), talk("what?", "a very long answer", seed=2)]
CASES = [*COMBINATIONS, ("mlp", "gemma2"), ("perceiver", "mpt")]  # Gemma 2 caps its logits; MPT's code is ours


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of four or five tokens, as a vocabulary of 25,000 has them on a CPU."""
    monkeypatch.setitem(modeling_losses.BLOCK_LOGITS, "cpu", 5 * VOCAB)


def batch_of(model, processor, packed: bool = False) -> dict:
    encoder = encoder_for(model, processor)
    if packed:
        encoder = PackedEncoder(encoder, model, 200)
    batch = encoder.collate([encoder.encode(record) for record in RECORDS])
    return {name: value for name, value in batch.items() if name not in ("ids", "sources", "skipped")}


def scored_tokens(model, batch) -> list[int]:
    """How many tokens the output layer scores at a time, forward and backward."""
    counts = []
    handle = model.language_model.get_output_embeddings().register_forward_hook(
        lambda layer, args, logits: counts.append(logits.shape[:-1].numel())
    )
    model(**batch, return_logits=False).loss.backward()
    handle.remove()
    return counts


@pytest.mark.core
@pytest.mark.parametrize(("family", "language"), CASES)
def test_loss_and_gradients_are_those_of_all_logits(family, language):
    model, processor = tiny_model(family, language)
    batch = batch_of(model, processor)
    assert model(**batch).logits is not None
    for more in ({}, {"num_items_in_batch": torch.tensor(7)}):
        assert_same(
            loss_and_gradients(model, batch, **more, return_logits=False), loss_and_gradients(model, batch, **more)
        )
    outputs = model(**batch, return_logits=False)
    assert outputs.logits is None and outputs.image_hidden_states is not None
    assert outputs.token_losses.shape == batch["labels"].shape
    counts = scored_tokens(model, batch)
    if language == "gemma2":
        assert max(counts) == batch["labels"].numel()  # what comes after the output layer is not known
    else:
        assert max(counts) <= 5 and len(counts) > 4


@pytest.mark.parametrize(("family", "language"), [("mlp", "llama"), ("qformer", "opt"), ("perceiver", "llama")])
def test_packed_rows(family, language):
    model, processor = tiny_model(family, language)
    batch = batch_of(model, processor, packed=True)
    assert_same(loss_and_gradients(model, batch, return_logits=False), loss_and_gradients(model, batch))
    assert max(scored_tokens(model, batch)) <= 5


@pytest.mark.parametrize(("family", "language"), [("mlp", "llama"), ("qformer", "t5"), ("perceiver", "llama")])
def test_smoothed_labels(family, language):
    model, processor = tiny_model(family, language)
    batch = batch_of(model, processor)
    with torch.no_grad():
        logs, labels = model(**batch).logits.double().log_softmax(-1), batch["labels"]
        found = model(**batch, return_logits=False, label_smoothing=0.3)
    if language != "t5":
        logs, labels = logs[:, :-1], labels[:, 1:]
    expected = [
        0.7 * logs[row, token, labels[row, token]] + 0.3 * logs[row, token].mean()
        for row, token in (labels != IGNORED).nonzero().tolist()
    ]
    assert float(found.loss) == pytest.approx(-float(sum(expected)) / len(expected), rel=1e-5)
    with pytest.raises(ValueError, match="only where it returns no logits"):
        model(**batch, label_smoothing=0.3)


def test_an_output_layer_that_is_trained_gets_its_gradient():
    model, processor = tiny_model("perceiver")
    batch = batch_of(model, processor)
    model.freeze(language_model=False)
    gradients = []
    for more in ({}, {"return_logits": False}):
        model.zero_grad()
        model(**batch, **more).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert "language_model.lm_head.weight" in gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_an_adapter_around_the_model_and_its_output_layer():
    model, processor = tiny_model("mlp")
    batch = batch_of(model, processor)
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    adapted.eval()
    losses = [adapted(**batch, **more).loss for more in ({}, {"return_logits": False})]
    torch.testing.assert_close(losses[1], losses[0])


def test_nothing_to_learn_and_positions_without_labels():
    model, processor = tiny_model("mlp")
    batch = batch_of(model, processor)
    nothing = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
    loss, gradients = loss_and_gradients(model, nothing, num_items_in_batch=1, return_logits=False)
    assert float(loss) == 0 and gradients and not any(gradient.any() for gradient in gradients.values())
    with pytest.raises(ValueError, match="needs labels"):
        model(**{**batch, "labels": None}, return_logits=False)
    with pytest.raises(ValueError, match="don't combine labels with logits_to_keep"):
        model(**batch, logits_to_keep=2, return_logits=False)
    with pytest.raises(ValueError, match="Use the tokenizer that belongs to this model"):
        model(**{**batch, "labels": batch["labels"] + 1000}, return_logits=False)
    model.loss_function = lambda **kwargs: kwargs["logits"].sum()
    with pytest.raises(ValueError, match="loss_function is not the usual one"):
        model(**batch, return_logits=False)


def test_logits_are_held_a_block_at_a_time():
    torch.manual_seed(0)
    head, states = nn.Linear(8, 5000, bias=False), torch.randn(2, 50, 8, requires_grad=True)
    targets = torch.randint(5000, (2, 50))
    largest = 0

    def note(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel() if tensor is not head.weight else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = token_losses(head, states, targets, block=8).sum()
    assert largest < 5000  # no logits wait for backward
    loss.backward()
    found, states.grad = states.grad, None
    nn.functional.cross_entropy(head(states).flatten(0, 1), targets.flatten(), reduction="sum").backward()
    torch.testing.assert_close(found, states.grad, atol=1e-6, rtol=1e-5)
    assert tokens_per_block(10**9, torch.device("cpu")) == 1
