"""Perceiver-Flamingo alone: frames and masks, interleaved documents, continued prefixes, refused language models."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import LANGUAGE, VISION, spread_weights, tiny_image, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, MptForCausalLM

import vlbridge
from vlbridge.compat import cache_argument, cache_of
from vlbridge.modeling.modeling_flamingo import PerceiverResampler, decoder_layers


ATOL = 1e-4  # fp32, two layers; other shapes change the order of summation


@pytest.fixture(scope="module")
def composed():
    return tiny_model("perceiver")


def inputs_of(processor, texts, pictures, **kwargs):
    images = [tiny_image(seed) for seed in pictures]
    return processor(images=images or None, text=texts, return_tensors="pt", padding=True, **kwargs)


# ---------------------------------------------------------------------- resampler


@pytest.fixture
def resampler(composed):
    config = copy.deepcopy(composed[0].config)
    config.max_num_frames, config.max_num_media = 3, 2
    torch.manual_seed(0)
    module = PerceiverResampler(8, config)
    module.init_parameters(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def attended_slowly(layer, patches, latents):
    """Perceiver attention of one image, head by head. Source: Flamingo, figure 5."""
    attention = layer.attention
    latents = attention.norm_latents(latents)
    context = torch.cat([attention.norm_media(patches), latents])
    keys, values = (context @ attention.key_value.weight.T).chunk(2, dim=-1)
    queries = latents @ attention.query.weight.T
    size = queries.shape[1] // attention.num_heads
    heads = []
    for head in range(attention.num_heads):
        part = slice(head * size, (head + 1) * size)
        weights = (queries[:, part] @ keys[:, part].T / size**0.5).softmax(dim=-1)
        heads.append(weights @ values[:, part])
    return torch.cat(heads, dim=1) @ attention.out.weight.T


def test_resampler_is_the_slow_computation(resampler):
    torch.manual_seed(1)
    patches = torch.randn(2, 3, 5, 8)  # two videos of three frames
    found = resampler(patches, media_index=torch.tensor([1, 0]))
    for video, place in ((0, 1), (1, 0)):
        context = patches[video] + resampler.frame_embeddings[:, None] + resampler.media_time_embeddings[place, 0]
        context, latents = context.flatten(0, 1), resampler.latents
        for layer in resampler.layers:
            latents = latents + attended_slowly(layer, context, latents)
            latents = latents + layer.feed_forward(latents)
        torch.testing.assert_close(found[video], resampler.layer_norm(latents), atol=1e-5, rtol=1e-5)


def test_padded_patches_and_frames_are_not_seen(resampler):
    torch.manual_seed(1)
    patches = torch.randn(1, 2, 5, 8)
    place = {"media_index": torch.tensor([0])}
    mask = torch.ones(1, 2, 5, dtype=torch.bool)
    mask[0, 1, 3:] = False
    expected = resampler(patches, patch_mask=mask, **place)
    patches[0, 1, 3:] = 100.0
    torch.testing.assert_close(resampler(patches, patch_mask=mask, **place), expected)
    one_frame = resampler(patches[:, :1], **place)
    torch.testing.assert_close(resampler(patches, patch_mask=torch.tensor([[True, False]]), **place), one_frame)
    torch.testing.assert_close(resampler(patches[:, 0], **place), one_frame)


@pytest.mark.parametrize(
    "shape, arguments, message",
    [
        ((1, 4, 5, 8), {"media_index": torch.tensor([0])}, "4 frames"),
        ((1, 5, 8), {"media_index": torch.tensor([2])}, "3 images"),
        ((1, 5, 8), {}, "media_index"),
        ((1, 5, 8), {"media_index": torch.tensor([0]), "patch_mask": torch.ones(1, 4)}, "patch_mask"),
    ],
)
def test_resampler_refuses(resampler, shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        resampler(torch.zeros(shape), **arguments)


@pytest.mark.core
def test_videos_through_processor_and_generate(composed):
    """A video among images: padding frames are not seen, and the cache carries what the video showed."""
    model, processor = composed
    video = [tiny_image(1), tiny_image(2), tiny_image(3)]
    both = processor(
        images=[[video], [tiny_image(0)]], text=["<image>ab", "<image>c"], padding=True, return_tensors="pt"
    )
    assert both["pixel_values"].shape[:2] == (2, 3)
    assert both["patch_mask"].tolist() == [[True] * 3, [True, False, False]]
    alone = processor(images=[tiny_image(0)], text=["<image>c"], return_tensors="pt")
    with torch.no_grad():
        together, single = model(**both).logits, model(**alone).logits
    torch.testing.assert_close(together[1, -2:], single[0], atol=ATOL, rtol=0)
    settings = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    cached = model.generate(**both, **settings)
    assert torch.equal(cached, model.generate(**both, use_cache=False, **settings))
    still = processor(images=[[video[:1]], [tiny_image(0)]], text=["<image>ab", "<image>c"], padding=True)
    with torch.no_grad():
        assert not torch.allclose(model(**still).logits[0], together[0], atol=1e-3)


# ---------------------------------------------------------------------- interleaved documents

DOCUMENTS = ["<image>a<image>b", "ab<image>", "text alone", "<image><image>c", "a<image>b<image><image>c"]
COUNTS = [text.count("<image>") for text in DOCUMENTS]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("immediate", [True, False])
def test_documents_in_a_batch_are_what_they_are_alone(padding_side, immediate):
    model, processor = tiny_model("perceiver", only_attend_immediate_media=immediate)
    first = [sum(COUNTS[:row]) for row in range(len(DOCUMENTS))]
    batch = inputs_of(processor, DOCUMENTS, range(sum(COUNTS)), padding_side=padding_side)
    with torch.no_grad():
        together = model(**batch).logits
        for row, text in enumerate(DOCUMENTS):
            alone = model(**inputs_of(processor, [text], range(first[row], first[row] + COUNTS[row]))).logits[0]
            found = together[row][batch["attention_mask"][row].bool()]
            torch.testing.assert_close(found, alone, atol=ATOL, rtol=0)


def test_all_earlier_images_or_the_latest_only():
    pictures = {"first": [0, 1], "other": [2, 1]}
    for immediate in (True, False):
        model, processor = tiny_model(
            "perceiver", only_attend_immediate_media=immediate, cross_attention_every_n_layers=2
        )
        with torch.no_grad():
            logits = {name: model(**inputs_of(processor, ["<image>a<image>b"], seeds)).logits[0, 3]
                      for name, seeds in pictures.items()}  # fmt: skip
        # one block, before the last layer: the last position's self-attention sees conditioned earlier ones
        assert not torch.allclose(logits["first"], logits["other"], atol=1e-4)
        block = model.bridge.cross_attention_layers[0]
        outputs = []
        handle = block.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output[0, 3]))
        with torch.no_grad():
            for seeds in pictures.values():
                model(**inputs_of(processor, ["<image>a<image>b"], seeds))
        handle.remove()
        assert torch.equal(*outputs) == immediate


# ---------------------------------------------------------------------- continued prefixes


@pytest.mark.core
@pytest.mark.parametrize("suffixes", [["<image>cd", "e<image><image>f"], ["no image", "again none"]])
def test_a_shared_prefix_continued_is_the_full_prompt(composed, suffixes):
    """Demonstrations are run once; their cache and their images serve every query."""
    model, processor = composed
    prefix = "<image>ab<image>c"
    counts = [suffix.count("<image>") for suffix in suffixes]
    pictures = {suffix: range(2 + sum(counts[:row]), 2 + sum(counts[: row + 1])) for row, suffix in enumerate(suffixes)}
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    with torch.no_grad():
        shown = model(**inputs_of(processor, [prefix], [0, 1]), use_cache=True)
        for suffix in suffixes:
            full = inputs_of(processor, [prefix + suffix], [0, 1, *pictures[suffix]])
            new = inputs_of(processor, ["<image>" * len(pictures[suffix]) + "x"], pictures[suffix])
            state = {**cache_argument(copy.deepcopy(cache_of(shown))), "visual_states": shown.visual_states}
            if "pixel_values" in new:
                state["pixel_values"] = new["pixel_values"]
            expected = model(**full).logits[:, -len(suffix.replace("<image>", "i")) :]
            part = full["input_ids"][:, shown.logits.shape[1] :]
            found = model(input_ids=part, attention_mask=full["attention_mask"], **copy.deepcopy(state)).logits
            torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
            tokens = model.generate(full["input_ids"], attention_mask=full["attention_mask"], **state, **settings)
            assert torch.equal(tokens, model.generate(**full, **settings))


def test_a_prefix_of_one_row_serves_a_batch(composed):
    model, processor = composed
    prefix, suffixes = "<image>ab<image>c", ["<image>cd", "xyz", "e<image>"]
    full = inputs_of(
        processor, [prefix + suffix for suffix in suffixes], [0, 1, 2, 0, 1, 0, 1, 3], padding_side="right"
    )
    new = inputs_of(processor, ["<image>", "<image>"], [2, 3])
    with torch.no_grad():
        shown = model(**inputs_of(processor, [prefix], [0, 1]), use_cache=True)
        cache_of(shown).batch_repeat_interleave(3)
        expected = model(**full).logits
        found = model(
            input_ids=full["input_ids"][:, 5:],
            attention_mask=full["attention_mask"],
            **cache_argument(cache_of(shown)),
            visual_states=shown.visual_states,
            pixel_values=new["pixel_values"],
        ).logits
    attended = full["attention_mask"][:, 5:].bool()
    torch.testing.assert_close(found[attended], expected[:, 5:][attended], atol=ATOL, rtol=0)


def test_a_state_does_not_fit_any_batch(composed):
    model, processor = composed
    with torch.no_grad():
        shown = model(**inputs_of(processor, ["<image>a", "<image>b"], [0, 1]), use_cache=True)
        with pytest.raises(ValueError, match="2 rows can't be continued by 3"):
            model(**inputs_of(processor, ["<image>"] * 3, [0, 1, 2]), visual_states=shown.visual_states)


@pytest.mark.parametrize("immediate", [True, False])
def test_decoding_steps_carry_what_can_still_be_seen(immediate):
    """Where text sees the latest image only, the others' keys and values are dropped after the prompt."""
    model, processor = tiny_model("perceiver", only_attend_immediate_media=immediate)
    inputs = inputs_of(processor, ["<image>a<image>b<image>c", "<image>d", "text"], [0, 1, 2, 3])
    images = []
    handle = model.bridge.cross_attention_layers[0].register_forward_pre_hook(
        lambda module, args: images.append(args[1].shape[2] // model.config.num_latents)
    )
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    tokens = model.generate(**inputs, num_beams=2, **settings)
    handle.remove()
    assert images == ([3, 1, 1, 1] if immediate else [3, 3, 3, 3])
    assert torch.equal(tokens, model.generate(**inputs, num_beams=2, use_cache=False, **settings))


@pytest.mark.core
def test_assisted_decoding_gives_the_same_tokens(composed):
    """Prompt lookup proposes tokens and takes some back: the visual state must not run ahead."""
    model, processor = composed
    inputs = inputs_of(processor, ["<image>abababab<image>abab"], [0, 1])
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    expected = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, prompt_lookup_num_tokens=3, **settings), expected)


# ---------------------------------------------------------------------- language models


def test_a_loaded_mpt_is_taken_over_with_its_weights():
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_config(LANGUAGE["mpt"]())
    assert type(language) is MptForCausalLM
    model, processor = vlbridge.compose(VISION["clip"](), language, "perceiver", tokenizer=tiny_tokenizer())
    spread_weights(model.bridge)
    assert model.language_model.transformer.wte.weight is language.transformer.wte.weight
    with torch.no_grad():
        logits = {seed: model(**inputs_of(processor, ["<image>ab"], [seed])).logits for seed in (0, 1)}
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


@pytest.mark.parametrize("gate", (0.0, 1.0))
def test_of_a_fresh_bridge_one_layer_learns_first(gate):
    """The gates where they are shut, the output projections behind them where those are open and these zero."""
    model, processor = vlbridge.compose(
        VISION["clip"](), LANGUAGE["llama"](), "perceiver", tokenizer=tiny_tokenizer(), gate_init=gate
    )
    inputs = inputs_of(processor, ["<image>ab"], [0])
    outputs = model(**inputs, labels=inputs["input_ids"])
    outputs.loss.backward()
    learned_first = ("out.weight", "feed_forward.linear_out.weight") if gate else ("attn_gate.weight", "ff_gate.weight")
    for layer in model.bridge.cross_attention_layers:
        assert {name for name, weight in layer.named_parameters() if weight.grad.any()} == set(learned_first)
    assert not any(weight.grad.any() for weight in model.bridge.resampler.parameters())


# ---------------------------------------------------------------------- PEFT


def test_the_trained_copy_of_the_bridge_is_the_one_that_is_used(composed):
    """PEFT's `modules_to_save` puts a copy in the bridge's place: hooks that keep the original would ignore it."""
    from peft import LoraConfig, get_peft_model

    model, processor = tiny_model("perceiver")
    inputs = inputs_of(processor, ["<image>ab"], [0])
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["bridge"]))
    copied = wrapped.base_model.model.bridge.modules_to_save["default"]
    with torch.no_grad():
        before = wrapped(**inputs).logits
        copied.cross_attention_layers[0].attn_gate.weight.fill_(-0.7)
        assert not torch.allclose(wrapped(**inputs).logits, before, atol=1e-3)
    wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in copied.cross_attention_layers.parameters())
    assert all(parameter.grad is None for parameter in wrapped.base_model.model.bridge.original_module.parameters())


# ---------------------------------------------------------------------- what waits for backward


def kept_by_layer(model, inputs, labels) -> list[int]:
    """Number of tensors that each decoder layer keeps for `backward`, weights not counted."""
    layers = decoder_layers(model.language_model)
    kept, running = [0] * len(layers), []
    weights = {weight.data_ptr() for weight in model.parameters()}

    def note(tensor):
        if running and tensor.data_ptr() not in weights:
            kept[running[-1]] += 1
        return tensor

    handles = []
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(lambda layer, args, number=number: running.append(number)))
        handles.append(layer.register_forward_hook(lambda layer, args, output: (running.pop(), None)[1]))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**inputs, labels=labels).loss.backward()
    for handle in handles:
        handle.remove()
    return kept


def test_layers_below_the_first_trained_one_keep_nothing_for_backward():
    """The special tokens' rows are trained, and lie below all layers; if they are frozen, cross-attention is first."""
    model, processor = tiny_model("perceiver", cross_attention_every_n_layers=2)
    inputs = inputs_of(processor, ["<image>a cat<|endofchunk|>"], [0])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    model.train()
    below, conditioned = kept_by_layer(model, inputs, labels)
    assert below > 0 and conditioned > 0
    rows = model.bridge.token_rows
    assert rows.input_rows.grad.abs().sum() > 0
    rows.input_rows.requires_grad_(False)
    below, conditioned = kept_by_layer(model, inputs, labels)
    assert below == 0 and conditioned > 0
    gradients = [weight.grad.clone() for weight in model.bridge.cross_attention_layers.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients) and any(gradient.any() for gradient in gradients)
