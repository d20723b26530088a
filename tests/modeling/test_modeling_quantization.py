"""Quantised models: the bridge is in full precision and learns, whatever transformers quantises around it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    BRIDGE_OPTIONS,
    IMAGE_SIZE,
    SMALL,
    TOKENS,
    VISION,
    clip_image_processor,
    dequantised_weights,
    llama_in_whole_blocks,
    relative_error,
    spread_weights,
    tiny_image,
    tiny_stage1,
    tiny_tokenizer,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    SiglipVisionConfig,
    T5Config,
    Trainer,
    TrainingArguments,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

import vlbridge
from vlbridge.modeling.modeling_quantization import SKIP_LISTS, without_bridge


PAIRS = [("mlp", "llama"), ("qformer", "llama"), ("qformer", "t5"), ("perceiver", "llama")]
pairs = pytest.mark.parametrize(("bridge", "language"), PAIRS)
families = pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
precisions = pytest.mark.parametrize("bits", [4, 8])
# bitsandbytes computes in bfloat16 (4 bits, on a CPU with AVX512-BF16) or with 8-bit activations
CLOSE = {4: 0.02, 8: 0.05}
# 4-bit weights whose scales were rounded to bfloat16 for a packed layer, and computed in float32 since
ROUNDED = 0.03


def in_bits(bits: int, **options) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options)


def t5_in_whole_blocks() -> T5Config:
    return T5Config(
        d_model=128, d_kv=32, d_ff=192, num_layers=2, num_heads=4, vocab_size=TOKENS["vocab_size"], pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip


def clip_in_whole_blocks():
    config = VISION["clip"]().to_dict()
    return type(VISION["clip"]())(**{**config, "hidden_size": 128, "intermediate_size": 192})


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of frozen parts, whose layers bitsandbytes can pack."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(3)
    models = {
        "clip": AutoModel.from_config(clip_in_whole_blocks()),
        "siglip": AutoModel.from_config(SiglipVisionConfig(**SMALL, image_size=IMAGE_SIZE, patch_size=6)),
        "llama": AutoModelForCausalLM.from_config(llama_in_whole_blocks()),
        "t5": AutoModelForSeq2SeqLM.from_config(t5_in_whole_blocks()),
    }
    for name, model in models.items():
        spread_weights(model)
        if name == "t5":  # its attention is not scaled, so that large weights make chaos of the least rounding
            model.load_state_dict({key: 0.3 * tensor for key, tensor in model.state_dict().items()})
        model.save_pretrained(folder / name)
        saver = clip_image_processor() if name in ("clip", "siglip") else tiny_tokenizer()
        saver.save_pretrained(folder / name)
    return folder


def compose_from(parts, bridge, language="llama", vision="clip"):
    model, processor = vlbridge.compose(parts / vision, parts / language, bridge, **BRIDGE_OPTIONS[bridge])
    spread_weights(model.bridge)
    return model, processor


def inputs_of(model, processor):
    inputs = processor(
        images=[tiny_image(0), tiny_image(1)], text=["<image>what", "hm, <image>"], return_tensors="pt", padding=True
    )
    inputs["labels"] = inputs["input_ids"].clamp(max=99)
    if model.config.is_encoder_decoder:
        inputs["labels"] = torch.tensor([[5, 6, 2], [7, 8, 2]])
    return inputs


@torch.no_grad()
def logits_of(model, processor):
    return model(**inputs_of(model, processor)).logits


def gradients_of(model, processor) -> torch.Tensor:
    """Gradients of the bridge, after a check that nothing else has any."""
    model.zero_grad()
    model(**inputs_of(model, processor)).loss.backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found == {name for name, _ in model.named_parameters() if name.startswith("bridge.")}
    gradients = torch.cat([parameter.grad.flatten().float() for parameter in model.bridge.parameters()])
    model.zero_grad()
    assert gradients.isfinite().all()
    return gradients


def quantised_layers(model) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__module__.startswith("bitsandbytes")}


def dequantised_weights_of(part, model) -> dict[str, torch.Tensor]:
    """Weights of one part under the names that they have in the model."""
    prefix = next((f"{name}." for name, child in model.named_children() if child is part), "")
    return {f"{prefix}{name}": weight for name, weight in dequantised_weights(part).items()}


def dequantised_twin(quantised, model):
    """The model with the weights that the quantised one stands for."""
    twin = copy.deepcopy(model)
    for name, weight in dequantised_weights(quantised).items():
        twin.get_submodule(name).weight.data.copy_(weight)
    return twin


def without_dropout(module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0


def saved_whole(parts, folder, *args):
    model, processor = compose_from(parts, *args)
    model.save_pretrained(folder)
    return model, processor


# ---------------------------------------------------------------------- whole models


@pytest.mark.core
@precisions
@pairs
def test_a_whole_model_is_quantised_without_its_bridge(bridge, language, bits, parts, tmp_path):
    """Logits, tokens and gradients are those of the dequantised weights, before and after evaluations."""
    model, processor = saved_whole(parts, tmp_path, bridge, language)
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=in_bits(bits))
    names = quantised_layers(loaded)
    assert {name.partition(".")[0] for name in names} == {"vision_model", "language_model"}
    linear = {name for name, layer in loaded.named_modules() if type(layer) is nn.Linear}
    heads = {"language_model.lm_head"}
    heads |= {name for name in linear if name.endswith("DenseReluDense.wo")}  # T5 keeps these itself
    assert {name for name in linear if not name.startswith("bridge.")} == heads
    assert all(torch.equal(weight, model.bridge.state_dict()[n]) for n, weight in loaded.bridge.state_dict().items())

    twin = dequantised_twin(loaded, model)
    expected = gradients_of(twin, processor)
    assert relative_error(gradients_of(loaded, processor), expected) < 3 * CLOSE[bits]
    assert relative_error(logits_of(loaded, processor), logits_of(twin, processor)) < CLOSE[bits]
    inputs = inputs_of(model, processor)
    del inputs["labels"]
    written = loaded.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert written.shape == twin.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape
    without_dropout(loaded.bridge)
    for mode in (False, True):  # on a CPU with AVX512-BF16 evaluation has packed 4-bit weights
        assert relative_error(gradients_of(loaded.train(mode), processor), expected) < 3 * CLOSE[bits]


@precisions
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16])
@families
def test_the_bridge_has_the_precision_that_was_asked_for(bridge, dtype, bits, parts, tmp_path):
    _, processor = saved_whole(parts, tmp_path, bridge)
    options = {"bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_storage": torch.bfloat16}
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype, quantization_config=in_bits(bits, **options))
    wanted = torch.float32 if dtype == "auto" else dtype
    assert {parameter.dtype for parameter in loaded.bridge.parameters()} == {wanted}
    assert loaded.bridge.dtype == wanted and loaded.language_model.get_input_embeddings().weight.dtype == wanted
    assert quantised_layers(loaded)
    assert logits_of(loaded, processor).isfinite().all()
    gradients_of(loaded.train(), processor)


@precisions
@pairs
def test_a_quantised_model_comes_back(bridge, language, bits, parts, tmp_path):
    """Saved as it is, after it has run, and as a bridge."""
    model, processor = saved_whole(parts, tmp_path / "whole", bridge, language)
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    for source in ("whole", "bridge"):  # the language model alone is quantised for a bridge
        loaded = AutoModel.from_pretrained(tmp_path / source, quantization_config=in_bits(bits))
        expected = logits_of(loaded, processor)
        optimizer = torch.optim.SGD(loaded.bridge.parameters(), lr=1e-3)
        loaded(**inputs_of(loaded, processor)).loss.backward()
        optimizer.step()
        after = logits_of(loaded, processor)
        assert not torch.equal(after, expected)
        loaded.save_pretrained(tmp_path / f"{source} again")
        torch.testing.assert_close(logits_of(loaded, processor), after, rtol=0, atol=0.0 if bits == 8 else 1e-3)
        again = AutoModel.from_pretrained(tmp_path / f"{source} again")
        assert quantised_layers(again) == quantised_layers(loaded)
        assert relative_error(logits_of(again, processor), after) < (ROUNDED if bits == 4 else 1e-6)
        gradients_of(again, processor)

        loaded.save_pretrained(tmp_path / f"{source} alone", bridge_only=True)
        assert "quantization_config" not in (tmp_path / f"{source} alone" / "config.json").read_text()
        alone = AutoModel.from_pretrained(tmp_path / f"{source} alone")
        assert not quantised_layers(alone)
        twin = copy.deepcopy(model)
        twin.bridge.load_state_dict(loaded.bridge.state_dict())
        assert torch.equal(logits_of(alone, processor), logits_of(twin, processor))
        quantised = AutoModel.from_pretrained(tmp_path / f"{source} alone", quantization_config=in_bits(bits))
        if source == "bridge":
            assert relative_error(logits_of(quantised, processor), after) < (ROUNDED if bits == 4 else 1e-6)


def test_saving_leaves_a_model_in_memory_as_it_is(parts, tmp_path):
    """bitsandbytes forgets to put the scales of packed weights back in order."""
    _, processor = saved_whole(parts, tmp_path, "mlp")
    for nested in (False, True):
        options = {"bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_type": "nf4"}
        loaded = AutoModel.from_pretrained(tmp_path, quantization_config=in_bits(4, **options))
        weights, expected = dequantised_weights(loaded), logits_of(loaded, processor)
        for part in (loaded, loaded.language_model, loaded.vision_model):
            part.state_dict()
            read = dequantised_weights_of(part, loaded)
            assert read and all(relative_error(weight, weights[name]) < 0.01 for name, weight in read.items())
            assert relative_error(logits_of(loaded, processor), expected) < (0.03 if nested else 1e-6)


@pytest.mark.parametrize("source", ["whole", "bridge"])
@precisions
@pairs
def test_models_answer_as_those_of_transformers(bridge, language, bits, source, parts, tmp_path):
    model, _ = compose_from(parts, bridge, language)
    model.save_pretrained(tmp_path, bridge_only=source == "bridge")
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=in_bits(bits))
    theirs = type(model.language_model).from_pretrained(parts / language, quantization_config=in_bits(bits))
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        expected = getattr(theirs, name, None)
        assert getattr(loaded, name, None) == getattr(loaded.language_model, name, None) == expected
        assert getattr(loaded.vision_model, name, None) == (expected if source == "whole" else None)
    assert loaded.get_memory_footprint() < model.get_memory_footprint()
    with pytest.raises(ValueError, match="cannot cast a bitsandbytes model"):
        loaded.to(torch.bfloat16)
    for name in ("half", "float"):
        with pytest.raises(ValueError, match=rf"\.{name}\(\) is not supported for a quantised model"):
            getattr(loaded, name)()
    loaded.to("cpu")


@precisions
@families
def test_a_composed_model_answers_too(bridge, bits, parts, tmp_path):
    language = AutoModelForCausalLM.from_pretrained(parts / "llama", quantization_config=in_bits(bits))
    model, processor = vlbridge.compose(parts / "clip", language, bridge, tokenizer=tiny_tokenizer(),
                                        **BRIDGE_OPTIONS[bridge])  # fmt: skip
    spread_weights(model.bridge)
    assert getattr(model, f"is_loaded_in_{bits}bit") and model.quantization_method == language.quantization_method
    gradients_of(model, processor)
    before = logits_of(model, processor)
    model.save_pretrained(tmp_path / "alone", bridge_only=True)
    model.save_pretrained(tmp_path / "whole")
    assert language.config.quantization_config is not None  # the part is as it was
    for name, options in (("alone", {"quantization_config": in_bits(bits)}), ("whole", {})):
        again = AutoModel.from_pretrained(tmp_path / name, **options)
        assert quantised_layers(again) == quantised_layers(model)
        assert relative_error(logits_of(again, processor), before) < (ROUNDED if bits == 4 else 1e-6)
    assert not quantised_layers(AutoModel.from_pretrained(tmp_path / "alone"))


@precisions
@families
def test_a_source_that_is_quantised_stays_so(bridge, bits, parts, tmp_path):
    """The pinned part is a quantised checkpoint: nothing is asked for when the bridge is loaded."""
    language = AutoModelForCausalLM.from_pretrained(parts / "llama", quantization_config=in_bits(bits))
    language.save_pretrained(tmp_path / "language")
    tiny_tokenizer().save_pretrained(tmp_path / "language")
    model, processor = vlbridge.compose(parts / "clip", tmp_path / "language", bridge, **BRIDGE_OPTIONS[bridge])
    spread_weights(model.bridge)
    expected = logits_of(model, processor)
    for name in ("alone", "whole"):
        model.save_pretrained(tmp_path / name, bridge_only=name == "alone")
        again = AutoModel.from_pretrained(tmp_path / name)
        assert quantised_layers(again) == quantised_layers(model) != set()
        assert relative_error(logits_of(again, processor), expected) < (1e-3 if bits == 4 else 1e-6)
        again.save_pretrained(tmp_path / f"{name} alone", bridge_only=True)
        assert quantised_layers(AutoModel.from_pretrained(tmp_path / f"{name} alone")) == quantised_layers(model)


def test_parts_that_are_quantised_differently_are_saved_as_a_bridge_only(parts, tmp_path):
    given = [cls.from_pretrained(parts / name, quantization_config=in_bits(bits)) for cls, name, bits in
             ((AutoModel, "clip", 8), (AutoModelForCausalLM, "llama", 4))]  # fmt: skip
    model, processor = vlbridge.compose(*given, "mlp", tokenizer=tiny_tokenizer(),
                                        image_processor=clip_image_processor())  # fmt: skip
    assert model.is_loaded_in_4bit and model.is_loaded_in_8bit
    gradients_of(model, processor)
    with pytest.raises(ValueError, match=r"one configuration of the whole model can't describe.*bridge_only=True"):
        model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "alone", bridge_only=True)
    assert not quantised_layers(AutoModel.from_pretrained(tmp_path / "alone"))


# ---------------------------------------------------------------------- without a language model


def classifier_from(parts, bridge):
    cls = vlbridge.FAMILIES[bridge].classifier_class
    options = {name: value for name, value in BRIDGE_OPTIONS[bridge].items() if not name.startswith("cross_attention")}
    return cls.from_vision(str(parts / "clip"), num_labels=3, **options)


@precisions
@families
def test_classifiers(bridge, bits, parts, tmp_path):
    model, processor = classifier_from(parts, bridge)
    spread_weights(model.bridge)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    inputs = {**processor([tiny_image(0), tiny_image(1)], return_tensors="pt"), "labels": torch.tensor([0, 2])}
    for source in ("whole", "bridge"):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / source, quantization_config=in_bits(bits))
        assert {name.partition(".")[0] for name in quantised_layers(loaded)} == {"vision_model"}
        assert getattr(loaded, f"is_loaded_in_{bits}bit")
        twin = dequantised_twin(loaded, model)
        results = []
        for one in (loaded, twin):
            outputs = one(**inputs)
            outputs.loss.backward()
            assert {n for n, p in one.named_parameters() if p.grad is not None} == {
                n for n, _ in one.named_parameters() if n.startswith("bridge.")
            }
            results.append(outputs.logits)
        assert relative_error(*results) < CLOSE[bits]


@precisions
def test_stage_1(bits, parts, tmp_path):
    model, processor = tiny_stage1(vision=str(parts / "clip"))
    spread_weights(model.bridge)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=in_bits(bits))
    assert {name.partition(".")[0] for name in quantised_layers(loaded)} == {"vision_model"}
    twin = dequantised_twin(loaded, model)
    inputs = processor(images=[tiny_image(0), tiny_image(1)], text=["w1 w2", "w3"], return_tensors="pt", padding=True)
    chosen = {"image_negatives": torch.tensor([1, 0]), "text_negatives": torch.tensor([1, 0])}
    gradients = []
    for one in (loaded, twin):
        one(**inputs, **chosen).loss.backward()
        found = {name for name, parameter in one.named_parameters() if parameter.grad is not None}
        assert found and all(name.startswith("bridge.") for name in found)
        gradients.append(torch.cat([p.grad.flatten() for p in one.bridge.parameters() if p.grad is not None]))
    assert relative_error(*gradients) < 3 * CLOSE[bits]


# ---------------------------------------------------------------------- what is asked for


@precisions
def test_the_callers_list_is_kept_and_not_changed(bits, parts, tmp_path):
    saved_whole(parts, tmp_path, "qformer")
    mine = in_bits(bits, llm_int8_skip_modules=["vision_model"])
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=mine)
    assert mine.llm_int8_skip_modules == ["vision_model"]
    names = quantised_layers(loaded)
    assert "language_model.lm_head" in names and {name.partition(".")[0] for name in names} == {"language_model"}
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["quantization_config"]["llm_int8_skip_modules"] == ["vision_model", "bridge"]
    assert quantised_layers(AutoModel.from_pretrained(tmp_path / "again")) == names


@precisions
def test_a_quantised_output_layer(bits, parts, tmp_path):
    """Its packed weight does not say how wide its inputs are."""
    language = AutoModelForCausalLM.from_pretrained(
        parts / "llama", quantization_config=in_bits(bits, llm_int8_skip_modules=["nothing"])
    )
    assert type(language.lm_head) is not nn.Linear
    model, processor = vlbridge.compose(parts / "clip", language, "perceiver", tokenizer=tiny_tokenizer(),
                                        **BRIDGE_OPTIONS["perceiver"])  # fmt: skip
    assert model.bridge.token_rows.output_rows.shape[1] == 128
    spread_weights(model.bridge)
    gradients_of(model, processor)


def test_a_list_that_is_there_names_the_bridge():
    class Config:
        pass

    for name in SKIP_LISTS:
        config = Config()
        setattr(config, name, ["lm_head"])
        assert getattr(without_bridge(config), name) == ["lm_head", "bridge"] and getattr(config, name) == ["lm_head"]
        assert without_bridge({name: ["lm_head"]}) == {name: ["lm_head", "bridge"]}
        setattr(config, name, None)  # the quantiser's own list, which includes the output layer
        assert getattr(without_bridge(config), name) is None


class Rounded(nn.Linear):
    """A linear layer in integers."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=torch.int8), requires_grad=False)

    def forward(self, states):
        return nn.functional.linear(states, self.weight.to(states.dtype) / 100, self.bias)


class RoundingConfig(QuantizationConfigMixin):
    def __init__(self, modules_to_not_convert=None, obedient=True, **kwargs):
        self.quant_method, self.obedient = "rounding", obedient
        self.modules_to_not_convert = modules_to_not_convert


@pytest.fixture
def rounding(monkeypatch):
    """A quantiser of somebody else, registered as transformers documents."""
    from transformers.quantizers import HfQuantizer, auto

    class Rounding(HfQuantizer):
        is_trainable = True

        def is_serializable(self):
            return False

        def _process_model_before_weight_loading(self, model, **kwargs):
            config = self.quantization_config
            kept = self.get_modules_to_not_convert(
                model, config.modules_to_not_convert, model._keep_in_fp32_modules if config.obedient else None
            )
            for name, layer in list(model.named_modules()):
                if type(layer) is nn.Linear and not any(name == k or name.startswith(f"{k}.") for k in kept):
                    model.set_submodule(name, Rounded(layer))

        def param_needs_quantization(self, model, param_name, **kwargs):
            return False

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "rounding", Rounding)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "rounding", RoundingConfig)


@families
def test_any_quantiser_leaves_the_bridge(bridge, rounding, parts, tmp_path):
    saved_whole(parts, tmp_path, bridge)
    for skipped in (None, ["language_model.lm_head"]):
        loaded = AutoModel.from_pretrained(tmp_path, quantization_config=RoundingConfig(skipped))
        rounded = {name for name, layer in loaded.named_modules() if isinstance(layer, Rounded)}
        assert {name.partition(".")[0] for name in rounded} == {"vision_model", "language_model"}
        assert loaded.quantization_method == loaded.language_model.quantization_method == "rounding"


@families
def test_a_quantiser_that_takes_the_bridge_is_refused(bridge, rounding, parts, tmp_path):
    saved_whole(parts, tmp_path, bridge)
    with pytest.raises(ValueError, match=r"rounding quantised the bridge \(.*bridge_only=True.*Or name 'bridge'"):
        AutoModel.from_pretrained(tmp_path, quantization_config=RoundingConfig(obedient=False))
    config = RoundingConfig(["language_model.lm_head"], obedient=False)  # the list is filled in
    assert AutoModel.from_pretrained(tmp_path, quantization_config=config).bridge.dtype == torch.float32


def test_quantised_parts_are_not_trained(parts, tmp_path):
    model, processor = compose_from(parts, "mlp")
    model.freeze(language_model=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=in_bits(4))
    assert loaded.config.freeze_language_model
    gradients_of(loaded, processor)
    for part in ("vision_model", "language_model"):
        with pytest.raises(ValueError, match=rf"freeze\({part}=False\): the {part} is quantised.*LoRA"):
            loaded.freeze(**{part: False})
    gradients_of(loaded, processor)  # nothing was changed


def test_a_part_that_is_loaded_already_is_not_quantised(parts, tmp_path):
    model, _ = compose_from(parts, "mlp")
    model.save_pretrained(tmp_path, bridge_only=True)
    with pytest.raises(ValueError, match=r"quantization_config applies to the language_model, which was passed in"):
        AutoModel.from_pretrained(tmp_path, language_model=model.language_model, quantization_config=in_bits(4))


@families
def test_a_trained_tensor_is_not_put_into_a_quantised_layer(bridge, parts, tmp_path):
    model, processor = compose_from(parts, bridge)
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        model.language_model.get_submodule(name).weight.mul_(1.5)
    assert model.set_frozen_parts(language_model=parts / "llama") == [f"language_model.{name}.weight"]
    model.save_pretrained(tmp_path, bridge_only=True)
    with pytest.raises(ValueError, match=rf"trained language_model.{name}.weight, which is quantised.*'{name}'"):
        AutoModel.from_pretrained(tmp_path, quantization_config=in_bits(8))
    config = in_bits(8, llm_int8_skip_modules=["lm_head", name])
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=config)
    assert torch.equal(
        loaded.get_parameter(f"language_model.{name}.weight"), model.get_parameter(f"language_model.{name}.weight")
    )
    assert logits_of(loaded, processor).isfinite().all()


# ---------------------------------------------------------------------- shapes, training, adapters


@families
def test_layers_that_can_not_be_packed(bridge, parts, tmp_path):
    """SigLIP's, whose rows are no whole blocks; and its pooling head, whose projection transformers leaves alone."""
    model, processor = saved_whole(parts, tmp_path, bridge, "llama", "siglip")
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=in_bits(4))
    assert any(name.startswith("vision_model") for name in quantised_layers(loaded))
    twin = dequantised_twin(loaded, model)
    for _ in range(2):
        assert relative_error(logits_of(loaded, processor), logits_of(twin, processor)) < CLOSE[4]


@precisions
@pairs
def test_trainer_trains_the_bridge(bridge, language, bits, parts, tmp_path):
    """transformers' own Trainer, which refuses models without anything to train, with evaluations before and after."""
    _, processor = saved_whole(parts, tmp_path, bridge, language)
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=in_bits(bits))
    row = dict(inputs_of(loaded, processor))
    before = {name: tensor.clone() for name, tensor in loaded.bridge.state_dict().items()}
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=1, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = Trainer(loaded, arguments, train_dataset=[row], eval_dataset=[row], data_collator=lambda rows: rows[0])
    losses = [trainer.evaluate()["eval_loss"]]
    trainer.train()
    losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] != losses[1]
    changed = {name for name, tensor in loaded.bridge.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(changed) > len(before) / 2
    loaded.save_pretrained(tmp_path / "alone", bridge_only=True)  # the parts have not changed


@precisions
@families
def test_adapters_know_that_they_lie_on_quantised_layers(bridge, bits, parts, tmp_path):
    """PEFT takes its own layers for quantised weights, and merges into them: not into the packed bytes."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import bnb

    model, processor = compose_from(parts, bridge)
    model.save_pretrained(tmp_path, bridge_only=True)
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=in_bits(bits))
    logits_of(loaded, processor)
    config = LoraConfig(r=4, target_modules=r"language_model.*(q_proj|up_proj)", modules_to_save=["bridge"])
    tuned = get_peft_model(loaded, config)
    layers = [layer for layer in tuned.modules() if hasattr(layer, "lora_A")]
    assert layers and all(isinstance(layer, {4: bnb.Linear4bit, 8: bnb.Linear8bitLt}[bits]) for layer in layers)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    tuned.train()
    tuned(**inputs_of(loaded, processor)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in tuned.named_parameters() if "lora_" in n)
    tuned.eval()
    with torch.no_grad():
        expected = tuned(**inputs_of(loaded, processor)).logits
        merged = tuned.merge_and_unload()
        found = merged(**inputs_of(loaded, processor)).logits
    assert relative_error(found, expected) < {4: 0.25, 8: 0.05}[bits]  # the sum is quantised again


@pytest.mark.parametrize("source", ["whole", "bridge"])
@precisions
@pairs
def test_dequantize(bridge, language, bits, source, parts, tmp_path):
    model, processor = compose_from(parts, bridge, language)
    model.save_pretrained(tmp_path, bridge_only=source == "bridge")
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=in_bits(bits))
    twin = dequantised_twin(loaded, model)
    before = logits_of(loaded, processor)  # packs 4-bit weights
    assert loaded.dequantize() is loaded
    assert not quantised_layers(loaded)
    for name in ("quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        assert not any(hasattr(one, name) for one in (loaded, loaded.language_model, loaded.vision_model))
    assert relative_error(logits_of(loaded, processor), logits_of(twin, processor)) < (ROUNDED if bits == 4 else 1e-6)
    assert relative_error(before, logits_of(twin, processor)) < CLOSE[bits]
    gradients_of(loaded, processor)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(
        logits_of(AutoModel.from_pretrained(tmp_path / "again"), processor), logits_of(loaded, processor)
    )
    with pytest.raises(ValueError, match="need to first quantize"):
        loaded.dequantize()


def test_the_saved_bridge_holds_the_bridge(parts, tmp_path):
    model, _ = compose_from(parts, "mlp")
    model.save_pretrained(tmp_path / "plain", bridge_only=True)
    loaded = AutoModel.from_pretrained(tmp_path / "plain", quantization_config=in_bits(4))
    loaded.save_pretrained(tmp_path / "again", bridge_only=True)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
