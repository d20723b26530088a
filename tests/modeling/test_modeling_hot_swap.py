"""Bridges that take turns on one pair of frozen parts: outputs after every swap against models loaded on their own."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    BRIDGE_OPTIONS,
    LANGUAGE,
    QFORMER,
    VISION,
    checkpoint_activations,
    clip_image_processor,
    needs_compile,
    needs_peft,
    spread_weights,
    tiny_image,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

import vlbridge
from vlbridge.compat_hooks import HOOKS_ARE_RECOMPUTED


# per family, bridges that differ from the plain one in everything that may differ
VARIANTS = {
    "mlp": {
        "plain": {},
        "linear": {"projector_type": "linear"},
        "wide": {"projector_type": "mlp3x_gelu", "projector_hidden_size": 24, "vision_feature_layer": [-1, -2]},
        "pooled": {"pooling": "average", "pooling_factor": 2},
    },
    "qformer": {
        "plain": {},
        "few": {"qformer_config": {**QFORMER, "num_query_tokens": 3}},
        "small": {"qformer_config": {**QFORMER, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}},
        "early": {"vision_feature_layer": -2},
    },
    "perceiver": {
        "plain": {},
        "sparse": {"cross_attention_every_n_layers": 2},
        "few": {"num_latents": 3, "only_attend_immediate_media": False},
        "framed": {"max_num_frames": 2, "cross_attention_head_dim": 4},
    },
}
families = pytest.mark.parametrize("family", VARIANTS)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Folders of two frozen parts, of another language model of that shape, and of every variant of every family."""
    folder = tmp_path_factory.mktemp("library")
    torch.manual_seed(3)
    vision = AutoModel.from_config(VISION["clip"]())
    spread_weights(vision)
    vision.save_pretrained(folder / "clip")
    clip_image_processor().save_pretrained(folder / "clip")
    for name in ("llama", "other"):
        model = AutoModelForCausalLM.from_config(LANGUAGE["llama"]())
        spread_weights(model)
        if name == "other":
            with torch.no_grad():
                model.lm_head.weight.add_(0.1)
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    for family, variants in VARIANTS.items():
        for number, (name, options) in enumerate(variants.items()):
            model, processor = compose(folder, family, **options)
            with torch.no_grad():
                for parameter in model.bridge.parameters():
                    parameter.mul_(1 + 0.1 * number)
            save(model, processor, folder / family / name)
    return folder


def compose(library, family, language="llama", **options):
    options = {**BRIDGE_OPTIONS[family], **options}
    model, processor = vlbridge.compose(str(library / "clip"), str(library / language), family, **options)
    spread_weights(model.bridge)
    return model, processor


def save(model, processor, folder):
    model.save_pretrained(folder, bridge_only=True)
    processor.save_pretrained(folder)


def host_of(library, family, names=None):
    """A model that was loaded as the family's first variant, with the others beside it."""
    variants = list(VARIANTS[family])
    model = AutoModel.from_pretrained(library / family / variants[0])
    for name in names or variants[1:]:
        model.add_bridge(name, library / family / name)
    return model


def inputs_of(folder):
    processor = AutoProcessor.from_pretrained(folder)
    texts = ["<image>what", "hm, <image>"]
    return processor(images=[tiny_image(0), tiny_image(1)], text=texts, return_tensors="pt", padding=True)


@torch.no_grad()
def said(model, inputs):
    """Logits, and what is generated."""
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return model(**inputs).logits, tokens


def nbytes(module):
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


# ---------------------------------------------------------------------- taking turns


@pytest.mark.core
@families
def test_every_swap_gives_what_a_model_of_its_own_gives(library, family):
    expected = {}
    for name in VARIANTS[family]:
        inputs = inputs_of(library / family / name)
        expected[name] = inputs, said(AutoModel.from_pretrained(library / family / name), inputs)
    distinct = {tuple(logits.flatten().tolist()) for _, (logits, _) in expected.values()}
    assert len(distinct) == len(VARIANTS[family])
    model = host_of(library, family)
    first = next(iter(VARIANTS[family]))
    called = {name: "default" if name == first else name for name in expected}
    assert model.bridges == list(called.values()) and model.active_bridge == "default"
    for name in [*expected, *reversed(expected), *expected]:
        inputs, (logits, tokens) = expected[name]
        model.set_bridge(called[name])
        assert model.active_bridge == called[name]
        found = said(model, inputs)
        assert torch.equal(found[0], logits) and torch.equal(found[1], tokens)


@families
def test_the_choice_can_be_made_per_request(library, family):
    model = host_of(library, family)
    names = list(VARIANTS[family])[1:]
    expected = {}
    for name in names:
        alone = AutoModel.from_pretrained(library / family / name)
        expected[name] = alone(**inputs_of(library / family / name)).logits
    for name in [*names, *reversed(names)]:
        with model.using_bridge(name) as same, torch.no_grad():
            assert same is model
            assert torch.equal(model(**inputs_of(library / family / name)).logits, expected[name])
        assert model.active_bridge == "default"
    with pytest.raises(RuntimeError, match="in between"), model.using_bridge(names[0]):
        raise RuntimeError("in between")
    assert model.active_bridge == "default"


@families
def test_configuration_and_processor_follow_the_bridge(library, family):
    model = host_of(library, family)
    for name in list(VARIANTS[family])[1:]:
        alone = AutoModel.from_pretrained(library / family / name)
        model.set_bridge(name)
        ours, theirs = model.config.to_dict(), alone.config.to_dict()
        for key in ("_name_or_path", "transformers_version"):
            ours.pop(key, None), theirs.pop(key, None)
        assert ours == theirs
        assert model.config.num_image_tokens(30, 30) == alone.config.num_image_tokens(30, 30)
        assert model.name_or_path == str(library / family / name)
        assert model.generation_config.to_dict() == alone.generation_config.to_dict()
        saved = AutoProcessor.from_pretrained(library / family / name)
        saved.check(model.config)
        made = type(saved).from_config(model.config, saved.image_processor, saved.tokenizer)
        assert made.num_image_tokens(30, 30) == saved.num_image_tokens(30, 30)
    first = AutoProcessor.from_pretrained(library / family / next(iter(VARIANTS[family])))
    if family == "qformer":
        model.set_bridge("few")
        with pytest.raises(ValueError, match="image tokens, but the model makes 3"):
            first.check(model.config)


def test_special_tokens_come_and_go_with_their_bridge(library):
    """A Flamingo without rows of its own, as OpenFlamingo's releases have it, hosts one with them."""
    model, processor = tiny_model("perceiver")
    config = copy.deepcopy(model.config)
    config.special_token_ids = None
    bare = type(model)(config, model.vision_model, model.language_model).eval()
    spread_weights(bare.bridge)
    inputs = processor(images=[tiny_image()], text=["<image>ab"], return_tensors="pt")
    with torch.no_grad():
        alone, expected = bare(**inputs).logits, model(**inputs).logits
        assert alone.shape[-1] == 100 and expected.shape[-1] == 102
        bare.add_bridge("special", model)
        assert torch.equal(bare(**inputs).logits, alone)
        with bare.using_bridge("special"):
            assert torch.equal(bare(**inputs).logits, expected)
        assert torch.equal(bare(**inputs).logits, alone)


def test_models_of_all_families_share_the_frozen_parts(library):
    """What one family hangs on the language model (Flamingo's conditioning and special tokens) is no other's affair."""
    alone = {family: AutoModel.from_pretrained(library / family / "plain") for family in VARIANTS}
    parts = {"vision_model": alone["mlp"].vision_model, "language_model": alone["mlp"].language_model}
    for family in ("mlp", "perceiver", "qformer", "perceiver"):
        with torch.no_grad():
            expected = alone[family](**inputs_of(library / family / "plain")).logits
        shared = AutoModel.from_pretrained(library / family / "plain", **parts)
        assert shared.language_model is parts["language_model"]
        again = AutoModel.from_pretrained(library / family / list(VARIANTS[family])[1], **parts)  # the last to arrive
        with torch.no_grad():
            assert torch.equal(shared(**inputs_of(library / family / "plain")).logits, expected)
            other = inputs_of(library / family / list(VARIANTS[family])[1])
            assert again(**other).logits.shape[-1] == expected.shape[-1]


@pytest.mark.parametrize("reentrant", [True, False])
@families
def test_a_backward_pass_recomputes_with_the_bridge_it_began_with(library, family, reentrant):
    model = host_of(library, family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = inputs_of(library / family / "plain")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 100, -100)
    gradients = []
    if family == "perceiver" and reentrant and HOOKS_ARE_RECOMPUTED:
        with pytest.raises(ValueError, match="use_reentrant=True can't checkpoint"):
            checkpoint_activations(model, use_reentrant=True)
        return
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model, use_reentrant=reentrant)
        model.train()
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        trained = model.bridge
        with model.using_bridge(list(VARIANTS[family])[1]):
            loss.backward()
            assert all(parameter.grad is None for parameter in model.bridge.parameters())
        gradients.append([parameter.grad for parameter in trained.parameters()])
        assert all(gradient is not None for gradient in gradients[-1])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@needs_compile
@families
def test_compiled_code_swaps_too(library, family):
    torch.compiler.reset()
    model = host_of(library, family)
    compiled = torch.compile(model.get_image_features, backend="eager", fullgraph=True)
    pixel_values = inputs_of(library / family / "plain")["pixel_values"]
    name = list(VARIANTS[family])[1]
    for active in ("default", name, "default", name):
        model.set_bridge(active)
        with torch.no_grad():
            found = compiled(pixel_values=pixel_values).pooler_output
            assert torch.equal(found, model.get_image_features(pixel_values=pixel_values).pooler_output)


@families
def test_training_mode_and_freezing_reach_the_bridge_that_is_set(library, family):
    model = host_of(library, family)
    model.train()
    name = list(VARIANTS[family])[1]
    model.set_bridge(name)
    assert model.bridge.training and all(parameter.requires_grad for parameter in model.bridge.parameters())
    model.eval()
    model.set_bridge("default")
    assert not model.bridge.training
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"bridge.{name}" for name, _ in model.bridge.named_parameters()}


# ---------------------------------------------------------------------- memory, devices, saving


@families
def test_ten_bridges_cost_ten_bridges(library, family):
    """Bytes of all tensors that the model keeps alive, counted once each."""
    model = AutoModel.from_pretrained(library / family / "plain")
    names = list(VARIANTS[family])
    sizes = [nbytes(model.bridge)]
    for number in range(9):
        folder = library / family / names[number % len(names)]
        model.add_bridge(f"bridge {number}", folder)
        sizes.append(
            sum(tensor.numel() * tensor.element_size() for tensor in load_file(folder / "model.safetensors").values())
        )
    storages = {}
    modules = [model, *(resident.bridge for resident in model._residents.values() if resident is not None)]
    assert len(modules) == 10
    for module in modules:
        for tensor in module.state_dict().values():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert sum(storages.values()) == nbytes(model.vision_model) + nbytes(model.language_model) + sum(sizes)


@families
def test_three_children_and_the_state_dict_of_the_active_bridge(library, family, tmp_path):
    model = host_of(library, family)
    name = list(VARIANTS[family])[1]
    model.set_bridge(name)
    assert [child for child, _ in model.named_children()] == ["vision_model", "language_model", "bridge"]
    alone = AutoModel.from_pretrained(library / family / name)
    assert model.state_dict().keys() == alone.state_dict().keys()
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "bridge", library / family / name)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    configs = [
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "bridge", library / family / name)
    ]
    assert configs[0] == configs[1]
    model.save_pretrained(tmp_path / "whole")
    inputs = inputs_of(library / family / name)
    assert torch.equal(said(AutoModel.from_pretrained(tmp_path / "whole"), inputs)[0], said(alone, inputs)[0])


@families
def test_bridges_in_waiting_follow_the_model(library, family):
    model = host_of(library, family)
    model.to(torch.float64)
    names = model.bridges
    for name in names:
        model.set_bridge(name)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    model.to("meta")
    for name in reversed(names):
        model.set_bridge(name)
        assert {parameter.device.type for parameter in model.bridge.parameters()} == {"meta"}


@families
def test_a_bridge_goes_where_the_active_one_is(library, family):
    """Also where that one was moved by itself, or the bridge came from a model elsewhere."""
    model = host_of(library, family)
    model.bridge.to("meta")
    model.set_bridge(list(VARIANTS[family])[1])
    assert {parameter.device.type for parameter in model.bridge.parameters()} == {"meta"}


def test_a_dispatched_model_swaps(library, tmp_path):
    """Layers on disk stand for a second device."""
    whole = AutoModel.from_pretrained(library / "perceiver" / "plain")
    whole.save_pretrained(tmp_path / "model")
    places = {f"language_model.model.layers.{index}": place for index, place in ((0, "cpu"), (1, "disk"))}
    rest = ["vision_model", "bridge", "language_model.model.embed_tokens", "language_model.model.norm"]
    rest += ["language_model.model.rotary_emb", "language_model.lm_head"]
    model = AutoModel.from_pretrained(
        tmp_path / "model", device_map={**places, **dict.fromkeys(rest, "cpu")}, offload_folder=tmp_path / "offload"
    )
    for name in ("sparse", "few"):
        alone = AutoModel.from_pretrained(library / "perceiver" / name)
        model.add_bridge(name, alone, allow_mismatch=True)  # weights on disk can't be compared
        inputs = inputs_of(library / "perceiver" / name)
        with model.using_bridge(name), torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, alone(**inputs).logits)


def test_copies_are_independent(library):
    model = host_of(library, "perceiver")
    inputs = inputs_of(library / "perceiver" / "sparse")
    with model.using_bridge("sparse"):
        expected = said(model, inputs)[0]
    copied = copy.deepcopy(model)
    copied.set_bridge("sparse")
    with torch.no_grad():
        for parameter in copied.bridge.parameters():
            parameter.zero_()
        assert model.active_bridge == "default"
        with model.using_bridge("sparse"):
            assert torch.equal(model(**inputs).logits, expected)
        assert not torch.equal(copied(**inputs).logits, expected)


# ---------------------------------------------------------------------- what is refused


@families
def test_other_families_are_refused(library, family):
    model = host_of(library, family)
    for other in vlbridge.FAMILIES.keys() - {family}:
        for source in (library / other / "plain", AutoModel.from_pretrained(library / other / "plain")):
            with pytest.raises(ValueError, match="only bridges of one family can take turns"):
                model.add_bridge("other", source)
    assert "other" not in model.bridges


@pytest.mark.parametrize("loaded", [False, True], ids=["folder", "model"])
@families
def test_a_bridge_of_another_language_model_is_refused(library, family, loaded, tmp_path, caplog):
    source, processor = compose(library, family, language="other")
    if not loaded:
        save(source, processor, tmp_path)
    given = source if loaded else tmp_path
    model = host_of(library, family)
    before = model.bridges
    pins = model.config.frozen_parts
    with pytest.raises(vlbridge.FrozenPartError, match="language_model"):
        model.add_bridge("other", given)
    assert model.bridges == before
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        model.add_bridge("other", given, allow_mismatch=True)
    assert "language_model" in caplog.text
    with model.using_bridge("other"):
        assert model.config.frozen_parts == pins  # what is in memory, not what the bridge was trained with
        assert said(model, inputs_of(library / family / "plain"))[0].isfinite().all()


def test_other_geometry_is_refused_even_so(library, tmp_path):
    model = host_of(library, "mlp")
    config = VISION["clip"]()
    config.hidden_size, config.patch_size = 16, 10
    narrow, _ = vlbridge.compose(config, LANGUAGE["llama"](), "mlp", tokenizer=tiny_tokenizer())
    with pytest.raises(
        ValueError, match="vision_hidden_size is 16, this encoder's 32; patch_size is 10, this encoder's 6"
    ):
        model.add_bridge("narrow", narrow, allow_mismatch=True)
    config = LANGUAGE["llama"]()
    config.hidden_size, config.head_dim = 16, 4
    small, processor = vlbridge.compose(VISION["clip"](), config, "mlp", tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="other shapes"):
        model.add_bridge("small", small, allow_mismatch=True)
    folder = tmp_path / "small"
    small.language_model.save_pretrained(tmp_path / "language")
    tiny_tokenizer().save_pretrained(tmp_path / "language")
    small, processor = vlbridge.compose(str(library / "clip"), str(tmp_path / "language"), "mlp")
    save(small, processor, folder)
    with pytest.raises(ValueError, match=r"bridge.linear_1.weight has shape \[16, 32\], expected \[32, 32\]"):
        model.add_bridge("small", folder, allow_mismatch=True)
    assert model.bridges == ["default", "linear", "wide", "pooled"]


def test_a_part_that_is_being_trained_is_another_part(library):
    model = host_of(library, "mlp", ["linear"])
    model.freeze(language_model=False)
    with pytest.raises(vlbridge.FrozenPartError, match="language_model in memory is being trained"):
        model.add_bridge("wide", library / "mlp" / "wide")


def test_parts_without_a_source_can_not_be_compared(library):
    model, _ = tiny_model("mlp")
    with pytest.raises(vlbridge.FrozenPartError, match="has no source to compare it with"):
        model.add_bridge("linear", library / "mlp" / "linear")
    same = copy.deepcopy(model)
    model.add_bridge("same weights", same)
    assert model.bridges == ["default", "same weights"]


def test_whole_models_and_wrong_names_are_refused(library, tmp_path):
    model = host_of(library, "mlp", ["linear"])
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="holds a whole model"):
        model.add_bridge("whole", tmp_path / "whole")
    model.add_bridge("whole", AutoModel.from_pretrained(tmp_path / "whole"))  # its parts have these weights
    with pytest.raises(ValueError, match="There is a bridge 'linear' already"):
        model.add_bridge("linear", library / "mlp" / "wide")
    for wrong in (model.set_bridge, model.delete_bridge):
        with pytest.raises(ValueError, match="There is no bridge 'x'; there are 'default', 'linear', 'whole'"):
            wrong("x")
    with pytest.raises(ValueError, match="'default' is active"):
        model.delete_bridge("default")
    model.set_bridge("linear")
    model.delete_bridge("default")
    assert model.bridges == ["linear", "whole"]
    with pytest.raises(OSError):
        model.add_bridge("gone", tmp_path / "nothing")


# ---------------------------------------------------------------------- adapters


def drawn_adapter(model, prefix, name, seed):
    """A LoRA adapter with weights that matter."""
    from peft import LoraConfig

    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=2, target_modules=rf"{prefix}.*\.(q_proj|v_proj)"), name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.normal_(0, 0.3)


@pytest.mark.core
@needs_peft
@pytest.mark.parametrize("on_the_language_model", [False, True])
@families
def test_a_bridge_and_an_adapter_of_the_language_model_change_together(library, family, on_the_language_model):
    model = host_of(library, family)
    name = list(VARIANTS[family])[1]
    owner, prefix = (model.language_model, "model") if on_the_language_model else (model, "language_model")
    inputs = inputs_of(library / family / name)
    model.set_bridge(name)
    plain = said(model, inputs)[0]
    expected = []
    for seed, adapter in enumerate(("first", "second")):
        drawn_adapter(owner, prefix, adapter, seed)
        owner.set_adapter(adapter)
        expected.append(said(model, inputs)[0])
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    assert not torch.allclose(expected[0], plain, atol=1e-2)
    model.set_bridge("default", adapter="first")
    with model.using_bridge(name, adapter="second"):
        assert torch.equal(said(model, inputs)[0], expected[1])
    assert model.active_bridge == "default" and owner.active_adapters() == ["first"]
    model.set_bridge(name)
    assert torch.equal(said(model, inputs)[0], expected[0])
    with pytest.raises(ValueError, match="Adapter with name x not found"):
        model.set_bridge("default", adapter="x")
    assert model.active_bridge == name


def test_adapters_in_the_bridge_do_not_take_turns(library):
    from peft import LoraConfig, get_peft_model

    model = host_of(library, "mlp", ["linear"])
    with pytest.raises(ValueError, match="This model has no adapters"):
        model.set_bridge("linear", adapter="x")
    for options in ({"modules_to_save": ["bridge"]}, {"target_modules": r"bridge\.linear_1"}):
        options = {"target_modules": r"language_model.*q_proj", **options}
        tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, **options))
        with pytest.raises(ValueError, match="active bridge carries adapters"):
            tuned.set_bridge("linear")
        with pytest.raises(ValueError, match="carries adapters; merge_and_unload"):
            model.add_bridge("tuned", tuned.base_model.model)
        merged = tuned.merge_and_unload()
        merged.set_bridge("linear")
