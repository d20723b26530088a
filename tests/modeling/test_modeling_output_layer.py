"""The output layer scores the special tokens of Perceiver-Flamingo, whatever became of it since the model was made."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import VOCAB, needs_compile, tiny_image, tiny_model
from torch import nn
from transformers import AutoModel


ATOL = 1e-5  # the same sums, in matrices of other shapes
LANGUAGES = ["llama", "gpt_neox", "opt", "llama_tied"]  # untied heads, with and without a matrix of another width


@pytest.fixture(params=LANGUAGES)
def composed(request):
    return tiny_model("perceiver", request.param)


def inputs_of(processor):
    return processor(images=tiny_image(), text="<image>what is it?<|endofchunk|>", return_tensors="pt")


def head_input_and_logits(model, inputs):
    """What goes into the output layer, and the model's logits."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        logits = model(**inputs).logits
    handle.remove()
    return seen[0], logits


def check(model, inputs, rows: int, delta=None):
    """Each column against one product with the row that stands for its token; returns the logits."""
    states, logits = head_input_and_logits(model, inputs)
    token_rows = model.bridge.token_rows
    trained = token_rows.input_rows if token_rows.output_rows is None else token_rows.output_rows
    assert logits.shape[-1] == max(rows, *(token + 1 for token in token_rows.token_ids))
    for row, token_id in zip(trained, token_rows.token_ids):
        torch.testing.assert_close(logits[..., token_id], states @ row, atol=ATOL, rtol=1e-4)
    head = model.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    others = [token for token in range(min(rows, head.weight.shape[0])) if token not in token_rows.token_ids]
    expected = states @ head.weight.T + (0 if delta is None else states @ delta.T)
    if getattr(head, "bias", None) is not None:
        expected = expected + head.bias
    torch.testing.assert_close(logits[..., others], expected[..., others], atol=ATOL, rtol=1e-4)
    return logits


@pytest.mark.core
@pytest.mark.parametrize("more", [1, 2, 40])
def test_after_resizing(composed, more, tmp_path):
    """More rows than before, some of them those of special tokens, which stay with the bridge."""
    model, processor = composed
    inputs = inputs_of(processor)
    before = check(model, inputs, VOCAB)
    model.resize_token_embeddings(VOCAB + more)
    after = check(model, inputs, VOCAB + more)
    columns = [*range(VOCAB), *model.config.special_token_ids]
    torch.testing.assert_close(after[..., columns], before[..., columns], atol=ATOL, rtol=1e-4)
    assert model.num_logits == after.shape[-1]
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(check(again, inputs, VOCAB + more), after, atol=ATOL, rtol=1e-4)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **settings), again.generate(**inputs, **settings))
    for method in ("tie_weights", "eval"):
        getattr(model, method)()
        torch.testing.assert_close(check(model, inputs, VOCAB + more), after)


def new_head(model):
    rows, width = model.get_output_embeddings().weight.shape
    head = nn.Linear(width, rows, bias=False)  # a deep copy would bring a copy of the hook with it
    nn.init.normal_(head.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    return head


@pytest.mark.parametrize("owner", ["model", "language model", "attribute"])
@pytest.mark.parametrize("language", ["llama", "gpt_neox"])
def test_after_another_head_was_set(language, owner):
    model, processor = tiny_model("perceiver", language)
    inputs, head = inputs_of(processor), new_head(model)
    check(model, inputs, VOCAB)
    if owner == "attribute":
        model.language_model.lm_head = head
    else:
        (model if owner == "model" else model.language_model).set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    check(model, inputs, VOCAB)


def test_two_models_share_a_language_model_whose_head_is_replaced():
    first, processor = tiny_model("perceiver")
    second = type(first)(first.config, vision_model=first.vision_model, language_model=first.language_model).eval()
    nn.init.normal_(second.bridge.token_rows.output_rows)
    inputs = inputs_of(processor)
    first.set_output_embeddings(new_head(first))
    for model in (second, first, second):
        check(model, inputs, VOCAB)


def adapted_head(adapted) -> torch.Tensor:
    """LoRA's product for the output layer, drawn so that it matters."""
    head = adapted.get_output_embeddings()
    for factor in (head.lora_A, head.lora_B):
        nn.init.normal_(factor["default"].weight, std=0.3)
    return head.scaling["default"] * head.lora_B["default"].weight @ head.lora_A["default"].weight


@pytest.mark.parametrize("language", ["llama", "gpt_neox"])
def test_lora_on_the_head(language):
    """The adapter belongs to the table; special tokens are scored by their rows, with the adapter and without."""
    model, processor = tiny_model("perceiver", language)
    inputs = inputs_of(processor)
    plain = check(model, inputs, VOCAB)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], modules_to_save=["bridge"]))
    delta = adapted_head(model).detach()
    changed = check(model, inputs, VOCAB, delta)
    special = model.config.special_token_ids
    torch.testing.assert_close(changed[..., special], plain[..., special], atol=ATOL, rtol=1e-4)
    with adapted.disable_adapter():
        torch.testing.assert_close(check(model, inputs, VOCAB), plain, atol=ATOL, rtol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(check(merged, inputs, VOCAB), changed, atol=1e-4, rtol=1e-4)


def test_a_trained_copy_of_the_head():
    """PEFT's `modules_to_save` copies the layer together with its hooks; each token is scored once."""
    model, processor = tiny_model("perceiver")
    inputs = inputs_of(processor)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["bridge", "lm_head"])
    get_peft_model(model, config)
    copied = model.get_output_embeddings().modules_to_save["default"]
    nn.init.normal_(copied.weight, std=0.3)
    states, logits = head_input_and_logits(model, inputs)
    special = model.config.special_token_ids
    expected = torch.cat([states @ copied.weight.T, states @ model.bridge.token_rows.output_rows.T], dim=-1)
    torch.testing.assert_close(logits[..., [*range(VOCAB), *special]], expected, atol=ATOL, rtol=1e-4)


def test_copies_follow_their_own_head():
    model, processor = tiny_model("perceiver")
    inputs = inputs_of(processor)
    twin = copy.deepcopy(model)
    twin.resize_token_embeddings(VOCAB + 9)
    check(twin, inputs, VOCAB + 9)
    check(model, inputs, VOCAB)
    check(copy.deepcopy(twin), inputs, VOCAB + 9)


@needs_compile
def test_a_compiled_model_follows_too():
    torch.compiler.reset()
    model, processor = tiny_model("perceiver")
    inputs = inputs_of(processor)
    out = model(**inputs, use_cache=True)
    settings = {"input_ids": inputs["input_ids"][:, -1:], "visual_states": out.visual_states, "use_cache": False}
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(**settings)
        model.resize_token_embeddings(VOCAB + 9)
        torch.testing.assert_close(compiled(**settings).logits, model(**settings).logits)
