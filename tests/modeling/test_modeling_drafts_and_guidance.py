"""Drafted tokens (prompt lookup, assistants) are those of greedy decoding; guided ones those of two whole passes."""

from __future__ import annotations

import pytest
import torch
from generation_loops import FAMILIES, NEW, TEXTS, endless, inputs_of, loop, new_tokens, next_outputs, next_scores
from tiny import SMALL, TOKENS, spread_weights, tiny_model, tiny_stage1, tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def composed(request):
    return endless(*request.param)


def similar_to(bridge, language):
    """A model that often, not always, writes what another one writes."""
    other, _ = endless(bridge, language)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return other


def passes_of(model) -> list[int]:
    """Grows by one for every pass of the model's output layer."""
    passes = []
    model.get_output_embeddings().register_forward_hook(lambda *args: passes.append(1))
    return passes


# ---------------------------------------------------------------------- prompt lookup


@pytest.mark.core
@pytest.mark.parametrize("text", ["ab<image>cdab", "<image>abababab ab", "<image><image>ab<image>ab<image>ab"])
def test_prompt_lookup_is_greedy(composed, text):
    """In the first prompt the tokens after "ab" are placeholders, which have no column in the table."""
    model, processor = composed
    inputs = inputs_of(processor, [text])
    for more in ({}, {"repetition_penalty": 1.4}, {"max_matching_ngram_size": 1}, {"do_sample": True, "top_k": 1}):
        expected = new_tokens(model, inputs, max_new_tokens=8, **more)
        assert torch.equal(new_tokens(model, inputs, max_new_tokens=8, prompt_lookup_num_tokens=4, **more), expected)


def test_prompt_lookup_by_configuration_and_position(composed):
    model, processor = composed
    inputs = inputs_of(processor, ["ab<image>cdab"])
    expected = new_tokens(model, inputs)
    ids = inputs.pop("input_ids")
    config = GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(ids, config, **inputs)[:, -NEW:], expected)


@pytest.mark.core
def test_states_of_drafted_tokens(composed):
    model, processor = composed
    inputs = inputs_of(processor, TEXTS[:1])
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    settings["output_hidden_states"] = True
    out = model.generate(**inputs, max_new_tokens=NEW, prompt_lookup_num_tokens=3, **settings)
    written = out.sequences[:, -NEW:]
    for step in range(NEW):
        expected = next_scores(model, inputs, written[:, :step])
        torch.testing.assert_close(out.scores[step], expected, atol=1e-4, rtol=0)
    states = "decoder_hidden_states" if model.config.is_encoder_decoder else "hidden_states"
    slow = next_outputs(model, inputs, written[:, : NEW - 1], output_hidden_states=True)[states]
    for one, other in zip(out[states][-1], slow, strict=True):
        torch.testing.assert_close(one[:, -1], other[:, -1], atol=1e-4, rtol=0)


# ---------------------------------------------------------------------- assistants


@pytest.mark.core
@pytest.mark.parametrize("text", ["ab<image>cdab", "<image>c<image>hm?", "hm <image>"])
@pytest.mark.parametrize(("bridge", "language"), FAMILIES)
def test_assistants_with_a_bridge(bridge, language, text):
    model, processor = endless(bridge, language)
    inputs = inputs_of(processor, [text])
    expected = new_tokens(model, inputs, max_new_tokens=8)
    same, _ = endless(bridge, language)
    similar = similar_to(bridge, language)
    for assistant, more in ((model, {}), (similar, {}), (similar, {"do_sample": True, "top_k": 1})):
        assert torch.equal(new_tokens(model, inputs, max_new_tokens=8, assistant_model=assistant, **more), expected)
    # an assistant that sees the same images is always right
    same.generation_config.update(
        num_assistant_tokens=5, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    passes = passes_of(model)
    new_tokens(model, inputs, max_new_tokens=8, assistant_model=same)
    assert len(passes) == 2


@pytest.mark.core
@pytest.mark.parametrize("text", ["ab<image>cdab", "<image>", "no image here"])
@pytest.mark.parametrize(("bridge", "language"), FAMILIES)
def test_assistants_without_a_bridge(bridge, language, text):
    """They read the text alone, and write in columns of their own number."""
    model, processor = endless(bridge, language)
    other = similar_to(bridge, language).language_model
    inputs = inputs_of(processor, [text])
    expected = new_tokens(model, inputs, max_new_tokens=8)
    for assistant, more in ((model.language_model, {}), (other, {}), (other, {"do_sample": True, "top_k": 1})):
        assert torch.equal(new_tokens(model, inputs, max_new_tokens=8, assistant_model=assistant, **more), expected)
    penalty = {"repetition_penalty": 1.4}
    found = new_tokens(model, inputs, assistant_model=other, **penalty)
    assert torch.equal(found, new_tokens(model, inputs, **penalty))


def test_what_an_assistant_without_a_bridge_reads():
    """The text as it would stand without placeholders, so that its drafts are its own."""
    model, processor = endless("mlp")
    assistant = model.language_model
    inputs = inputs_of(processor, ["ab<image>cdab"])
    ids = inputs["input_ids"]
    text = ids[ids < model.config.image_token_id][None]
    assistant.generation_config.update(
        num_assistant_tokens=5, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0,
        eos_token_id=None,
    )  # fmt: skip
    drafts, generate = [], assistant.generate
    assistant.generate = lambda **kwargs: drafts.append(generate(**kwargs)) or drafts[-1]
    new_tokens(model, inputs, assistant_model=assistant)
    del assistant.generate
    expected = assistant.generate(input_ids=text, max_new_tokens=5, do_sample=False)
    assert torch.equal(drafts[0].sequences[:, ids.shape[1] :], expected[:, text.shape[1] :])


def test_an_assistant_with_another_tokenizer():
    model, processor = endless("mlp")
    config = LlamaConfig(**SMALL, **{**TOKENS, "vocab_size": 120}, num_key_value_heads=2, max_position_embeddings=512)
    torch.manual_seed(0)
    assistant = AutoModelForCausalLM.from_config(config).eval()
    spread_weights(assistant)
    inputs = inputs_of(processor, ["ab<image>cdab"])
    options = {"assistant_model": assistant, "tokenizer": processor.tokenizer, "assistant_tokenizer": tiny_tokenizer()}
    assert torch.equal(new_tokens(model, inputs, **options), new_tokens(model, inputs))
    with pytest.raises(ValueError, match=r"assistant_tokenizer can't be used with do_sample=True"):
        new_tokens(model, inputs, do_sample=True, **options)


def test_assistants_ignored_by_beams(composed):
    """As transformers does it, which warns."""
    model, processor = composed
    inputs = inputs_of(processor, TEXTS[:1])
    found = new_tokens(model, inputs, num_beams=2, assistant_model=model)
    assert torch.equal(found, new_tokens(model, inputs, num_beams=2))


# ---------------------------------------------------------------------- guidance


NEGATIVE = {
    "text": ["bad", "c"],
    "images": ["<image>bad", "c<image><image>"],
}


def negative_of(processor, kind: str | None, rows: int = 2) -> dict:
    if kind is None:
        return {}
    inputs = inputs_of(processor, NEGATIVE[kind][:rows])
    return {f"negative_prompt_{name}": inputs[key] for name, key in (("ids", "input_ids"), ("attention_mask",) * 2)}


def guided_scores(model, inputs, kind, negative: dict, written, scale: float):
    """The same from two whole passes: of the prompts, and of the negative prompts."""
    scores = next_scores(model, inputs, written).log_softmax(dim=-1)
    if kind is None:
        ids = inputs["input_ids"][:, -1:]
        others = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        others = {
            "input_ids": negative["negative_prompt_ids"],
            "attention_mask": negative["negative_prompt_attention_mask"],
        }
    if kind == "images":
        others.update({name: value for name, value in inputs.items() if name not in others})
    others = next_outputs(model, others, written).logits[:, -1].log_softmax(dim=-1)
    guided = torch.full_like(scores, -torch.inf)
    columns = others.shape[-1]
    guided[:, :columns] = scale * (scores[:, :columns] - others) + others
    if model.config.visual_tokens_in_prompt:
        guided[:, model.config.image_token_id :] = -torch.inf
    return guided


def guided_loop(model, inputs, kind, negative, scale, written=None, steps=NEW):
    written = torch.empty(len(inputs["input_ids"]), 0, dtype=torch.long)
    for _ in range(steps):
        best = guided_scores(model, inputs, kind, negative, written, scale).argmax(dim=-1)
        written = torch.cat([written, best[:, None]], dim=1)
    return written


def kinds_of(model) -> list[str | None]:
    return ["text", "images"] if model.config.is_encoder_decoder else [None, "text", "images"]


@pytest.mark.core
@pytest.mark.parametrize("scale", [0.5, 2.5])
def test_guidance_is_two_whole_passes(composed, scale):
    model, processor = composed
    inputs = inputs_of(processor)
    found = {}
    for kind in kinds_of(model):
        negative = negative_of(processor, kind)
        expected = guided_loop(model, inputs, kind, negative, scale)
        for more in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
            found[kind] = new_tokens(model, inputs, guidance_scale=scale, **negative, **more)
            assert torch.equal(found[kind], expected), (kind, more)
    assert any(not torch.equal(tokens, new_tokens(model, inputs)) for tokens in found.values())


@pytest.mark.core
def test_guidance_scores_and_drafts(composed):
    """Tokens that are drafted and taken back leave nothing behind in the negative prompt's cache."""
    model, processor = composed
    inputs = inputs_of(processor, TEXTS[:1])
    for kind in kinds_of(model):
        negative = negative_of(processor, kind, rows=1)
        options = {"guidance_scale": 1.8, **negative, "return_dict_in_generate": True, "output_scores": True}
        for more in ({}, {"prompt_lookup_num_tokens": 3}):
            out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options, **more)
            written = out.sequences[:, -NEW:]
            for step in range(NEW):
                expected = guided_scores(model, inputs, kind, negative, written[:, :step], 1.8)
                torch.testing.assert_close(out.scores[step], expected, atol=2e-4, rtol=0)


@pytest.mark.core
def test_guided_beams(composed):
    """Beams change places: each has the scores of its own tokens."""
    model, processor = composed
    inputs = inputs_of(processor)
    for kind in kinds_of(model):
        negative = negative_of(processor, kind)
        found = new_tokens(model, inputs, num_beams=3, guidance_scale=1.8, **negative, num_return_sequences=3)
        for row, images in ((0, slice(0, 1)), (1, slice(1, 3))):
            one = inputs_of(processor, TEXTS[row : row + 1])
            one["pixel_values"] = inputs["pixel_values"][images]
            alone = {name: value[row : row + 1] for name, value in negative.items()}
            beams, totals = torch.empty(1, 0, dtype=torch.long), torch.zeros(1)
            for _ in range(NEW):
                scores = torch.cat([guided_scores(model, one, kind, alone, beam[None], 1.8) for beam in beams])
                totals, places = (totals[:, None] + scores).flatten().topk(3)
                beams = torch.cat([beams[places // scores.shape[1]], places[:, None] % scores.shape[1]], dim=1)
            assert torch.equal(found.unflatten(0, (2, 3))[row], beams), kind


def test_guidance_comes_before_other_processors():
    """A penalty on guided scores is not a penalty that is guided away; so it is in transformers."""
    model, processor = endless("mlp")
    inputs = inputs_of(processor, TEXTS[:1])
    penalty = {"repetition_penalty": 1.5, "guidance_scale": 1.8}
    out = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_scores=True, **penalty
    )
    expected = guided_scores(model, inputs, None, {}, torch.empty(1, 0, dtype=torch.long), 1.8)
    seen = inputs["input_ids"][0].unique()
    expected[0, seen] *= torch.where(expected[0, seen] < 0, 1.5, 1 / 1.5)
    torch.testing.assert_close(out.scores[0], expected, atol=2e-4, rtol=0)


def test_guidance_of_several_calls():
    """A loop that calls `generate` again hands on its processors."""
    model, processor = endless("mlp")
    inputs = inputs_of(processor, TEXTS[:1])
    settings = GenerationConfig(guidance_scale=1.8, max_new_tokens=NEW, do_sample=False)
    expected = guided_loop(model, inputs, None, {}, 1.8)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, generation_config=settings)[:, -NEW:], expected)
    assert torch.equal(new_tokens(model, inputs, guidance_scale=1), loop(model, inputs))


# ---------------------------------------------------------------------- refused


def refused(model, inputs, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, **options)


@pytest.mark.core
def test_assistants_that_are_refused(composed):
    model, processor = composed
    inputs, is_t5 = inputs_of(processor, TEXTS[:1]), composed[0].config.is_encoder_decoder
    other_kind, _ = tiny_model("mlp", "llama" if is_t5 else "t5")
    refused(model, inputs, r"assistant_model is .*they must be of the same kind", assistant_model=other_kind)
    other_family = "mlp" if model.config.model_type.startswith("qformer") else "qformer"
    longer, _ = tiny_model(other_family, "t5" if is_t5 else "llama")
    refused(model, inputs, r"can't read this prompt.*as many placeholders for an image", assistant_model=longer)
    moved, _ = tiny_model("mlp", "t5" if is_t5 else "llama")
    moved.config.image_token_id += 7
    refused(model, inputs, r"image token is 107, but the model's 100: they need the same", assistant_model=moved)
    refused(model, inputs, "assistant_tokenizer can't be used with", assistant_model=model, assistant_tokenizer=1)
    refused(model, inputs, "drafts are not guided", assistant_model=model, guidance_scale=2.0)
    for kind in ("static", "quantized"):
        for drafts in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 2}):
            refused(model, inputs, f"can't be used with a {kind} cache", cache_implementation=kind, **drafts)
    with torch.no_grad():
        features = model.get_image_features(inputs.pop("pixel_values"))
    other = similar_to("mlp", "t5" if is_t5 else "llama")
    other.config.image_token_id = model.config.image_token_id
    given = {"mm_encoder_outputs": {"image": features}}
    refused(model, inputs, "needs pixel_values: mm_encoder_outputs are visual tokens", assistant_model=other, **given)
    assert torch.equal(new_tokens(model, inputs, assistant_model=model, **given), new_tokens(model, inputs, **given))


@pytest.mark.core
def test_negative_prompts_that_are_refused(composed):
    model, processor = composed
    inputs = inputs_of(processor)
    ids = {f"negative_prompt_{name}": torch.ones(1, 3, dtype=torch.long) for name in ("ids", "attention_mask")}
    refused(model, inputs, r"negative_prompt_ids has 1 rows; expected 2", guidance_scale=2.0, **ids)
    swapped = negative_of(processor, "images")
    swapped = {name: value.flip(0) for name, value in swapped.items()}
    refused(model, inputs, r"shows the images of its prompt, or none", guidance_scale=2.0, **swapped)
    text = inputs_of(processor, ["abab", "hm"])
    images = negative_of(processor, "images")
    refused(model, text, r"the prompt with images none", guidance_scale=2.0, **images)
    if model.config.is_encoder_decoder:
        refused(model, inputs, r"needs negative_prompt_ids here: an encoder-decoder's", guidance_scale=2.0)
    else:
        last = inputs_of(processor, ["hm<image>"])
        refused(model, last, r"the prompt's last token, which is an image token", guidance_scale=2.0)


def test_stage1_refuses_what_needs_a_language_model():
    model, _ = tiny_stage1()
    pixel_values = torch.randn(1, 3, 30, 30)
    options = {"guidance_scale": 2.0, "prompt_lookup_num_tokens": 3, "assistant_model": model}
    for name, value in options.items():
        message = f"no language model.*does not take {name}"
        refused(model, {"pixel_values": pixel_values}, message, num_beams=1, **{name: value})
