"""The pass over a prompt with images compiles in one graph, ragged batches and continued prefixes included."""

from __future__ import annotations

import pytest
import torch
from tiny import COMBINATIONS, needs_compile, tiny_image, tiny_model

from vlbridge.compat import cache_argument, cache_of


ATOL = 1e-5  # empty slots for images change the order of summation
TEXTS = ["<image>what is it?", "no image here", "<image>one <image>and another, in a longer question"]

pytestmark = needs_compile
DECODERS = [pair for pair in COMBINATIONS if pair[1] != "t5"]


def batch_of(processor, texts):
    count = sum(text.count("<image>") for text in texts)
    images = [tiny_image(seed) for seed in range(count)]
    return processor(images=images, text=texts, return_tensors="pt", padding=True)


@pytest.mark.core
@pytest.mark.parametrize("options", [{}, {"only_attend_immediate_media": False}], ids=["last image", "all images"])
@pytest.mark.parametrize(("bridge", "language"), DECODERS)
def test_prompts_compile_in_one_graph(bridge, language, options):
    if options and bridge != "perceiver":
        options = {}
    torch.compiler.reset()
    model, processor = tiny_model(bridge, language, **options)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for texts in (TEXTS, TEXTS[:1], TEXTS[::-1]):
        inputs = batch_of(processor, texts)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=ATOL, rtol=1e-4)


@pytest.mark.parametrize("every", [True, False], ids=["last image", "all images"])
def test_what_a_compiled_prompt_hands_on(every):
    """Decoding, and a prefix that is continued with more images, from the compiled model's visual states."""
    torch.compiler.reset()
    model, processor = tiny_model("perceiver", only_attend_immediate_media=every)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    prefix, more = batch_of(processor, TEXTS[2:]), batch_of(processor, ["<image>and <image>?"])
    mask = torch.cat([prefix["attention_mask"], more["attention_mask"]], dim=1)
    found = []
    with torch.no_grad():
        for run in (compiled, model):
            out = run(**prefix, use_cache=True)
            cache, states = cache_argument(cache_of(out)), out.visual_states
            assert states.num_images.tolist() == [2] and states.text_time.tolist() == [2]
            second = run(**{**more, "attention_mask": mask}, **cache, visual_states=states, use_cache=True)
            token = {"input_ids": torch.tensor([[9]]), "attention_mask": torch.nn.functional.pad(mask, (0, 1), value=1)}
            third = run(**token, **cache_argument(cache_of(second)), visual_states=second.visual_states)
            found.append((second.logits, third.logits))
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected, atol=ATOL, rtol=1e-4)


def test_gradients_of_a_compiled_prompt():
    torch.compiler.reset()
    model, processor = tiny_model("perceiver")
    inputs = batch_of(processor, TEXTS)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="eager")):
        model.zero_grad()
        run(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.bridge.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-3)


def test_wrong_numbers_of_images_are_still_refused():
    model, processor = tiny_model("perceiver")
    inputs = batch_of(processor, TEXTS)
    inputs["pixel_values"] = inputs["pixel_values"][:2]
    with pytest.raises(ValueError, match="3 image tokens in input_ids, but features of 2 images"):
        model(**inputs)
