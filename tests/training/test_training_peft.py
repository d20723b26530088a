"""Adapters: which layers the presets reach, and what becomes of them (trained, saved, loaded, merged, pushed)."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from tiny import (
    BRIDGE_OPTIONS,
    COMBINATIONS,
    LANGUAGE,
    VISION,
    clip_image_processor,
    dequantised_weights,
    llama_in_whole_blocks,
    needs_peft,
    relative_error,
    spread_weights,
    tiny_image,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, MambaConfig

import vlbridge
from vlbridge.modeling import modeling_freezing
from vlbridge.training.training_peft import ia3_config, language_targets, layer_kind, lora_config


OLD_ADAPTERS = Version(transformers.__version__) < Version("5.18")
families = pytest.mark.parametrize("family", vlbridge.FAMILIES)
counted_families = pytest.mark.parametrize("family", ["mlp", "qformer", "perceiver"])  # whose numbers are below
combinations = pytest.mark.parametrize(("family", "language"), COMBINATIONS)

RANK = 2
METHODS = {
    "lora": lambda model, **options: lora_config(model, r=RANK, **options),
    "dora": lambda model, **options: lora_config(model, r=RANK, use_dora=True, **options),
    "ia3": lambda model, **options: ia3_config(model, **{"language": "all", **options}),
}
methods = pytest.mark.parametrize("method", METHODS)


def inputs_of(model, processor, labels=True):
    texts = ["<image>what", "hm, <image>"]
    inputs = processor(images=[tiny_image(0), tiny_image(1)], text=texts, return_tensors="pt", padding=True)
    if labels:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
        if model.config.is_encoder_decoder:
            inputs["labels"] = torch.tensor([[5, 6, 2], [7, 2, -100]])
    return inputs


@torch.no_grad()
def logits_of(model, processor):
    return model(**inputs_of(model, processor)).logits


def tune(model, config, processor, steps=2, name="default"):
    """A `PeftModel` after a few steps, in eval mode."""
    from peft import PeftModel, get_peft_model

    tuned = get_peft_model(model, config, name) if not isinstance(model, PeftModel) else model
    train(tuned, processor, steps)
    return tuned


def train(tuned, processor, steps=2):
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    tuned.train()
    for _ in range(steps):
        optimizer.zero_grad()
        tuned(**inputs_of(tuned, processor)).loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
    tuned.eval()


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def adapted(model):
    """Names of the layers that an adapter was put around."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize("language", LANGUAGE)
def test_layers_of_the_language_model(language):
    """Against PEFT's own tables of what to adapt, and the layers counted by hand."""
    from peft.utils import constants

    model, _ = tiny_model("mlp", language)
    model_type = model.config.text_config.model_type
    attention, mlp = (set(language_targets(model, layers)) for layers in ("attention", "mlp"))
    assert attention and mlp and not attention & mlp
    assert attention | mlp == set(language_targets(model, "all"))
    linear = {
        f"language_model.{name}"
        for name, module in model.language_model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    }
    heads = {name for name in linear if re.search(r"lm_head|embed_out|project_(in|out)", name)}
    assert attention | mlp == linear - heads
    known = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, [])
    assert set(known) <= {name.rpartition(".")[2] for name in attention}
    config = ia3_config(model, bridge=None)
    scaled = {name for name in linear if re.fullmatch(config.feedforward_modules, name)}
    known = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model_type, [])
    assert all(name.endswith(tuple(known)) for name in scaled) if known else scaled
    assert {layer_kind(name) for name in scaled} == {"mlp"}


@methods
@combinations
def test_adapters_reach_the_language_model_and_nothing_else(family, language, method):
    """The encoder has layers of the same names (`q_proj`)."""
    from peft import get_peft_model

    model, _ = tiny_model(family, language)
    tuned = get_peft_model(model, METHODS[method](model, language="all", bridge=None))
    found = adapted(tuned)
    assert found <= set(language_targets(model, "all"))
    if method != "ia3":
        assert found == set(language_targets(model, "all"))
    trainable = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trainable and all(".language_model." in name and ("lora_" in name or "ia3_l" in name) for name in trainable)


def numbers(family):
    """Trainable parameters of every preset on a tiny LLaMA, counted by hand.

    Hidden size 32, 2 layers, 4 heads of 8, 2 of them for keys and values, feed-forward 48.
    """

    def lora(*shapes):
        return sum(RANK * (width_in + width_out) for width_in, width_out in shapes)

    attention = 2 * lora((32, 32), (32, 16), (32, 16), (32, 32))
    mlp = 2 * lora((32, 48), (32, 48), (48, 32))
    # query, key, value, dense of the three blocks' self-attention and of the two that read the image; the feed-forwards
    # that queries go through; the projection
    qformer = lora(*[(32, 32)] * 4 * (3 + 2), *[(48, 32)] * 3, (32, 32))
    # resampler of width 32 and two blocks of cross-attention: inner width 16, feed-forward four times as wide
    block = lora((32, 16), (32, 32), (16, 32), (32, 128), (128, 32))
    bridge = {"mlp": lora((32, 32), (32, 32)), "qformer": qformer, "perceiver": 4 * block}[family]
    whole = {"mlp": 0, "qformer": 0, "perceiver": 2 * 2 * 1 + 2 * 2 * 32}[
        family
    ]  # gates; rows of two tokens, in and out
    return {"attention": attention, "mlp": mlp, "all": attention + mlp, None: 0}, bridge + whole


@counted_families
def test_numbers_of_trainable_parameters(family):
    from peft import get_peft_model

    language, bridge = numbers(family)
    for layers in ("attention", "mlp", "all", None):
        for training in ("full", "adapter", None):
            model, _ = tiny_model(family)
            if layers is None and training in ("full", None):
                with pytest.raises(ValueError, match="nothing to adapt"):
                    lora_config(model, layers, training, r=RANK)
                continue
            full = sum(parameter.numel() for parameter in model.bridge.parameters())
            expected = language[layers] + {"full": full, "adapter": bridge, None: 0}[training]
            tuned = get_peft_model(model, lora_config(model, layers, training, r=RANK))
            assert tuned.get_nb_trainable_parameters()[0] == expected, (layers, training)


@counted_families
def test_numbers_of_ia3_and_dora(family):
    from peft import get_peft_model

    model, _ = tiny_model(family)
    tuned = get_peft_model(model, ia3_config(model, bridge=None))
    assert tuned.get_nb_trainable_parameters()[0] == 2 * (16 + 16 + 48)  # keys, values; the input of down_proj
    model, _ = tiny_model(family)
    tuned = get_peft_model(model, ia3_config(model, language=None, bridge="adapter"))
    block = 32 + 128  # key_value; the input of linear_out
    expected = {"mlp": 32 + 32, "qformer": 5 * (32 + 32) + 3 * 48, "perceiver": 4 * block + 2 * 2 + 2 * 2 * 32}
    assert tuned.get_nb_trainable_parameters()[0] == expected[family]
    model, _ = tiny_model(family)
    tuned = get_peft_model(model, lora_config(model, "attention", None, r=RANK, use_dora=True))
    assert tuned.get_nb_trainable_parameters()[0] == numbers(family)[0]["attention"] + 2 * (32 + 16 + 16 + 32)


def test_names_that_match_nothing_are_an_error():
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=100)
    model, _ = vlbridge.compose(VISION["clip"](), config, "mlp", tokenizer=tiny_tokenizer())
    with pytest.raises(
        ValueError, match=r"finds no linear layers in MambaForCausalLM; it has .*layers.N.mixer.in_proj"
    ):
        lora_config(model)
    found = lora_config(model, language=None, target_modules=r"language_model\..*\.in_proj")
    assert re.fullmatch(found.target_modules, "language_model.backbone.layers.1.mixer.in_proj")
    with pytest.raises(TypeError, match="expected a regular expression for full names"):
        lora_config(model, language=None, target_modules=["q_proj"])
    identity, _ = tiny_model("mlp", projector_type="identity")
    with pytest.raises(ValueError, match="bridge='adapter' finds no linear layers in MLPBridge"):
        lora_config(identity, bridge="adapter")
    with pytest.raises(ValueError, match="language is 'mpl'; expected 'attention', 'mlp', 'all' or None"):
        lora_config(identity, "mpl")
    with pytest.raises(ValueError, match="bridge is 'half'"):
        lora_config(identity, bridge="half")
    with pytest.raises(TypeError, match="model is a Linear"):
        lora_config(torch.nn.Linear(1, 1))


def test_routers_are_left_alone():
    assert layer_kind("language_model.model.layers.0.mlp.gate") is None
    assert layer_kind("language_model.model.layers.0.mlp.gate_proj") == "mlp"
    assert layer_kind("language_model.model.layers.0.mlp.shared_expert.up_proj") == "mlp"
    assert layer_kind("language_model.lm_head") is None


# ---------------------------------------------------------------------- train, save, load, merge


@pytest.mark.core
@pytest.mark.parametrize("bridge", ["full", "adapter", None])
@methods
@families
def test_round_trip(family, method, bridge, tmp_path):
    """Trained, saved and loaded again by PEFT and by transformers; merged, unmerged, and merged for good."""
    from peft import PeftModel

    model, processor = tiny_model(family)
    without_dropout(model)
    before = logits_of(model, processor)
    tuned = tune(model, METHODS[method](model, bridge=bridge), processor)
    after = logits_of(tuned, processor)
    assert not torch.allclose(after, before, atol=1e-3)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(family)[0], tmp_path).eval()
    torch.testing.assert_close(logits_of(again, processor), after, atol=0, rtol=0)
    with again.disable_adapter():
        torch.testing.assert_close(logits_of(again, processor), before, atol=0, rtol=0)
    again.merge_adapter()
    torch.testing.assert_close(logits_of(again, processor), after, atol=1e-4, rtol=1e-4)
    again.unmerge_adapter()
    torch.testing.assert_close(logits_of(again, processor), after, atol=1e-4, rtol=1e-4)
    whole = tuned.peft_config["default"].modules_to_save
    if method == "ia3" and any("bridge" in name and "gate" not in name for name in whole or []):
        return  # PEFT 0.21 replaces whole modules by their `weight` there
    merged = again.merge_and_unload()
    assert merged.state_dict().keys() == tiny_model(family)[0].state_dict().keys()
    torch.testing.assert_close(logits_of(merged, processor), after, atol=1e-4, rtol=1e-4)


@needs_peft
@pytest.mark.parametrize("bridge", ["full", "adapter", None])
@methods
@families
def test_transformers_loads_what_peft_saved(family, method, bridge, tmp_path):
    model, processor = tiny_model(family)
    without_dropout(model)
    tuned = tune(model, METHODS[method](model, bridge=bridge), processor)
    after = logits_of(tuned, processor)
    tuned.save_pretrained(tmp_path)
    fresh = tiny_model(family)[0]
    whole = bool(tuned.peft_config["default"].modules_to_save)
    # transformers does not find the magnitudes, nor before 5.18 whole modules, and would go on with fresh ones
    lost = ["lora_magnitude_vector"] * (method == "dora") + ["modules_to_save"] * (whole and OLD_ADAPTERS)
    if lost:
        with pytest.raises(ValueError, match=f"adapter lacks .*({'|'.join(lost)})"):
            fresh.load_adapter(tmp_path)
        return
    fresh.load_adapter(tmp_path)
    fresh.set_adapter("default")
    torch.testing.assert_close(logits_of(fresh, processor), after, atol=0, rtol=0)


@pytest.mark.parametrize(("family", "language"), [pair for pair in COMBINATIONS if pair[1] != "llama"])
def test_round_trip_on_other_language_models(family, language, tmp_path):
    from peft import PeftModel

    model, processor = tiny_model(family, language)
    without_dropout(model)
    tuned = tune(model, lora_config(model, "all", "adapter", r=RANK), processor)
    after = logits_of(tuned, processor)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(family, language)[0], tmp_path).eval()
    torch.testing.assert_close(logits_of(again, processor), after, atol=0, rtol=0)


@families
def test_gates_and_special_tokens_are_trained_in_full(family):
    model, processor = tiny_model(family)
    without_dropout(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = tune(model, lora_config(model, None, "adapter", r=RANK), processor).merge_and_unload()
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("bridge.") for name in changed)
    for name in before:
        if name.endswith("_gate.weight") or ".token_rows." in name:
            assert name in changed
    assert family != "perceiver" or any("_gate" in name for name in changed)


@families
def test_frozen_parts_stay_in_eval_mode_while_dropout_trains(family):
    from peft import get_peft_model

    model, _ = tiny_model(family, "opt")
    tuned = get_peft_model(model, lora_config(model, "all", "adapter", r=RANK, lora_dropout=0.5))
    tuned.train()
    dropout = [module for name, module in tuned.named_modules() if name.endswith("lora_dropout.default")]
    assert dropout and all(module.training for module in dropout)
    layer = model.language_model.model.decoder.layers[0]
    assert not layer.training and not layer.self_attn.q_proj.base_layer.training
    assert not any(module.training for module in model.vision_model.modules())


@families
def test_several_adapters(family):
    """Added, chosen, mixed: a mixture by concatenation is the sum of what its parts add."""
    model, processor = tiny_model(family)
    without_dropout(model)
    config = lora_config(model, "attention", "adapter" if family == "mlp" else None, r=RANK)
    tuned = tune(model, config, processor)
    first = logits_of(tuned, processor)
    tuned.add_adapter(
        "second", lora_config(tuned, "attention", config.modules_to_save and "adapter", r=RANK, lora_alpha=3)
    )
    tuned.set_adapter("second")
    train(tuned, processor, 3)
    second = logits_of(tuned, processor)
    assert not torch.allclose(first, second, atol=1e-3)
    tuned.set_adapter("default")
    torch.testing.assert_close(logits_of(tuned, processor), first, atol=0, rtol=0)
    tuned.add_weighted_adapter(["default", "second"], [0.7, 0.5], "mixed", combination_type="cat")
    tuned.set_adapter("mixed")
    mixed = logits_of(tuned, processor)
    layers = {
        name: module for name, module in tuned.named_modules() if name.endswith("q_proj") and hasattr(module, "lora_A")
    }
    assert layers
    for module in layers.values():
        expected = 0.7 * module.get_delta_weight("default") + 0.5 * module.get_delta_weight("second")
        torch.testing.assert_close(module.get_delta_weight("mixed"), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mixed, first, atol=1e-3) and not torch.allclose(mixed, second, atol=1e-3)
    tuned.delete_adapter("second")
    torch.testing.assert_close(logits_of(tuned, processor), mixed, atol=0, rtol=0)


@families
def test_a_second_preset_is_read_off_an_adapted_model(family):
    from peft import get_peft_model

    model, _ = tiny_model(family)
    plain = [lora_config(model, "all", bridge, r=RANK) for bridge in ("adapter", "full")]
    for config in plain:
        wrapped = get_peft_model(tiny_model(family)[0], config)
        for bridge, expected in zip(("adapter", "full"), plain):
            found = lora_config(wrapped, "all", bridge, r=RANK)
            assert found.target_modules == expected.target_modules
            assert sorted(found.modules_to_save or []) == sorted(expected.modules_to_save or [])


# ---------------------------------------------------------------------- tokens


@pytest.mark.parametrize("language", ["llama", "llama_tied", "opt"])
@families
def test_rows_of_the_language_model_s_own_table(family, language, tmp_path):
    from peft import PeftModel

    model, processor = tiny_model(family, language)
    without_dropout(model)
    table = model.get_input_embeddings().weight.clone()
    if family == "perceiver" and model.config.tie_word_embeddings:
        with pytest.raises(ValueError, match="without the special tokens whose rows are in the bridge"):
            lora_config(model, tokens=[40, 41])
        return
    tuned = tune(model, lora_config(model, "attention", None, tokens=[40, 41], r=RANK), processor)
    inputs = inputs_of(model, processor)
    inputs["input_ids"][0, -1] = 40
    with torch.no_grad():
        after = tuned(**inputs).logits
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(family, language)[0], tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, after, atol=0, rtol=0)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, after, atol=1e-4, rtol=1e-4)
    changed = (merged.get_input_embeddings().weight != table).any(dim=-1).nonzero().flatten().tolist()
    assert set(changed) <= {40, 41}
    if language == "llama_tied":
        assert changed  # every row of the output layer has a gradient
        assert torch.equal(merged.get_output_embeddings().weight, merged.get_input_embeddings().weight)


def test_tokens_with_rows_in_the_bridge_are_not_trained_twice():
    model, _ = tiny_model("perceiver")
    image, end = model.config.special_token_ids
    with pytest.raises(ValueError, match=rf"Tokens \[{end}\] have their rows in the bridge"):
        lora_config(model, tokens=[40, end])
    model, _ = tiny_model("mlp")
    with pytest.raises(ValueError, match=rf"Tokens \[{model.config.image_token_id}, 4000\] have no row to train"):
        lora_config(model, tokens=[40, model.config.image_token_id, 4000])
    model, _ = tiny_model("mlp", "t5")
    with pytest.raises(ValueError, match="encoder-decoder"):
        lora_config(model, tokens=[40])


# ---------------------------------------------------------------------- bridge checkpoints


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(3)
    for name, model in (
        ("clip", AutoModel.from_config(VISION["clip"]())),
        ("llama", AutoModelForCausalLM.from_config(LANGUAGE["llama"]())),
        ("llama_in_whole_blocks", AutoModelForCausalLM.from_config(llama_in_whole_blocks())),
    ):
        spread_weights(model)
        model.save_pretrained(folder / name)
    clip_image_processor().save_pretrained(folder / "clip")
    for name in ("llama", "llama_in_whole_blocks"):
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def composed_from(parts, family, language="llama"):
    model, processor = vlbridge.compose(str(parts / "clip"), parts / language, family, **BRIDGE_OPTIONS[family])
    spread_weights(model.bridge)
    return without_dropout(model), processor


@families
def test_a_merged_bridge_is_a_bridge(family, parts, tmp_path):
    model, processor = composed_from(parts, family)
    tuned = tune(model, lora_config(model, None, "adapter", r=RANK), processor)
    with pytest.raises(ValueError, match="The bridge carries adapters"):
        tuned.get_base_model().save_pretrained(tmp_path / "bridge", bridge_only=True)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "bridge", bridge_only=True)
    assert all(name.startswith("bridge.") for name in load_file(tmp_path / "bridge" / "model.safetensors"))
    again = AutoModel.from_pretrained(tmp_path / "bridge")
    assert torch.equal(logits_of(again, processor), logits_of(merged, processor))


@pytest.mark.parametrize("kind", ["lora", "ia3", "tokens", "full training"])
@families
def test_a_merged_language_model_is_not_lost(family, kind, parts, tmp_path):
    """Saved alone, the bridge would come back with the language model as it was."""
    model, processor = composed_from(parts, family)
    if kind == "full training":
        model.freeze(language_model=False)
        train(model, processor)
        merged = model.freeze()
    else:
        config = {
            "lora": lambda: lora_config(model, "attention", "full", r=RANK),
            "ia3": lambda: ia3_config(model, bridge=None),
            "tokens": lambda: lora_config(
                model, None, "adapter", tokens=[processor.tokenizer.convert_tokens_to_ids("w")]
            ),
        }[kind]()
        tuned = tune(model, config, processor)
        with pytest.raises(ValueError, match="carries adapters"):
            tuned.get_base_model().save_pretrained(tmp_path / "bridge", bridge_only=True)
        merged = tuned.merge_and_unload()
    after = logits_of(merged, processor)
    with pytest.raises(ValueError, match="would lose changes of the language_model"):
        merged.save_pretrained(tmp_path / "bridge", bridge_only=True)
    assert not (tmp_path / "bridge").exists()
    with pytest.raises(ValueError, match="would lose changes of the language_model"):
        copy.deepcopy(merged).to(torch.bfloat16).save_pretrained(tmp_path / "bridge", bridge_only=True)
    # whole, it keeps everything, and no longer passes for a bridge on the original
    merged.save_pretrained(tmp_path / "whole")
    whole = AutoModel.from_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="needs to know where the language_model comes from"):
        whole.save_pretrained(tmp_path / "bridge", bridge_only=True)
    if kind == "tokens":  # one tensor has changed: it may travel
        assert merged.set_frozen_parts(language_model=parts / "llama") == ["language_model.model.embed_tokens.weight"]
        after = logits_of(merged, processor)
        merged.save_pretrained(tmp_path / "bridge", bridge_only=True)
        assert torch.equal(logits_of(AutoModel.from_pretrained(tmp_path / "bridge"), processor), after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@families
def test_precision_alone_is_no_change(family, dtype, parts, tmp_path):
    model, _ = composed_from(parts, family)
    for step, there in enumerate((dtype, torch.float32)):
        model.to(there).save_pretrained(tmp_path / str(step), bridge_only=True)
        again = AutoModel.from_pretrained(tmp_path / str(step))
        again.save_pretrained(tmp_path / f"again {step}", bridge_only=True)


# ---------------------------------------------------------------------- QLoRA


@pytest.mark.core
@families
def test_qlora(family, parts, tmp_path):
    """LoRA on a language model in 4 bits, the bridge in full precision beside it: as on the dequantised weights."""
    from peft import PeftModel

    model, processor = composed_from(parts, family, "llama_in_whole_blocks")
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    quantised = without_dropout(AutoModel.from_pretrained(tmp_path / "bridge", **options))
    weights = dequantised_weights(quantised)
    assert weights.keys() == set(language_targets(model, "all"))
    for name, weight in weights.items():
        model.get_submodule(name).weight.data.copy_(weight)
    after = []
    for one in (quantised, model):
        torch.manual_seed(0)
        tuned = tune(one, lora_config(one, "all", "full", r=RANK), processor)
        assert adapted(tuned) == weights.keys()
        after.append(logits_of(tuned, processor))
        if one is quantised:
            tuned.save_pretrained(tmp_path / "adapter")
    assert relative_error(*after) < 0.03  # CPUs with AVX512-BF16 compute with 4-bit weights in bfloat16 only
    again = AutoModel.from_pretrained(tmp_path / "bridge", **options)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(again, processor), after[0], atol=0, rtol=0)


# ---------------------------------------------------------------------- Hub


@families
def test_adapters_are_pushed_and_loaded(family, parts, hub, tmp_path):
    """With the real client, over HTTP."""
    from peft import PeftModel

    model, processor = composed_from(parts, family)
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    tuned = tune(model, lora_config(model, "attention", "adapter", r=RANK), processor)
    after = logits_of(tuned, processor)
    tuned.push_to_hub("me/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= hub.files("me/adapter").keys()
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "bridge"), "me/adapter").eval()
    torch.testing.assert_close(logits_of(again, processor), after, atol=0, rtol=0)


@needs_peft
@families
def test_transformers_loads_pushed_adapters(family, parts, hub, tmp_path):
    model, processor = composed_from(parts, family)
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    tuned = tune(model, lora_config(model, "attention", "adapter", r=RANK), processor)
    after = logits_of(tuned, processor)
    tuned.push_to_hub("me/adapter")
    fresh = AutoModel.from_pretrained(tmp_path / "bridge")
    if tuned.peft_config["default"].modules_to_save and OLD_ADAPTERS:
        with pytest.raises(ValueError, match="adapter lacks .*modules_to_save"):
            fresh.load_adapter("me/adapter", adapter_name="mine")
        return
    fresh.load_adapter("me/adapter", adapter_name="mine")
    fresh.set_adapter("mine")
    torch.testing.assert_close(logits_of(fresh, processor), after, atol=0, rtol=0)


@pytest.mark.parametrize(
    "target, warned",
    [
        ("all-linear", True),
        (["q_proj", "v_proj"], True),
        (r"(language_model|vision_model)\..*q_proj", False),  # asked for
        (r"language_model\..*q_proj", False),
    ],
)
def test_a_plain_configuration_that_reaches_the_encoder_is_reported(target, warned, monkeypatch):
    from peft import LoraConfig, get_peft_model

    said = []
    monkeypatch.setattr(modeling_freezing.logger, "warning_once", said.append)
    tuned = get_peft_model(tiny_model("mlp")[0], LoraConfig(target_modules=target)).train()
    reached = [name for name, layer in tuned.get_base_model().vision_model.named_modules()
               if hasattr(layer, "base_layer")]  # fmt: skip
    assert bool(reached) == (warned or "vision_model" in target)
    assert bool(said) == warned
    if warned:
        assert f"reaches {len(reached)} layers of the frozen vision_model" in said[0] and reached[0] in said[0]
        rest = LoraConfig(target_modules=target, exclude_modules=r"vision_model\..*")
        said.clear()
        tuned = get_peft_model(tiny_model("mlp")[0], rest).train()
        assert not said and not any("vision_model" in name for name, _ in tuned.named_parameters() if "lora" in name)


def test_a_bridge_that_an_adapter_has_frozen_has_no_dropout():
    """As the language model's and the encoder's: a reference with the adapter disabled is the same model twice."""
    from peft import LoraConfig, get_peft_model

    model, processor = tiny_model("qformer")
    inputs = processor(images=tiny_image(), text="<image>what?", return_tensors="pt")
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    tuned = get_peft_model(model, LoraConfig(target_modules=r"language_model\..*q_proj")).train()
    assert torch.equal(tuned(**inputs).logits, tuned(**inputs).logits)
