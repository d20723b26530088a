"""A bridge that is saved alone, and its summary, are the same whatever was done with the model before."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import (
    BRIDGE_OPTIONS,
    LANGUAGE,
    VISION,
    VOCAB,
    clip_image_processor,
    spread_weights,
    tiny_image,
    tiny_tokenizer,
)
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, BitsAndBytesConfig, Trainer, TrainingArguments

import vlbridge
from vlbridge.summary import summarize, summary_lines


families = pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
IN_ENCODER = r".*vision_model.*(q_proj|v_proj)"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(3)
    models = {
        "clip": AutoModel.from_config(VISION["clip"]()),
        "llama": AutoModelForCausalLM.from_config(LANGUAGE["llama"]()),
    }
    for name, model in models.items():
        spread_weights(model)
        model.save_pretrained(folder / name)
        (clip_image_processor() if name == "clip" else tiny_tokenizer()).save_pretrained(folder / name)
    return folder


def compose_from(parts, bridge):
    torch.manual_seed(5)
    model, processor = vlbridge.compose(parts / "clip", parts / "llama", bridge, **BRIDGE_OPTIONS[bridge])
    spread_weights(model.bridge)
    return model, processor


def inputs_of(processor):
    return processor(images=[tiny_image(0)], text=["<image>what is it?"], return_tensors="pt")


@torch.no_grad()
def logits_of(model, processor):
    return model(**inputs_of(processor)).logits


def about(folder) -> dict:
    """Summary of a folder, without its name; the lines of `vlbridge info` must not fail either."""
    summary = summarize(folder)
    assert any("bridge" in line for line in summary_lines(summary))
    summary.pop("model")
    for part in summary["parts"]:
        part["source"] = str(part["source"]).replace(str(folder), "")
    return summary


def check_same_bridge(folder, reference) -> None:
    """Same tensors, configuration and summary."""
    found, expected = (load_file(path / "model.safetensors") for path in (folder, reference))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, reference)]
    for config in configs:
        config.pop("use_cache", None)  # Trainer writes it into the configuration of every model
    assert configs[0] == configs[1]
    assert about(folder) == about(reference)


def generated(model, processor, parts):
    inputs = inputs_of(processor)
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2},
                    {"cache_implementation": "static", "disable_compile": True}):  # fmt: skip
        model.generate(**inputs, max_new_tokens=3, **options)


def given_labels(model, processor, parts):
    inputs = inputs_of(processor)
    model.train()
    model(**inputs, labels=inputs["input_ids"].clone().clamp(max=VOCAB - 1)).loss.backward()
    model.zero_grad()
    model.eval()


def evaluated(model, processor, parts):
    """By transformers' Trainer, with label smoothing."""
    row = {**inputs_of(processor)}
    row["labels"] = row["input_ids"].masked_fill(row["input_ids"] >= VOCAB, -100)
    arguments = TrainingArguments(parts / "run", report_to=[], use_cpu=True, label_smoothing_factor=0.1)
    Trainer(model, arguments, eval_dataset=[row], data_collator=lambda rows: rows[0]).evaluate()


def adapted_and_back(model, processor, parts):
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=IN_ENCODER))
    with pytest.raises(ValueError, match=r"lose changes of the vision_model.*it carries adapters"):
        model.save_pretrained(parts / "adapted", bridge_only=True)
    assert tuned.unload() is model
    model.freeze()


def with_more_tokens(model, processor, parts):
    processor.tokenizer.add_tokens(["<one>", "<two>"], special_tokens=True)


def resized_and_back(model, processor, parts):
    head, table = model.get_output_embeddings().weight.clone(), model.get_input_embeddings().weight.clone()
    model.resize_token_embeddings(VOCAB + 9)
    model.resize_token_embeddings(VOCAB)
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert torch.equal(model.get_input_embeddings().weight, table)


def dropped_and_tied(model, processor, parts):
    model.tie_weights()
    model.set_output_embeddings(model.get_output_embeddings())
    model.set_input_embeddings(model.get_input_embeddings())


UNCHANGED = [generated, given_labels, evaluated, adapted_and_back, with_more_tokens, resized_and_back, dropped_and_tied]


@pytest.mark.parametrize("use", UNCHANGED, ids=lambda use: use.__name__)
@families
def test_use_leaves_no_trace(bridge, use, parts, tmp_path):
    model, processor = compose_from(parts, bridge)
    model.save_pretrained(tmp_path / "before", bridge_only=True)
    model.save_pretrained(tmp_path / "whole before")
    expected = logits_of(model, processor)
    use(model, processor, parts)
    model.save_pretrained(tmp_path / "after", bridge_only=True)
    processor.save_pretrained(tmp_path / "after")
    check_same_bridge(tmp_path / "after", tmp_path / "before")
    model.save_pretrained(tmp_path / "whole after")
    check_same_bridge(tmp_path / "whole after", tmp_path / "whole before")
    for folder in ("after", "whole after"):
        again = AutoModel.from_pretrained(tmp_path / folder)
        assert torch.equal(logits_of(again, AutoProcessor.from_pretrained(tmp_path / "after")), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("source", ["whole", "bridge"])
@families
def test_quantisation_leaves_no_trace(bridge, source, bits, parts, tmp_path):
    """In the bridge; the summary of a model that is saved quantised counts its parameters, not the packed numbers."""
    model, _ = compose_from(parts, bridge)
    model.save_pretrained(tmp_path / "before", bridge_only=True)
    model.save_pretrained(tmp_path / "whole before")
    folder = tmp_path / ("before" if source == "bridge" else "whole before")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    loaded = AutoModel.from_pretrained(folder, quantization_config=config)
    loaded.save_pretrained(tmp_path / "after", bridge_only=True)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("after", "before"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    pins = [json.loads((tmp_path / name / "config.json").read_text())["frozen_parts"] for name in ("after", "before")]
    assert pins[0] == pins[1]
    assert about(tmp_path / "after") == about(tmp_path / "before")
    loaded.save_pretrained(tmp_path / "whole after")
    counts = ("parameters", "trainable_parameters", "image_tokens", "context_window")
    assert [about(tmp_path / "whole after")[name] for name in counts] == [about(folder)[name] for name in counts]


def resized(model):
    model.resize_token_embeddings(VOCAB + 9)
    return {"language_model.lm_head.weight", "language_model.model.embed_tokens.weight"}


def new_head(model):
    head = torch.nn.Linear(32, VOCAB, bias=False)
    model.set_output_embeddings(head.requires_grad_(False))
    return {"language_model.lm_head.weight"}


def merged(model):
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=IN_ENCODER, init_lora_weights=False))
    tuned.merge_and_unload()
    return {name for name, _ in model.named_parameters()
            if name.startswith("vision_model.") and name.endswith(("q_proj.weight", "v_proj.weight"))}  # fmt: skip


@pytest.mark.parametrize("change", [resized, new_head, merged], ids=lambda change: change.__name__)
@families
def test_changes_of_a_part_are_not_lost(bridge, change, parts, tmp_path):
    """Refused by name; or saved with the bridge, when the changed tensors are to travel with it."""
    model, processor = compose_from(parts, bridge)
    model.save_pretrained(tmp_path / "before", bridge_only=True)
    names = change(model)
    part = next(iter(names)).partition(".")[0]
    with pytest.raises(
        ValueError, match=rf"bridge_only=True would lose changes of the {part}.*set_frozen_parts"
    ) as error:
        model.save_pretrained(tmp_path / "alone", bridge_only=True)
    assert any(name.removeprefix(f"{part}.") in str(error.value) for name in names)
    folder = parts / {"language_model": "llama", "vision_model": "clip"}[part]
    assert set(model.set_frozen_parts(**{part: folder})) == names
    expected = logits_of(model, processor)
    for name in ("alone", "whole"):
        model.save_pretrained(tmp_path / name, bridge_only=name == "alone")
        assert torch.equal(logits_of(AutoModel.from_pretrained(tmp_path / name), processor), expected)
        assert about(tmp_path / name)["parameters"] == sum(parameter.numel() for parameter in model.parameters())
