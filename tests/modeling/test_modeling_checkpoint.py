"""Saving and loading: whole models and bridges alone, through every Auto class, in every precision; PEFT."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    BRIDGE_OPTIONS,
    COMBINATIONS,
    LANGUAGE,
    VISION,
    dequantised_weights,
    llama_in_whole_blocks,
    relative_error,
    spread_weights,
    tiny_image,
    tiny_model,
    tiny_stage1,
    tiny_tokenizer,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    BitsAndBytesConfig,
    pipeline,
)

import vlbridge
from vlbridge.modeling.modeling_pins import weights_sha256


AUTO_CLASSES = [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM]
combinations = pytest.mark.parametrize(("bridge", "language"), COMBINATIONS)


def inputs_of(model, processor):
    inputs = processor(
        images=[tiny_image(0), tiny_image(1)], text=["<image>what", "hm, <image>"], return_tensors="pt", padding=True
    )
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.zeros(2, 1, dtype=torch.long)
    return inputs


@torch.no_grad()
def logits_of(model, processor):
    return model(**inputs_of(model, processor)).logits


def cast(model, dtype):
    """What loading in that precision gives: parameters are cast, rotary frequencies are not."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of frozen parts, as users have them."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(3)
    for name in ("clip", "resnet"):
        model = AutoModel.from_config(VISION[name]())
        spread_weights(model)
        model.save_pretrained(folder / name)
    for name in ("llama", "llama_tied", "llama_in_whole_blocks", "opt", "t5"):
        auto_class = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
        config = llama_in_whole_blocks() if name == "llama_in_whole_blocks" else LANGUAGE[name]()
        model = auto_class.from_config(config)
        spread_weights(model)
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    from transformers import CLIPImageProcessor

    for name in ("clip", "resnet"):
        CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}).save_pretrained(
            folder / name
        )
    return folder


def compose_from(parts, bridge, language, vision="clip"):
    model, processor = vlbridge.compose(str(parts / vision), parts / language, bridge, **BRIDGE_OPTIONS[bridge])
    spread_weights(model.bridge)
    return model, processor


# ---------------------------------------------------------------------- whole models


@pytest.mark.core
@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
@combinations
def test_whole_model_comes_back(bridge, language, auto_class, tmp_path):
    model, processor = tiny_model(bridge, language)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and type(again) is type(processor)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert torch.equal(logits_of(loaded, again), logits_of(model, processor))
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in loaded.named_parameters() if name.startswith("bridge.")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
def test_whole_model_in_every_precision(bridge, dtype, tmp_path):
    model, processor = tiny_model(bridge)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert torch.equal(logits_of(loaded, processor), logits_of(cast(model, dtype), processor))


@pytest.mark.core
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
@pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
def test_whole_model_with_device_map(bridge, device_map, tmp_path):
    model, processor = tiny_model(bridge)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(logits_of(loaded, processor), logits_of(model, processor))


def test_device_map_over_several_devices(tmp_path):
    """Layers on disk stand for a second device: the bridge's layers are moved along, none is dropped."""
    model, processor = tiny_model("perceiver")
    model.save_pretrained(tmp_path / "model")
    layers = {f"language_model.model.layers.{index}": place for index, place in ((0, "cpu"), (1, "disk"))}
    rest = ["vision_model", "bridge", "language_model.model.embed_tokens", "language_model.model.norm"]
    rest += ["language_model.model.rotary_emb", "language_model.lm_head"]
    loaded = AutoModel.from_pretrained(
        tmp_path / "model", device_map={**layers, **dict.fromkeys(rest, "cpu")}, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(logits_of(loaded, processor), logits_of(model, processor))


@pytest.mark.core
@pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
def test_pipeline(bridge, tmp_path):
    model, processor = tiny_model(bridge)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    turn = [{"role": "user", "content": [{"type": "image", "image": tiny_image()}, {"type": "text", "text": "what"}]}]
    said = pipe(text=turn, max_new_tokens=5, return_full_text=False)[0]["generated_text"]
    inputs = processor.apply_chat_template(
        turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said == processor.decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------------- bridges alone


@pytest.mark.core
@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
@combinations
def test_bridge_alone_comes_back(bridge, language, auto_class, parts, tmp_path):
    model, processor = compose_from(parts, bridge, language)
    model.save_pretrained(tmp_path, bridge_only=True)
    processor.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == {name for name in model.state_dict() if name.startswith("bridge.")}
    pins = json.loads((tmp_path / "config.json").read_text())["frozen_parts"]
    assert pins["language_model"]["source"] == str(parts / language)
    assert pins["vision_model"]["sha256"] == weights_sha256(str(parts / "clip"))
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits_of(loaded, AutoProcessor.from_pretrained(tmp_path)), logits_of(model, processor))
    assert not any(p.requires_grad for p in loaded.language_model.parameters()) and not loaded.training


def test_bridge_on_a_tied_language_model(parts, tmp_path):
    model, processor = compose_from(parts, "perceiver", "llama_tied", "resnet")
    assert model.bridge.token_rows.output_rows is None
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    model.save_pretrained(tmp_path / "whole")
    expected = logits_of(model, processor)
    for name in ("bridge", "whole"):
        assert torch.equal(logits_of(AutoModel.from_pretrained(tmp_path / name), processor), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
def test_bridge_alone_in_half_precision(bridge, dtype, parts, tmp_path):
    model, processor = compose_from(parts, bridge, "llama")
    model.save_pretrained(tmp_path, bridge_only=True)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype, device_map="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert torch.equal(logits_of(loaded, processor), logits_of(cast(model, dtype), processor))


@pytest.mark.core
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
def test_bridge_in_bfloat16_on_a_quantised_language_model(bridge, bits, parts, tmp_path):
    """The bridge's layers are neither quantised nor dropped, and learn as they do on the dequantised weights."""
    model, processor = compose_from(parts, bridge, "llama_in_whole_blocks")
    model.save_pretrained(tmp_path, bridge_only=True)
    quantisation = BitsAndBytesConfig(
        **{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=quantisation)
    quantised = {name for name, module in loaded.named_modules() if "bit" in type(module).__module__}
    assert quantised and all(name.startswith("language_model.model.layers") for name in quantised)
    assert {parameter.dtype for parameter in loaded.bridge.parameters()} == {torch.bfloat16}

    weights = dequantised_weights(loaded)
    assert weights.keys() == quantised
    for name, weight in weights.items():
        original = model.get_submodule(name).weight
        assert relative_error(weight, original) < {4: 0.12, 8: 0.01}[bits]  # 16 and 255 levels
        original.data.copy_(weight)

    # Gradients first: a CPU with AVX512-BF16 gives none through 4-bit layers that ran without them before.
    inputs = processor(images=[tiny_image()], text=["<image>ab"], return_tensors="pt")
    gradients = []
    for one in (loaded, model):
        one(**inputs, labels=inputs["input_ids"].clamp(max=99)).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten().float() for parameter in one.bridge.parameters()]))
    assert relative_error(*gradients) < 0.1  # bfloat16 against float32, two layers and the bridge

    results = {}
    for name in weights:
        loaded.get_submodule(name).register_forward_hook(
            lambda layer, args, output, name=name: results.update({name: (args[0], output)})
        )
    assert relative_error(logits_of(loaded, processor), logits_of(model, processor)) < 0.05  # bfloat16, two layers
    assert results.keys() == quantised
    for name, (hidden, output) in results.items():  # 4 bits: bfloat16's rounding; 8: activations in 8 bits, too
        assert relative_error(output, hidden.float() @ weights[name].T) < {4: 0.005, 8: 0.015}[bits]
    assert loaded.generate(**inputs, max_new_tokens=4, min_new_tokens=4).shape[1] == inputs["input_ids"].shape[1] + 4


def test_loaded_parts_are_shared_not_copied(parts, tmp_path):
    model, processor = compose_from(parts, "mlp", "llama")
    model.save_pretrained(tmp_path, bridge_only=True)
    language = model.language_model
    loaded = AutoModel.from_pretrained(tmp_path, language_model=language)
    assert loaded.language_model is language
    assert torch.equal(logits_of(loaded, processor), logits_of(model, processor))


def test_saving_twice_replaces_and_leaves_nothing_behind(parts, tmp_path):
    model, _ = compose_from(parts, "mlp", "llama")
    for _ in range(2):
        model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bridge"]


def test_an_interrupted_save_leaves_the_old_bridge(parts, tmp_path, monkeypatch):
    model, processor = compose_from(parts, "mlp", "llama")
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    expected = logits_of(model, processor)
    spread_weights(model.bridge)
    with torch.no_grad():
        model.bridge.linear_1.weight.add_(1)
    monkeypatch.setattr(type(model.config), "save_pretrained", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    monkeypatch.undo()
    assert torch.equal(logits_of(AutoModel.from_pretrained(tmp_path / "bridge"), processor), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["bridge"]


@pytest.fixture
def saved_bridge(parts, tmp_path):
    """A bridge whose parts may be tampered with."""
    mine = tmp_path / "parts"
    shutil.copytree(parts, mine)
    model, _ = compose_from(mine, "mlp", "llama")
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    return tmp_path / "bridge", mine


@pytest.mark.core
def test_arguments_that_change_nothing(saved_bridge):
    """Harnesses and servers pass these to every model."""
    bridge, _ = saved_bridge
    plain = AutoModel.from_pretrained(bridge)
    usual = {"tqdm_class": object, "low_cpu_mem_usage": True, "gguf_file": None, "tp_plan": None, "max_memory": None,
             "use_kernels": False, "device_map": None, "quantization_config": None}  # fmt: skip
    for config in (None, plain.config):
        loaded = type(plain).from_pretrained(bridge, config=config, **usual)
        for name, tensor in plain.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    with pytest.raises(TypeError, match="loaded without key_mapping, tp_plan, use_kernels"):
        type(plain).from_pretrained(bridge, tp_plan="auto", key_mapping={"a": "b"}, use_kernels=True)


def test_a_composed_model_has_a_name_that_is_no_repository(parts):
    model, _ = compose_from(parts, "mlp", "llama")
    with pytest.raises(OSError, match="composed mlp_llava"):
        AutoModel.from_pretrained(model.config.name_or_path)


@pytest.mark.parametrize("part", ["clip", "llama"])
def test_a_missing_part_is_named(saved_bridge, part):
    bridge, parts = saved_bridge
    shutil.rmtree(parts / part)
    with pytest.raises(vlbridge.FrozenPartError, match=str(parts / part)):
        AutoModel.from_pretrained(bridge)


@pytest.mark.core
@pytest.mark.parametrize("part", ["clip", "llama"])
def test_a_changed_part_is_named(saved_bridge, part):
    bridge, parts = saved_bridge
    path = parts / part / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(vlbridge.FrozenPartError, match=rf"{part}.* is not the one that this bridge was trained with"):
        AutoModel.from_pretrained(bridge)


def test_the_hash_is_of_the_tensors_not_of_the_files(parts, tmp_path):
    """Sharding a part anew, or converting it to another format, does not make it another part."""
    model = AutoModelForCausalLM.from_pretrained(parts / "llama")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    (tmp_path / "pickled").mkdir()
    torch.save(load_file(parts / "llama" / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    hashes = {weights_sha256(str(folder)) for folder in (parts / "llama", tmp_path / "sharded", tmp_path / "pickled")}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("bridge.linear_1.bias"), "missing bridge.linear_1.bias"),
        (lambda tensors: tensors.update({"bridge.other": torch.zeros(1)}), "unexpected bridge.other"),
        (lambda tensors: tensors.update({"bridge.linear_1.bias": torch.zeros(3)}), r"shape \[3\], expected"),
    ],
)
def test_a_wrong_bridge_file_is_refused(saved_bridge, change, message):
    bridge, _ = saved_bridge
    tensors = load_file(bridge / "model.safetensors")
    change(tensors)
    save_file(tensors, bridge / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(bridge)


def test_bridge_only_needs_sources(tmp_path):
    model, _ = tiny_model("mlp")
    with pytest.raises(ValueError, match="made from a configuration"):
        model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    assert not (tmp_path / "bridge").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [None, "layer", "row"])
def test_a_loaded_part_is_compared_with_its_source(change, dtype, parts, tmp_path):
    """What was merged into it or trained before it was passed in is in no pin."""
    language = AutoModelForCausalLM.from_pretrained(parts / "llama", dtype=dtype)
    with torch.no_grad():
        if change == "layer":
            language.model.layers[1].self_attn.q_proj.weight += 0.01
        elif change == "row":
            language.model.embed_tokens.weight[7] += 0.1
    model, _ = vlbridge.compose(str(parts / "clip"), language, "mlp", tokenizer=str(parts / "llama"))
    if change is None:
        model.save_pretrained(tmp_path, bridge_only=True)
        pin = json.loads((tmp_path / "config.json").read_text())["frozen_parts"]["language_model"]
        assert pin == {"source": str(parts / "llama"), "revision": None, "sha256": weights_sha256(str(parts / "llama"))}
        return
    name = {"layer": "model.layers.1.self_attn.q_proj.weight", "row": "model.embed_tokens.weight"}[change]
    with pytest.raises(ValueError, match=rf"differs from '.*llama': {name}\."):
        model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    assert not (tmp_path / "bridge").exists()


def test_bridge_only_refuses_to_lose_training(parts, tmp_path):
    model, _ = compose_from(parts, "mlp", "llama")
    model.freeze(language_model=False)
    with pytest.raises(ValueError, match="language_model, which is not frozen"):
        model.save_pretrained(tmp_path / "bridge", bridge_only=True)


# ---------------------------------------------------------------------- PEFT


def lora(model):
    from peft import LoraConfig, get_peft_model

    names = "q_proj|v_proj" if not model.config.is_encoder_decoder else "q|v"
    options = {"target_modules": rf"language_model\..*\.({names})", "modules_to_save": ["bridge"]}
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, lora_dropout=0.5, **options))


@pytest.mark.core
@combinations
def test_lora_on_the_language_model_and_a_trained_bridge(bridge, language, tmp_path):
    from peft import PeftModel

    model, processor = tiny_model(bridge, language)
    model.bridge.apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else None)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = lora(model)
    inputs = inputs_of(model, processor)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    if model.config.is_encoder_decoder:
        labels = torch.tensor([[5, 6, 2], [7, 2, -100]])
        del inputs["decoder_input_ids"]
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    tuned.train()
    dropout = [module for name, module in tuned.named_modules() if name.endswith("lora_dropout.default")]
    assert dropout and all(module.training for module in dropout)  # the adapter trains, what it adapts does not
    for _ in range(2):
        optimizer.zero_grad()
        tuned(**inputs, labels=labels).loss.backward()
        optimizer.step()
    tuned.eval()
    trained = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert any("lora_B" in name for name in trained) and any("bridge.modules_to_save" in name for name in trained)
    # the copy that PEFT trains is the one that is used: with it back at its start, logits differ
    after = logits_of(tuned, processor)
    with torch.no_grad():
        copy = {name: parameter.clone() for name, parameter in trained.items() if "modules_to_save" in name}
        for name, parameter in trained.items():
            if "modules_to_save" in name:
                assert parameter.grad is not None, name
                parameter.copy_(fresh["bridge." + name.split("modules_to_save.default.")[1]])
        assert not torch.allclose(logits_of(tuned, processor), after, atol=1e-3)
        for name, tensor in copy.items():
            trained[name].copy_(tensor)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(bridge, language)[0], tmp_path).eval()
    torch.testing.assert_close(logits_of(again, processor), after, atol=0, rtol=0)
    merged = again.merge_and_unload()
    assert [name for name, _ in merged.named_children()] == ["vision_model", "language_model", "bridge"]
    torch.testing.assert_close(logits_of(merged, processor), after, atol=1e-4, rtol=1e-4)


@combinations
def test_a_bridge_is_loaded_without_being_drawn_first(parts, tmp_path, bridge, language):
    model, processor = compose_from(parts, bridge, language)
    spread_weights(model.bridge)
    model.save_pretrained(tmp_path, bridge_only=True)
    state = torch.get_rng_state()
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert not [name for name, tensor in again.state_dict().items() if tensor.is_meta]
    assert not [name for name, tensor in again.named_buffers() if tensor.is_meta]
    assert torch.equal(logits_of(again, processor), logits_of(model, processor))


def test_stage_1_is_loaded_with_its_tied_table(parts, tmp_path):
    model, _ = tiny_stage1(vision=str(parts / "clip"))
    model.save_pretrained(tmp_path, bridge_only=True)
    bridge = AutoModel.from_pretrained(tmp_path).bridge
    assert bridge.lm_head.decoder.weight is bridge.qformer.word_embeddings.weight
    for name, tensor in model.bridge.state_dict().items():
        assert torch.equal(bridge.state_dict()[name], tensor), name


def test_a_bridge_in_a_pickled_file_is_loaded(parts, tmp_path):
    model, processor = compose_from(parts, "mlp", "llama")
    model.save_pretrained(tmp_path, bridge_only=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, processor), logits_of(model, processor))
