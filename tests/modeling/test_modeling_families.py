"""Every family, with every kind of language model it works with: forward, generation, freezing, training."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import pickle
import weakref

import pytest
import torch
from tiny import (
    BRIDGE_OPTIONS,
    COMBINATIONS,
    LANGUAGE,
    NUM_PATCHES,
    VISION,
    checkpoint_activations,
    needs_compile,
    spread_weights,
    tiny_image,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, GradientCheckpointingLayer

import vlbridge
from vlbridge.compat import cache_argument, cache_of
from vlbridge.compat_hooks import SELECTS_HIDDEN_STATES


ATOL = 1e-4  # fp32, two layers; padding changes the order of summation

TEXTS = ["<image>what is it?", "no image here", "<image>one <image>and another, in a longer question"]
IMAGES = [0, 2, 1]  # which picture stands where

combinations = pytest.mark.parametrize(("bridge", "language"), COMBINATIONS)


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def composed(request):
    bridge, language = request.param
    return tiny_model(bridge, language)


def batch_of(processor, rows=range(3)):
    """Inputs of some of `TEXTS`, padded on the left."""
    counts = [text.count("<image>") for text in TEXTS]
    images = [tiny_image(IMAGES[sum(counts[:row]) + k]) for row in rows for k in range(counts[row])]
    return processor(images=images or None, text=[TEXTS[row] for row in rows], return_tensors="pt", padding=True)


def new_tokens(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    ids = model.generate(**inputs, **kwargs)
    return ids if model.config.is_encoder_decoder else ids[:, inputs["input_ids"].shape[1] :]


def with_decoder_inputs(model, inputs):
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 7, 9]]).repeat(len(inputs["input_ids"]), 1)
    return inputs


def equal_up_to_end(batched, alone, end=2):
    """Tokens agree until the end of sequence, behind which only padding stands."""
    for one, other in zip(batched.tolist(), alone.tolist()):
        if one != other:
            return False
        if one == end:
            break
    return True


# ---------------------------------------------------------------------- shape


@pytest.mark.core
def test_three_children_and_only_the_bridge_is_trainable(composed):
    model, _ = composed
    assert [name for name, _ in model.named_children()] == ["vision_model", "language_model", "bridge"]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"bridge.{name}" for name, _ in model.bridge.named_parameters()}
    assert trainable


def test_frozen_parts_keep_their_keys(composed):
    model, _ = composed
    own = type(model.language_model)(copy.deepcopy(model.config.text_config)).state_dict().keys()
    assert model.language_model.state_dict().keys() == own


# ---------------------------------------------------------------------- batch equals single


@pytest.mark.core
def test_batch_equals_single_logits(composed):
    model, processor = composed
    with torch.no_grad():
        batch = with_decoder_inputs(model, batch_of(processor))
        together = model(**batch).logits
        for row in range(3):
            alone = model(**with_decoder_inputs(model, batch_of(processor, [row]))).logits[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, atol=ATOL, rtol=0)


def test_images_matter_and_belong_to_their_row(composed):
    model, processor = composed
    inputs = with_decoder_inputs(model, batch_of(processor))
    with torch.no_grad():
        before = model(**inputs).logits[:, -1]
        inputs["pixel_values"][0] += 0.5  # the picture of the first row
        after = model(**inputs).logits[:, -1]
    changed = (before - after).abs().amax(dim=-1)
    assert changed[0] > 100 * ATOL
    torch.testing.assert_close(before[1:], after[1:], atol=ATOL, rtol=0)


def test_batch_equals_single_tokens(composed):
    model, processor = composed
    together = new_tokens(model, batch_of(processor))
    for row in range(3):
        assert equal_up_to_end(together[row], new_tokens(model, batch_of(processor, [row]))[0])


# ---------------------------------------------------------------------- generation


@pytest.mark.core
def test_greedy_is_the_slow_obvious_loop(composed):
    """`generate` against a loop that runs the whole model anew for every token."""
    model, processor = composed
    inputs = batch_of(processor, [2])
    expected, ids = [], inputs["input_ids"]
    decoder_ids = torch.tensor([[0]])
    with torch.no_grad():
        for _ in range(6):
            extra = {"decoder_input_ids": decoder_ids} if model.config.is_encoder_decoder else {}
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"], **extra).logits[:, -1]
            expected.append(logits.argmax(dim=-1))
            if model.config.is_encoder_decoder:
                decoder_ids = torch.cat((decoder_ids, expected[-1][:, None]), dim=1)
            else:
                ids = torch.cat((ids, expected[-1][:, None]), dim=1)
    ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    try:
        found = new_tokens(model, inputs, max_new_tokens=6)
    finally:
        model.generation_config.eos_token_id = ends
    assert found[0, -6:].tolist() == torch.cat(expected).tolist()


@pytest.mark.core
@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=["static", "no cache"]
)
def test_every_cache_gives_the_same_tokens(composed, options):
    model, processor = composed
    inputs = batch_of(processor)
    options = {**options, "disable_compile": True} if "cache_implementation" in options else options
    assert torch.equal(new_tokens(model, inputs), new_tokens(model, inputs, **options))


@pytest.mark.core
def test_beams_are_the_same_with_and_without_cache_and_alone(composed):
    model, processor = composed
    inputs = batch_of(processor)
    beams = {"num_beams": 3, "length_penalty": 0.0}
    together = new_tokens(model, inputs, **beams)
    assert torch.equal(together, new_tokens(model, inputs, **beams, use_cache=False))
    for row in range(3):
        assert equal_up_to_end(together[row], new_tokens(model, batch_of(processor, [row]), **beams)[0])


@pytest.mark.core
def test_sampling_is_seedable_and_returns_several(composed):
    model, processor = composed
    inputs = batch_of(processor)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(new_tokens(model, inputs, do_sample=True, num_return_sequences=4, min_new_tokens=8))
    assert drawn[0].shape[0] == 12
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.core
def test_repetition_penalty_takes_placeholders_in_the_prompt(composed):
    model, processor = composed
    found = new_tokens(model, batch_of(processor), repetition_penalty=5.0)
    assert (found != model.config.image_token_id).all()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_images_are_encoded_once(composed, options):
    model, processor = composed
    seen = []
    handle = model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
    )
    try:
        new_tokens(model, batch_of(processor), **options)
    finally:
        handle.remove()
    assert seen == [3]


def test_patch_features_stand_for_pixels(composed):
    model, processor = composed
    inputs = batch_of(processor)
    expected = new_tokens(model, inputs)
    inputs["patch_features"] = model.get_patch_features(inputs.pop("pixel_values"))
    assert torch.equal(new_tokens(model, inputs), expected)


@pytest.mark.core
@needs_compile
@pytest.mark.parametrize(("bridge", "language"), [pair for pair in COMBINATIONS if pair[1] != "t5"])
def test_static_cache_compiles_in_one_graph(bridge, language):
    torch.compiler.reset()
    model, processor = tiny_model(bridge, language)
    inputs = batch_of(processor)
    expected = new_tokens(model, inputs)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        tokens = [out.logits[:, -1].argmax(dim=-1)]
        mask, cache, states = inputs["attention_mask"], cache_of(out), out.visual_states
        for _ in range(3):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = compiled(
                input_ids=tokens[-1][:, None], attention_mask=mask, **cache_argument(cache), visual_states=states,
                use_cache=True,
            )  # fmt: skip
            states = out.visual_states
            tokens.append(out.logits[:, -1].argmax(dim=-1))
    assert torch.stack(tokens, dim=1)[2].tolist() == expected[2, :4].tolist()


# ---------------------------------------------------------------------- encoders


@pytest.mark.core
@pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
@pytest.mark.parametrize("vision", VISION)
def test_any_encoder(bridge, vision):
    model, processor = tiny_model(bridge, vision=vision)
    inputs = processor(images=[tiny_image()], text=["<image>hm"], return_tensors="pt")
    patches = model.get_patch_features(inputs["pixel_values"])
    prefix = model.config.num_prefix_tokens if model.config.vision_feature_select_strategy == "full" else 0
    size = inputs["pixel_values"].shape[-1]
    assert patches.shape[1] == NUM_PATCHES[vision] + prefix
    visual_tokens = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output.shape[1]
    assert visual_tokens == processor.num_image_tokens(size, size) == model.config.num_image_tokens(size, size)
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("vision", "layer"),
    [*itertools.product(["clip", "siglip", "vit", "dinov2"], [0, -2, [-1, -2]]), ("resnet", -1)],
    ids=str,
)
def test_chosen_layers(vision, layer):
    """As all hidden states have them; encoders of transformers keep no others, where it can leave them out."""
    model, _ = tiny_model("mlp", vision=vision, vision_feature_layer=layer)
    pixel_values = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    layers = layer if isinstance(layer, list) else [layer]
    kept = []
    model.vision_model.register_forward_hook(lambda module, args, outputs: kept.append(outputs.hidden_states))
    with torch.no_grad():
        found = model.get_patch_features(pixel_values)
        every = model.vision_model(pixel_values, output_hidden_states=True).hidden_states
        asked = model.get_image_features(pixel_values, output_hidden_states=True).hidden_states
    chosen = [every[index] for index in layers]
    chosen = [states.flatten(2).transpose(1, 2) if states.ndim == 4 else states for states in chosen]
    expected = torch.cat([states[:, model.config.num_prefix_tokens :] for states in chosen], dim=-1)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    left = sum(states is not None for states in kept[0])
    assert left == (len(layers) if SELECTS_HIDDEN_STATES and vision != "resnet" else len(every))
    assert len(asked) == len(every) and all(map(torch.equal, asked, every))


@pytest.mark.core
@pytest.mark.parametrize("language", [name for name in LANGUAGE if name != "t5"])
@pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
def test_any_decoder(bridge, language):
    """Batch equals single for every language model: absolute and rotary positions, tied heads, projected embeddings."""
    model, processor = tiny_model(bridge, language)
    with torch.no_grad():
        together = model(**batch_of(processor)).logits
        alone = model(**batch_of(processor, [0])).logits[0]
    torch.testing.assert_close(together[0, -len(alone) :], alone, atol=ATOL, rtol=0)


# ---------------------------------------------------------------------- training


def loss_of(model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == model.config.image_token_id, -100)
    return model(**inputs, labels=labels).loss


@pytest.mark.core
@pytest.mark.parametrize("vision", ["clip", "resnet"])
@combinations
def test_one_step_leaves_frozen_tensors_bit_identical(bridge, language, vision):
    model, processor = tiny_model(bridge, language, vision)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # all: frozen ones have no gradient
    model.train()
    loss_of(model, batch_of(processor)).backward()
    without = [name for name, parameter in model.bridge.named_parameters() if parameter.grad is None]
    optimizer.step()
    assert not without
    for name, tensor in model.state_dict().items():
        if name.startswith("bridge."):
            continue
        assert torch.equal(tensor, before[name]), f"{name} has changed"
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == len(list(model.bridge.parameters()))


def test_frozen_parts_stay_in_eval_mode(composed):
    model, _ = composed
    model.train()
    assert model.bridge.training and not model.vision_model.training and not model.language_model.training
    model.freeze(language_model=False)
    assert model.language_model.training and all(p.requires_grad for p in model.language_model.parameters())
    model.freeze().eval()
    assert not any(p.requires_grad for p in model.language_model.parameters())


@pytest.mark.core
@combinations
def test_gradient_checkpointing_gives_equal_gradients(bridge, language):
    """And it does recompute, although the frozen language model is in eval mode."""
    model, processor = tiny_model(bridge, language)
    model.bridge.apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else None)
    inputs = batch_of(processor)
    gradients, runs = [], []
    layer = next(m for m in model.language_model.modules() if isinstance(m, GradientCheckpointingLayer))
    first = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear))
    first.register_forward_hook(lambda *_: runs.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model)
        model.train()
        model.zero_grad()
        runs.clear()
        loss_of(model, inputs).backward()
        gradients.append([parameter.grad.clone() for parameter in model.bridge.parameters()])
        assert len(runs) == 1 + checkpointing
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@combinations
def test_two_forwards_before_one_backward(bridge, language):
    """Nothing of a forward pass stays on the model."""
    model, processor = tiny_model(bridge, language)
    one, other = batch_of(processor, [0]), batch_of(processor, [2])
    separate = []
    for inputs in (one, other):
        model.zero_grad()
        loss_of(model, inputs).backward()
        separate.append([parameter.grad.clone() for parameter in model.bridge.parameters()])
    model.zero_grad()
    losses = [loss_of(model, inputs) for inputs in (one, other)]
    sum(losses).backward()
    for parameter, *parts in zip(model.bridge.parameters(), *separate):
        torch.testing.assert_close(parameter.grad, sum(parts), atol=1e-5, rtol=1e-4)


def test_loss_is_the_mean_over_labels(composed):
    model, processor = composed
    inputs = batch_of(processor, [0])
    if model.config.is_encoder_decoder:
        labels = torch.tensor([[7, 9, 2]])
        logits = model(**inputs, decoder_input_ids=torch.tensor([[0, 7, 9]])).logits
        expected = torch.nn.functional.cross_entropy(logits[0], labels[0])
    else:
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
        logits = model(**inputs).logits
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)


# ---------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@combinations
def test_half_precision_stays_near_single(bridge, language, dtype):
    model, processor = tiny_model(bridge, language)
    inputs = with_decoder_inputs(model, batch_of(processor))
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        found = model.to(dtype)(**inputs).logits[:, -1].float()
    assert found.isfinite().all()
    # bf16 keeps 8 bits: a few per cent of the logits' spread after two layers and a bridge
    assert (found - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_parts_of_different_dtypes(composed):
    model, processor = composed
    model = copy.deepcopy(model)
    model.language_model.to(torch.bfloat16)
    inputs = batch_of(processor)
    with torch.no_grad():
        assert model(**with_decoder_inputs(model, inputs)).logits.isfinite().all()


# ---------------------------------------------------------------------- errors


def test_wrong_number_of_placeholders_is_refused(composed):
    model, processor = composed
    inputs = with_decoder_inputs(model, batch_of(processor))
    inputs["pixel_values"] = inputs["pixel_values"][:-1]
    with pytest.raises(ValueError, match="image tokens in input_ids"):
        model(**inputs)


def test_placeholders_without_images_are_refused(composed):
    model, processor = composed
    inputs = with_decoder_inputs(model, batch_of(processor))
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="no images were given"):
        model(**inputs)


def test_pixel_values_of_another_shape_are_refused(composed):
    model, processor = composed
    inputs = with_decoder_inputs(model, batch_of(processor))
    inputs["pixel_values"] = inputs["pixel_values"][:, 0]
    with pytest.raises(ValueError, match="num_images, channels, height, width"):
        model(**inputs)


# ---------------------------------------------------------------------- Flamingo's own


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_a_fresh_flamingo_is_its_language_model_bit_for_bit(gate):
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_config(LANGUAGE["llama"]())
    model, processor = vlbridge.compose(
        VISION["clip"](), language, "perceiver", tokenizer=tiny_tokenizer(), gate_init=gate
    )
    inputs = batch_of(processor)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    positions = (text["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = model(**inputs).logits
        embeds = model.embed_tokens(text["input_ids"])
        theirs = language(inputs_embeds=embeds, attention_mask=text["attention_mask"], position_ids=positions).logits
    assert (ours.shape[-1], theirs.shape[-1]) == (102, 100)  # two new tokens, of which the language model knows nothing
    assert torch.equal(ours[..., :100], theirs)


@pytest.mark.core
def test_flamingo_text_sees_the_latest_image_only():
    model, processor = tiny_model("perceiver")
    inputs = processor(images=[tiny_image(0), tiny_image(1)], text=["ab<image>cd<image>ef"], return_tensors="pt")
    with torch.no_grad():
        whole = model(**inputs).logits[0]
        inputs["pixel_values"][0] += 0.5
        first_changed = model(**inputs).logits[0]
    assert torch.equal(whole[:2], first_changed[:2])  # text before any image sees none
    assert not torch.allclose(whole[2:5], first_changed[2:5], atol=1e-3)
    one_layer, _ = tiny_model("perceiver", cross_attention_every_n_layers=2)  # one block, in front of the last layer
    block = one_layer.bridge.cross_attention_layers[0]
    seen = []
    block.register_forward_pre_hook(lambda module, args: seen.append(args[3]))
    one_layer(**inputs)
    latents = one_layer.config.num_latents
    visible = [sorted({index // latents for index in row.nonzero()[:, 0].tolist()}) for row in seen[0][0]]
    assert visible[2:] == [[0]] * 3 + [[1]] * 3


def test_flamingo_beams_share_keys_and_values():
    model, processor = tiny_model("perceiver")
    sizes = set()
    model.bridge.cross_attention_layers[0].register_forward_pre_hook(
        lambda module, args: sizes.add((args[0].shape[0], args[1].shape[0]))
    )
    new_tokens(model, batch_of(processor), num_beams=4)
    assert sizes == {(12, 3)}


def test_two_flamingos_share_a_language_model():
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_config(LANGUAGE["llama"]())
    pair = []
    for latents in (6, 4):
        model, processor = vlbridge.compose(
            VISION["clip"](), language, "perceiver", tokenizer=tiny_tokenizer(), num_latents=latents
        )
        spread_weights(model.bridge)
        pair.append(model)
        inputs = batch_of(processor)
        if len(pair) == 1:
            expected = model(**inputs).logits[..., :100]
    torch.testing.assert_close(pair[0](**inputs).logits[..., :100], expected, atol=0, rtol=0)
    assert not torch.allclose(pair[1](**inputs).logits[..., :100], expected, atol=1e-2)


def test_flamingo_refuses_encoder_decoders():
    with pytest.raises(ValueError, match="encoder-decoder"):
        tiny_model("perceiver", "t5")


@pytest.mark.core
def test_special_tokens_live_in_the_bridge():
    model, processor = tiny_model("perceiver")
    assert model.get_input_embeddings().num_embeddings == 100  # the language model's table is as it was
    end = processor.tokenizer.convert_tokens_to_ids("<|endofchunk|>")
    assert end == 101 and end in model.generation_config.eos_token_id
    rows = model.bridge.token_rows
    embeds = model.embed_tokens(torch.tensor([[5, end]]))
    torch.testing.assert_close(embeds[0, 1], rows.input_rows[1])
    with torch.no_grad():
        out = model(**batch_of(processor, [0]), output_hidden_states=True)
    final = out.hidden_states[-1]
    torch.testing.assert_close(out.logits[..., end], final @ rows.output_rows[1], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        rows.output_rows[1] = final[0, -1] * 10
    found = new_tokens(model, batch_of(processor, [0]), max_new_tokens=4)
    assert found[0].tolist() == [end]


# ---------------------------------------------------------------------- a language model that outlives its bridges


@pytest.mark.parametrize("bridge", ["mlp", "qformer", "perceiver"])
def test_deleted_models_leave_nothing_on_a_shared_language_model(bridge):
    language = AutoModelForCausalLM.from_config(LANGUAGE["llama"]())
    gone = []
    for _ in range(3):
        model, _ = vlbridge.compose(
            VISION["clip"](), language, bridge, tokenizer=tiny_tokenizer(), **BRIDGE_OPTIONS[bridge]
        )
        gone.append(weakref.ref(model))
    last = copy.deepcopy(model)
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    for module in language.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
    # the copy has hooks of its own, which call the copy
    copied = [hook for module in last.language_model.modules() for hook in module._forward_pre_hooks.values()]
    assert all(hook._model() is last for hook in copied) and bool(copied) == (bridge == "perceiver")


def test_a_pickled_model_keeps_its_conditioning():
    model, processor = tiny_model("perceiver")
    spread_weights(model)
    inputs = batch_of(processor)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_checkpointing_gives_the_language_model_its_dropout_back():
    model, _ = tiny_model("perceiver", "opt")
    layer = model.language_model.model.decoder.layers[0]
    layer.dropout = 0.1
    checkpoint_activations(model)
    model.train()
    assert layer.dropout == 0.0 and layer.training  # frozen: it recomputes, but drops nothing
    model.train()
    model.freeze(language_model=False)
    assert layer.dropout == 0.1 and layer.training
    model.freeze()
    assert layer.dropout == 0.0
    model.eval()
    assert layer.dropout == 0.1


@torch.no_grad()
@combinations
def test_logits_to_keep(bridge, language):
    model, processor = tiny_model(bridge, language)
    spread_weights(model)
    inputs = with_decoder_inputs(model, batch_of(processor))
    logits = model(**inputs).logits
    for keep, expected in ((2, logits[:, -2:]), (torch.tensor([0, 2]), logits[:, [0, 2]])):
        torch.testing.assert_close(model(**inputs, logits_to_keep=keep).logits, expected, atol=ATOL, rtol=0)


@combinations
def test_chunked_prefill_with_images_is_refused(bridge, language):
    model, processor = tiny_model(bridge, language)
    with pytest.raises(ValueError, match="prefill_chunk_size can't be used with images"):
        model.generate(**batch_of(processor), max_new_tokens=2, prefill_chunk_size=4)


def test_the_prompts_states_are_let_go_while_decoding(monkeypatch):
    """A prompt of many shots has the keys and values of many images, which no written token sees."""
    model, processor = tiny_model("perceiver")
    seen, make = [], model.visual_states_for_generation
    monkeypatch.setattr(model, "visual_states_for_generation", lambda *args: seen.append(make(*args)) or seen[-1])
    model.generate(**batch_of(processor, [2]), max_new_tokens=3, min_new_tokens=3)
    (states,) = seen
    assert states.prompt is None
    one_image = model.config.num_latents
    assert states.decoding.key_states[0].shape[2] == one_image


@pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
def test_forward_names_all_that_the_processor_gives(bridge):
    """Or plain `Trainer` drops it from the batch."""
    model, processor = tiny_model(bridge)
    parameters = inspect.signature(model.forward).parameters
    assert set(model.image_arguments) <= set(parameters)
    assert set(batch_of(processor)) <= set(parameters)
    assert list(parameters)[-1] == "kwargs"
