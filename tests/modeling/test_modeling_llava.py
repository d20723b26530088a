"""MLP-LLaVA: projectors, pooling and any resolution against slow computations and transformers' LLaVA; two stages."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import LANGUAGE, VISION, spread_weights, tiny_image, tiny_model, tiny_tokenizer
from transformers import (
    AutoModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

import vlbridge
from vlbridge.modeling.modeling_llava import pool_patches


ATOL = 1e-4  # fp32, two layers; padding changes the order of summation

TEXTS = ["<image>what is it?", "no image here", "<image>one <image>and another, in a longer question"]
SIZES = [(40, 33), (31, 90), (200, 7)]  # width, height: odd and extreme ones; cut into 4, 3 and 3 tiles
ANYRES = {"image_aspect_ratio": "anyres"}
COMBINATIONS = [
    (ANYRES, "llama"),
    (ANYRES, "opt"),
    (ANYRES, "t5"),
    ({**ANYRES, "patch_merge_type": "flat", "vision_feature_select_strategy": "full"}, "llama"),
    ({**ANYRES, "patch_merge_type": "spatial", "pooling": "average", "pooling_factor": 2}, "llama"),
    ({"pooling": "pixel_shuffle", "pooling_factor": 2, "vision_feature_layer": [-1, -2]}, "llama"),
    ({**ANYRES, "global_context": True}, "llama"),
]


@pytest.fixture(scope="module", params=COMBINATIONS, ids=str)
def composed(request):
    options, language = request.param
    return tiny_model("mlp", language, **options)


def batch_of(processor, rows=range(3)):
    """Inputs of some of `TEXTS`, padded on the left; row 0 has picture 0, row 2 has pictures 1 and 2."""
    images = [tiny_image(number, SIZES[number]) for row in rows for number in ([0], [], [1, 2])[row]]
    return processor(images=images or None, text=[TEXTS[row] for row in rows], return_tensors="pt", padding=True)


def with_decoder_inputs(model, inputs):
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 7, 9]]).repeat(len(inputs["input_ids"]), 1)
    return inputs


def new_tokens(model, inputs, **kwargs):
    ids = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **kwargs)
    return ids if model.config.is_encoder_decoder else ids[:, inputs["input_ids"].shape[1] :]


# ---------------------------------------------------------------------- batch equals single


def test_batch_equals_single(composed):
    model, processor = composed
    with torch.no_grad():
        together = model(**with_decoder_inputs(model, batch_of(processor))).logits
        for row in range(3):
            alone = model(**with_decoder_inputs(model, batch_of(processor, [row]))).logits[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, atol=ATOL, rtol=0)


@pytest.mark.core
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_of_a_batch_equals_single(composed, options):
    model, processor = composed
    together = new_tokens(model, batch_of(processor), **options)
    assert torch.equal(together, new_tokens(model, batch_of(processor), **options, use_cache=False))
    for row in range(3):
        assert torch.equal(together[row : row + 1], new_tokens(model, batch_of(processor, [row]), **options))


def test_every_picture_matters_to_its_own_row(composed):
    model, processor = composed
    inputs = with_decoder_inputs(model, batch_of(processor))
    first = 1
    if "image_sizes" in inputs:
        first = processor._get_num_multimodal_tokens([SIZES[0][::-1]]).num_image_patches[0]
    with torch.no_grad():
        before = model(**inputs).logits[:, -1]
        for tile in range(len(inputs["pixel_values"])):
            pixel_values = inputs["pixel_values"].clone()
            pixel_values[tile] += torch.linspace(-2, 2, pixel_values[tile].numel()).view_as(pixel_values[tile])
            after = model(**{**inputs, "pixel_values": pixel_values}).logits[:, -1]
            changed = (after - before).abs().amax(dim=-1) > 10 * ATOL
            assert changed.tolist() == [tile < first, False, tile >= first]


def test_patch_features_stand_for_pixels(composed):
    model, processor = composed
    inputs = with_decoder_inputs(model, batch_of(processor))
    with torch.no_grad():
        expected = model(**inputs).logits
        patch_features = model.get_patch_features(inputs.pop("pixel_values"))
        torch.testing.assert_close(model(**inputs, patch_features=patch_features).logits, expected, atol=0, rtol=0)


@pytest.mark.core
def test_saving_and_half_precision(composed, tmp_path):
    model, processor = composed
    inputs = with_decoder_inputs(model, batch_of(processor))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.image_grid_pinpoints == model.config.image_grid_pinpoints
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(again(**inputs).logits, expected, atol=0, rtol=0)
        for dtype in (torch.bfloat16, torch.float16):
            found = again.to(dtype)(**inputs).logits[:, -1].float()
            # bf16 keeps 8 bits: a few per cent of the logits' spread after two layers and a bridge
            assert (found - expected[:, -1]).abs().max() < 0.1 * expected.std()
            again.float()


# ---------------------------------------------------------------------- any resolution, the slow way


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_tiles_are_put_together_feature_by_feature(merge):
    """200 x 7 pixels become 1 x 3 tiles of 5 x 5 features, whose middle row shows the picture."""
    model, processor = tiny_model("mlp", **ANYRES, patch_merge_type=merge)
    inputs = processor(images=[tiny_image(2, (200, 7))], text=["<image>"], return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 4
    with torch.no_grad():
        base, *tiles = (model.bridge.project(patches) for patches in model.get_patch_features(inputs["pixel_values"]))
        found = model.get_image_features(inputs["pixel_values"], image_sizes=inputs["image_sizes"]).pooler_output
    expected = list(base)
    if merge == "flat":
        expected += [feature for tile in tiles for feature in tile]
    else:
        for row in [2] if merge == "spatial_unpad" else range(5):
            expected += [tile[row * 5 + column] for tile in tiles for column in range(5)]
            if merge == "spatial_unpad":
                expected.append(model.bridge.image_newline)
    assert len(found) == 1
    torch.testing.assert_close(found[0], torch.stack(expected), atol=1e-6, rtol=1e-5)


def test_image_newline_is_there_only_where_lines_end():
    for merge, there in (("flat", False), ("spatial", False), ("spatial_unpad", True)):
        model, _ = tiny_model("mlp", **ANYRES, patch_merge_type=merge)
        assert ("bridge.image_newline" in model.state_dict()) == there
    assert "bridge.image_newline" not in tiny_model("mlp")[0].state_dict()
    torch.manual_seed(0)
    model, _ = vlbridge.compose(VISION["clip"](), LANGUAGE["llama"](), "mlp", tokenizer=tiny_tokenizer(), **ANYRES)
    assert model.bridge.image_newline.shape == (32,)
    assert 0.5 < model.bridge.image_newline.std() * 32**0.5 < 1.5


def test_sizes_that_do_not_belong_to_the_tiles_are_refused():
    model, processor = tiny_model("mlp", **ANYRES)
    inputs = batch_of(processor)
    with pytest.raises(ValueError, match=r"asks for \[3, 3\] tiles, 6 together, but there are 13"):
        model(**{**inputs, "image_sizes": torch.tensor([[30, 60], [30, 60]])})
    inputs.pop("image_sizes")
    with pytest.raises(ValueError, match="need image_sizes"):
        model(**inputs)


# ---------------------------------------------------------------------- projectors and pooling


@pytest.mark.parametrize("factor", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("rows, columns", [(5, 5), (4, 7), (1, 3)])
def test_pooling_against_loops(rows, columns, factor):
    torch.manual_seed(0)
    patches = torch.randn(2, rows * columns, 3)
    average, shuffled = (pool_patches(patches, rows, columns, how, factor) for how in ("average", "pixel_shuffle"))
    grid = patches.view(2, rows, columns, 3)
    zero, averages, shuffles = torch.zeros(2, 3), [], []
    for top in range(0, rows, factor):
        for left in range(0, columns, factor):
            places = [(top + down, left + right) for down in range(factor) for right in range(factor)]
            there = [grid[:, y, x] if y < rows and x < columns else None for y, x in places]
            averages.append(torch.stack([each for each in there if each is not None]).mean(dim=0))
            shuffles.append(torch.cat([zero if each is None else each for each in there], dim=-1))
    torch.testing.assert_close(average, torch.stack(averages, dim=1))
    torch.testing.assert_close(shuffled, torch.stack(shuffles, dim=1), atol=0, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("projector", "depth"), [("linear", 1), ("mlp2x_gelu", 2), ("mlp4x_gelu", 4)])
def test_projectors(projector, depth, bias):
    model, processor = tiny_model("mlp", projector_type=projector, projector_bias=bias, projector_hidden_size=24)
    names = [f"linear_{index}.{name}" for index in range(1, depth + 1) for name in ("weight", "bias")[: 1 + bias]]
    assert [name for name, _ in model.bridge.named_parameters()] == names
    patches = torch.randn(2, 25, 32)
    hidden = patches
    for index in range(1, depth + 1):
        layer = getattr(model.bridge, f"linear_{index}")
        hidden = hidden @ layer.weight.T + (layer.bias if bias else 0)
        hidden = hidden if index == depth else hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(model.bridge(patches), hidden)


@pytest.mark.core
def test_global_context_against_a_loop():
    model, _ = tiny_model("mlp", global_context=True)
    first, second = model.bridge.linear_1, model.bridge.linear_2
    patches = torch.randn(2, 25, 32)
    expected = []
    for image in patches:
        context = image.sum(dim=0) / 25
        for patch in image:
            hidden = first.weight[:, :32] @ patch + first.weight[:, 32:] @ context + first.bias
            expected.append(second(torch.nn.functional.gelu(hidden)))
    tokens = model.bridge(patches)
    torch.testing.assert_close(tokens, torch.stack(expected).unflatten(0, (2, 25)))
    patches[0, 3] += 1  # seen by all tokens of its image, and by no others
    changed = (model.bridge(patches) != tokens).any(dim=-1)
    assert changed[0].all() and not changed[1].any()
    with pytest.raises(ValueError, match="global_context doubles the features' width"):
        tiny_model("mlp", projector_type="identity", global_context=True)


def test_identity_takes_features_as_they_are():
    model, processor = tiny_model("mlp", projector_type="identity")
    inputs = batch_of(processor)
    assert not list(model.bridge.parameters())
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert torch.equal(features, model.get_patch_features(inputs["pixel_values"]))
    assert new_tokens(model, inputs).shape == (3, 6)
    with pytest.raises(ValueError, match="width, 32, but the vision encoder's have 64"):
        tiny_model("mlp", projector_type="identity", vision_feature_layer=[-1, -2])


def test_several_layers_with_cls_and_pooling():
    model, processor = tiny_model("mlp", vision_feature_layer=[-2, 1], vision_feature_select_strategy="full")
    pixel_values = batch_of(processor)["pixel_values"]
    hidden = model.vision_model(pixel_values, output_hidden_states=True).hidden_states
    assert torch.equal(model.get_patch_features(pixel_values), torch.cat([hidden[-2], hidden[1]], dim=-1))
    model, _ = tiny_model("mlp", vision_feature_layer=[-2, 1], pooling="average", pooling_factor=5)
    mean = torch.cat([hidden[-2], hidden[1]], dim=-1)[:, 1:].mean(dim=1, keepdim=True)
    torch.testing.assert_close(model.get_patch_features(pixel_values), mean)


def test_pooling_of_grids_that_are_no_squares():
    model, _ = tiny_model("mlp", vision="resnet", pooling="pixel_shuffle", pooling_factor=3)
    features = model.get_image_features(torch.randn(2, 3, 64, 100)).pooler_output
    assert features.shape[:2] == (2, 3 * 5)  # of 8 x 13
    assert model.config.num_image_tokens(64, 100) == 15


# ---------------------------------------------------------------------- transformers' LLaVA

IMAGE_TOKEN = 100  # behind the tiny tokenizer's own; transformers wants it in the language model's table


def transformers_pair(next_generation, layer=-2, strategy="default", bias=True):
    """transformers' model with random weights, and ours with the same ones."""
    text = LANGUAGE["llama"]()
    text.vocab_size = IMAGE_TOKEN + 4
    options = {
        "vision_config": VISION["clip"](), "text_config": text, "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": layer, "vision_feature_select_strategy": strategy, "multimodal_projector_bias": bias,
    }  # fmt: skip
    torch.manual_seed(0)
    ours = {**ANYRES} if next_generation else {"image_aspect_ratio": "pad"}
    if next_generation:
        pinpoints = [[30, 60], [60, 30], [60, 60], [90, 30], [30, 90]]
        theirs = LlavaNextForConditionalGeneration(LlavaNextConfig(**options, image_grid_pinpoints=pinpoints))
    else:
        theirs = LlavaForConditionalGeneration(LlavaConfig(**options, image_seq_length=25))
    theirs.eval()
    spread_weights(theirs)
    language = LlamaForCausalLM(text)
    language.model.load_state_dict(theirs.model.language_model.state_dict())
    language.lm_head.load_state_dict(theirs.lm_head.state_dict())
    model, processor = vlbridge.compose(
        theirs.model.vision_tower, language, "mlp", tokenizer=tiny_tokenizer(), vision_feature_layer=layer,
        vision_feature_select_strategy={"default": "patch", "full": "full"}[strategy], projector_bias=bias, **ours,
    )  # fmt: skip
    assert model.config.image_token_id == IMAGE_TOKEN
    weights = theirs.model.multi_modal_projector.state_dict()
    if next_generation:
        weights["image_newline"] = theirs.model.image_newline
    model.bridge.load_state_dict(weights)
    return theirs, model, processor


def their_inputs(theirs, inputs):
    """Ours, with the tiles of every picture in a row of their own, as LlavaNext's image processor has them."""
    inputs = dict(inputs)
    if "image_sizes" in inputs:
        counts = [
            image_size_to_num_patches(size, theirs.config.image_grid_pinpoints, 30) for size in inputs["image_sizes"]
        ]
        inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(inputs["pixel_values"].split(counts), batch_first=True)
    return inputs


@pytest.mark.core
@pytest.mark.parametrize("rows", [[0], [2], [0, 1, 2], [2, 0]], ids=["one", "two images", "ragged", "unequal"])
@pytest.mark.parametrize("next_generation", [False, True], ids=["llava", "llava-next"])
def test_transformers_llava_gives_the_same(next_generation, rows):
    theirs, model, processor = transformers_pair(next_generation)
    inputs = batch_of(processor, rows)
    other = their_inputs(theirs, inputs)
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[seen], theirs(**other).logits[seen], atol=ATOL, rtol=0)
    greedy, beams = {}, {"num_beams": 3}
    # transformers before 5.19 gives the beams of a row with several images [A, A, B, B] instead of [A, B, A, B]
    theirs_are_wrong = Version(transformers.__version__) < Version("5.19") and rows != [0]
    for options in (greedy,) if theirs_are_wrong else (greedy, beams):
        assert torch.equal(new_tokens(model, inputs, **options), new_tokens(theirs, other, **options))


@pytest.mark.core
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (61, 59), (30, 30), (90, 30), (999, 1001), (41, 83)])
def test_transformers_llava_next_gives_the_same_for_odd_sizes(size):
    theirs, model, processor = transformers_pair(True)
    inputs = processor(images=[tiny_image(0, size)], text=["<image>what?"], return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**their_inputs(theirs, inputs)).logits
        torch.testing.assert_close(model(**inputs).logits, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("options", [{"layer": [-2, -1]}, {"strategy": "full"}, {"bias": False}], ids=str)
def test_transformers_llava_with_other_settings(options):
    theirs, model, processor = transformers_pair(False, **options)
    inputs = batch_of(processor)
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[seen], theirs(**inputs).logits[seen], atol=ATOL, rtol=0)


def test_where_transformers_rounds_and_the_official_code_truncates():
    """A picture 490 wide and 343 high fills exactly 7 of 10 rows, but 343 * (10 / 490) is less than 7 in floats.

    The official code, and ours, truncates it to 6 and cuts off 2 rows above and below; transformers rounds first and
    cuts off 1. Its own processor counts as its model does; with our count its model raises an error.
    """
    assert int(343 * (10 / 490)) == 6
    theirs, model, processor = transformers_pair(True)
    inputs = processor(images=[tiny_image(0, (490, 343))], text=["<image>what?"], return_tensors="pt")
    other = their_inputs(theirs, inputs)
    with torch.no_grad():
        assert len(model(**inputs).image_hidden_states[0]) == 25 + 6 * 11
        features = theirs.model.get_image_features(other["pixel_values"], other["image_sizes"]).pooler_output
        assert len(features[0]) == 25 + 8 * 11
        with pytest.raises(ValueError, match="tokens"):
            theirs(**other)


# ---------------------------------------------------------------------- stages


def lora(model):
    from peft import LoraConfig, get_peft_model

    targets = r"language_model\..*\.(q_proj|v_proj)"  # CLIP's have the same names, and are never trained
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=["bridge"]))


@pytest.mark.parametrize("stage", ["projector", "projector and language model", "projector and LoRA"])
def test_stages_change_what_they_should_and_nothing_else(stage, tmp_path):
    """Source: LLaVA, section 4.2: the projector alone, then the projector and the language model."""
    model, processor = tiny_model("mlp", **ANYRES, conversation="plain" if stage == "projector" else "vicuna_v1")
    rows = []
    for number, size in enumerate(SIZES):
        messages = [
            {"role": "user", "content": [{"type": "image", "image": tiny_image(number, size)}]},
            {"role": "assistant", "content": f"picture {number}"},
        ]
        out = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        labels = out["input_ids"].masked_fill(torch.as_tensor(out.pop("assistant_masks")) == 0, -100)
        rows.append({**out, "labels": labels})
    if stage == "projector and language model":
        model.freeze(language_model=False)
    trained = lora(model) if stage == "projector and LoRA" else model
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, max_steps=3, learning_rate=1e-2, report_to=[], save_strategy="no",
        remove_unused_columns=False, weight_decay=0.0, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(trained, arguments, train_dataset=rows, data_collator=lambda batch: batch[0]).train()
    for name, tensor in trained.state_dict().items():
        should = {
            "projector": name.startswith("bridge."),
            "projector and language model": name.startswith(("bridge.", "language_model.")),
            "projector and LoRA": "lora_" in name or ".bridge.modules_to_save." in name,
        }[stage]
        assert torch.equal(tensor, before[name]) != should, name
    wanted = {"projector": "bridge.image_newline", "projector and LoRA": "lora_B.default.weight"}.get(stage, "lm_head")
    assert any(wanted in name for name in before)
