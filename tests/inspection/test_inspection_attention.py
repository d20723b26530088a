"""Attention weights equal those computed by hand, for all families, and nothing stays on the model."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from tiny import COMBINATIONS, QFORMER, bert_like_tokenizer, relative_error, tiny_image, tiny_model

from vlbridge.compat import ALL_ATTENTION_FUNCTIONS, attention_of
from vlbridge.inspection.inspection_attention import (
    answer_attention,
    bridge_attention,
    patch_attention,
    recording,
)


DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # bf16: eight bits, and a sum of a few dozen products


def two_rows(processor, separator: str = "? a b"):
    """Two images in the first row, one in the second, which is padded."""
    images = [tiny_image(0), tiny_image(1), tiny_image(2)]
    texts = [f"<image>a<image>b{separator}", f"<image>c{separator}"]
    return processor(images=images, text=texts, padding=True, return_tensors="pt")


def of_dtype(bridge, language="llama", dtype=torch.float32, **options):
    model, processor = tiny_model(bridge, language, **options)
    return model.to(dtype), processor


def attended(query, key, num_heads, mask=None):
    """Attention weights, one query and one head after the other."""
    batch, tokens, width = query.shape
    size = width // num_heads
    weights = torch.zeros(batch, num_heads, tokens, key.shape[1])
    for sample in range(batch):
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            for token in range(tokens):
                scores = (key[sample, :, part] @ query[sample, token, part]) / math.sqrt(size)
                if mask is not None:
                    scores[~mask[sample, token]] = -torch.inf
                weights[sample, head, token] = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
    return weights


# ---------------------------------------------------------------------- bridges


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_qformer_attends_as_computed_by_hand(dtype):
    model, processor = of_dtype("qformer", dtype=dtype)
    inputs = two_rows(processor)
    found = bridge_attention(model, inputs)
    bridge = model.bridge.float()
    patches = bridge.vision_layer_norm(model.get_patch_features(inputs["pixel_values"]).float())
    states = bridge.qformer.layer_norm(bridge.qformer.query_tokens.expand(3, -1, -1))
    readers = [layer for layer in bridge.qformer.layers if layer.cross_attention is not None]
    assert found.shape == (len(readers), 3, 4, 5, 26) and found.dtype == torch.float32
    expected = []
    with torch.no_grad():
        for layer in bridge.qformer.layers:
            if layer.cross_attention is not None:
                queries, _, _ = layer.attention(states)
                cross = layer.cross_attention
                expected.append(attended(cross.query(queries), cross.key(patches), 4))
            states = layer(states, patches, 5)
    torch.testing.assert_close(found, torch.stack(expected), atol=DTYPES[dtype], rtol=0)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(found.shape[:-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_resampler_attends_as_computed_by_hand(dtype):
    model, processor = of_dtype("perceiver", dtype=dtype)
    inputs = two_rows(processor)
    found = bridge_attention(model, inputs)
    resampler = model.bridge.resampler.float()
    patches = model.get_patch_features(inputs["pixel_values"]).float()
    latents, expected = resampler.latents.expand(3, -1, -1), []
    with torch.no_grad():
        for layer in resampler.layers:
            attention = layer.attention
            normed = attention.norm_latents(latents)
            keys = torch.cat([attention.norm_media(patches), normed], dim=1)
            expected.append(attended(attention.query(normed), attention.key_value(keys)[..., :16], 2))
            latents = layer(latents, patches)
    torch.testing.assert_close(found, torch.stack(expected), atol=DTYPES[dtype], rtol=0)
    assert found.shape == (2, 3, 2, 6, 25 + 6)
    mean = patch_attention(found, 25)
    assert mean.shape == (3, 6, 25)
    torch.testing.assert_close(mean.sum(dim=-1), torch.ones(3, 6), atol=1e-5, rtol=0)


def test_frames_that_are_padding_get_no_attention():
    model, processor = tiny_model("perceiver", max_num_frames=3)
    frames = [tiny_image(3), tiny_image(4)]
    inputs = processor(images=[[frames], [tiny_image(5)]], text=["<image>a", "<image>b"], padding=True)
    found = bridge_attention(model, inputs)
    assert found.shape[-1] == 2 * 25 + 6
    assert float(found[:, 1, ..., 25:50].abs().max()) == 0 and float(found[:, 0, ..., 25:50].min()) > 0


@pytest.mark.parametrize("name", ["qformer", "perceiver"])
def test_the_weights_are_those_that_the_bridge_uses(name):
    """What the layers put out is what these weights and the values give."""
    model, processor = tiny_model(name)
    inputs = two_rows(processor)
    seen = {}

    def keep(module, args, kwargs, output):
        seen["patches"], seen["output"] = (args[0], output) if name == "perceiver" else (args[1], output[0])
        seen["states"] = args[1] if name == "perceiver" else args[0]

    if name == "perceiver":
        module = model.bridge.resampler.layers[-1].attention
    else:
        module = [layer for layer in model.bridge.qformer.layers if layer.cross_attention][-1].cross_attention
    handle = module.register_forward_hook(keep, with_kwargs=True)
    weights = bridge_attention(model, inputs)[-1]
    handle.remove()
    heads = weights.shape[1]
    with torch.no_grad():
        if name == "perceiver":
            keys = torch.cat([module.norm_media(seen["patches"]), module.norm_latents(seen["states"])], dim=1)
            values = module.key_value(keys).chunk(2, dim=-1)[1]
        else:
            values = module.value(seen["patches"])
        values = values.unflatten(-1, (heads, -1)).transpose(1, 2)
        mixed = (weights @ values).transpose(1, 2).flatten(2)
        if name == "perceiver":
            expected = module.out(mixed)
        else:
            expected = module.layer_norm(seen["states"] + module.dense(mixed))
    torch.testing.assert_close(seen["output"], expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- language models


def by_whole_pass(model, inputs, answers):
    """Attention from one pass over prompt and answer, all of it eager: the slow way."""
    model.set_attn_implementation("eager")
    ids = inputs["input_ids"]
    whole = {**inputs, "input_ids": torch.cat([ids, answers[:, :-1]], dim=1)}
    whole["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, answers.shape[1] - 1), value=1)
    with torch.no_grad():
        attentions = model(**whole, output_attentions=True, use_cache=False).attentions
    return torch.stack(attentions)[:, :, :, ids.shape[1] - 1 :].float()


def from_decoder(model, inputs, answers):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(model(**inputs, labels=answers, output_attentions=True).cross_attentions).float()


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bridge", "language"), [*COMBINATIONS, ("mlp", "gemma2"), ("perceiver", "mosaic_gpt")])
def test_words_attend_as_in_one_eager_pass(bridge, language, dtype):
    model, processor = of_dtype(bridge, language, dtype)
    inputs = two_rows(processor)
    answers = torch.tensor([[7, 30, 12], [9, 11, 40]])
    found = answer_attention(model, inputs, answers)
    expected = (from_decoder if language == "t5" else by_whole_pass)(model, inputs, answers)
    assert found.language.shape == expected.shape
    torch.testing.assert_close(found.language.float(), expected, atol=2 * DTYPES[dtype], rtol=0)
    assert found.num_images.tolist() == [2, 1]
    for row, image in ((0, 0), (0, 1), (1, 0)):
        to_patches = found.to_patches(row, image)
        assert to_patches.shape == (3, 26 if bridge == "qformer" else 25)  # the Q-Former reads CLS too
        # an answer attends to the last image alone
        seen = 0.0 if bridge == "perceiver" and (row, image) == (0, 0) else 1.0
        torch.testing.assert_close(to_patches.sum(dim=-1), torch.full((3,), seen), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="Row 1 has 1 images; there is no image 1"):
        found.to_image(1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_cross_attention_is_as_computed_by_hand(dtype):
    model, processor = of_dtype("perceiver", dtype=dtype)
    inputs, answers = two_rows(processor), torch.tensor([[7, 30], [9, 11]])
    found = answer_attention(model, inputs, answers)
    ids = torch.cat([inputs["input_ids"], answers[:, :1]], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        keys = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).visual_states.key_states
        states = model.embed_tokens(ids)  # what comes to the first layer
        layer = model.bridge.cross_attention_layers[0]
        query = layer.query(layer.layer_norm(states.to(layer.attn_gate.weight.dtype))).float()
    key = keys[0].float().transpose(1, 2).flatten(2)
    seen = torch.zeros(2, ids.shape[1], 12, dtype=torch.bool)
    seen[0, :, 6:] = True  # the last image before the answer alone
    seen[1, :, :6] = True
    expected = attended(query, key, 2, seen)[:, :, -2:]
    torch.testing.assert_close(found.gated[0], expected, atol=DTYPES[dtype], rtol=0)
    assert found.gated.shape == (2, 2, 2, 2, 12)
    shares = found.share_on_images(0)
    torch.testing.assert_close(shares, torch.tensor([[0.0, 1.0]] * 2), atol=1e-5, rtol=0)


def test_text_before_any_image_attends_to_nothing():
    model, processor = tiny_model("perceiver")
    inputs = processor(images=[tiny_image()], text="ab<image>c", return_tensors="pt")
    with torch.no_grad(), recording(model) as recorded:
        model(**inputs)
    weights = recorded["cross_attention_layers.0"][0]
    place = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero())
    sums = weights.sum(dim=-1)[0, 0]
    torch.testing.assert_close(sums, (torch.arange(len(sums)) >= place).float(), atol=1e-5, rtol=0)


def test_words_of_any_resolution_attend_to_their_own_image():
    model, processor = tiny_model("mlp", image_aspect_ratio="anyres")
    images = [tiny_image(0, (60, 30)), tiny_image(1, (30, 90))]
    inputs = processor(images=images, text=["<image><image>what?", "what?"], padding=True, return_tensors="pt")
    found = answer_attention(model, inputs, torch.tensor([[5, 6], [7, 8]]))
    lengths = [processor.num_image_tokens(30, 60), processor.num_image_tokens(90, 30)]
    assert lengths[0] != lengths[1]
    assert [found.to_image(0, image).shape[1] for image in (0, 1)] == lengths
    assert found.num_images.tolist() == [2, 0] and found.share_on_images(1).shape == (2, 0)
    shares = found.share_on_images(0)
    by_hand = found.language[:, 0].mean(dim=(0, 1))
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    torch.testing.assert_close(shares[:, 1], by_hand[:, places[lengths[0] :]].sum(dim=-1))


def test_shorter_answers_are_padding_and_do_not_change_others():
    model, processor = tiny_model("qformer")
    inputs = two_rows(processor)
    is_token = torch.tensor([[1, 1, 1], [1, 0, 0]])
    found = answer_attention(model, inputs, torch.tensor([[7, 30, 12], [9, 0, 0]]), is_token)
    assert found.to_image(1).shape == (1, 5)
    alone = processor(images=[tiny_image(2)], text=["<image>c? a b"], return_tensors="pt")
    single = answer_attention(model, alone, torch.tensor([[9]]))
    torch.testing.assert_close(found.to_image(1), single.to_image(), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- as it was before


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def implementations(model) -> list:
    return [attention_of(part.config) for part in model.modules() if hasattr(part, "config")]


@pytest.mark.core
@pytest.mark.parametrize(("bridge", "language"), COMBINATIONS)
def test_nothing_is_left_on_the_model(bridge, language):
    model, processor = tiny_model(bridge, language)
    model.train()
    inputs, answers = two_rows(processor), torch.tensor([[7, 30], [9, 11]])
    modes = [module.training for module in model.modules()]
    before = hooks_of(model), implementations(model), set(vars(model))
    assert "sdpa" in before[1]
    found = answer_attention(model, inputs, answers)
    kept = weakref.ref(found.language)
    assert (hooks_of(model), implementations(model), set(vars(model))) == before
    assert [module.training for module in model.modules()] == modes and any(modes)
    del found
    gc.collect()
    assert kept() is None


def test_a_failure_leaves_nothing_either(monkeypatch):
    model, processor = tiny_model("perceiver")
    before = hooks_of(model), implementations(model)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer_attention(model, two_rows(processor), torch.tensor([[7], [9]]))
    monkeypatch.undo()
    assert (hooks_of(model), implementations(model)) == before


def test_compiled_bridges_are_recorded_and_stay_compiled():
    model, processor = tiny_model("qformer")
    inputs = two_rows(processor)
    expected = bridge_attention(model, inputs)
    runs = []

    def backend(graph, examples):  # as torch's own "eager", and counts
        return lambda *args: runs.append(1) or graph(*args)

    model.bridge.language_projection.compile(backend=backend)
    patches = model.get_patch_features(inputs["pixel_values"])
    with torch.no_grad():
        tokens = model.bridge(patches)
        compiled = len(runs)
        found = bridge_attention(model, inputs)
        assert compiled > 0 and len(runs) == compiled  # recorded without its compiled code
        again = model.bridge(patches)
    assert len(runs) > compiled
    torch.testing.assert_close(again, tokens, atol=0, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_adapters_count():
    peft = pytest.importorskip("peft")
    from vlbridge.training import lora_config

    model, processor = tiny_model("qformer")
    inputs = two_rows(processor)
    before = bridge_attention(model, inputs)
    tuned = peft.get_peft_model(model, lora_config(model, bridge="adapter", r=2))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    found = bridge_attention(tuned, inputs)
    assert relative_error(found, before) > 1e-2
    with tuned.disable_adapter():
        torch.testing.assert_close(bridge_attention(tuned, inputs), before)


# ---------------------------------------------------------------------- refusals


def test_refusals_say_what_is_wrong():
    model, processor = tiny_model("mlp")
    inputs = processor(images=[tiny_image()], text="<image>a?", return_tensors="pt")
    with pytest.raises(ValueError, match="'mlp_llava' model has no attention"):
        bridge_attention(model, inputs)
    with pytest.raises(ValueError, match="There are no images in inputs"):
        bridge_attention(model, {"input_ids": inputs["input_ids"]})
    with pytest.raises(ValueError, match=r"answer_ids has shape \(1, 0\); expected \(1, answer_tokens\)"):
        answer_attention(model, inputs, torch.zeros(1, 0, dtype=torch.long))
    ends = processor(images=[tiny_image()], text="a<image>", return_tensors="pt")
    with pytest.raises(ValueError, match="A prompt ends with an image"):
        answer_attention(model, ends, torch.tensor([[3]]))


def test_a_qformer_that_reads_the_question_looks_elsewhere_for_another_one():
    text = {**QFORMER, "use_text": True, "vocab_size": 50, "max_position_embeddings": 40}
    model, plain = tiny_model("qformer", qformer_config=text)
    processor = type(plain).from_config(
        model.config, plain.image_processor, plain.tokenizer, qformer_tokenizer=bert_like_tokenizer()
    )
    picture = tiny_image(0)
    inputs = processor(images=[picture, picture], text=["<image>w1 w2", "<image>w7"], padding=True, return_tensors="pt")
    found = bridge_attention(model, inputs)
    assert found.shape == (2, 2, 4, 5, 26)  # patches alone are keys: the question is read by self-attention
    assert relative_error(found[:, 0], found[:, 1]) > 1e-2
    again = answer_attention(model, inputs, torch.tensor([[5], [6]]))
    torch.testing.assert_close(again.bridge, found, atol=1e-5, rtol=0)
