"""BLIP (2022): official checkpoints, converted, in transformers' own classes, against the official code's outputs."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BlipForConditionalGeneration, BlipForImageTextRetrieval

from vlbridge.convert import convert_blip


FAMILY = "blip"
pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def converted(case, tmp_path_factory):
    """The case's captioner and matcher, converted, and loaded as users load them; and the captioner's processor."""
    sizes = case.meta["config"]
    config = {
        "vision_config": {"num_attention_heads": sizes["vit_heads"]},
        "text_config": {"num_attention_heads": sizes["q_heads"]},
    }
    folders = {name: tmp_path_factory.mktemp(name) / "model" for name in ("caption", "itm")}
    for name, folder in folders.items():
        convert_blip(case.folder / f"{name}.pth", folder, tokenizer=case.folder / "bert-base-uncased", config=config)
    captioner, info = BlipForConditionalGeneration.from_pretrained(folders["caption"], output_loading_info=True)
    assert not any(info.values())
    matcher, info = BlipForImageTextRetrieval.from_pretrained(folders["itm"], output_loading_info=True)
    assert not any(info.values())
    return captioner, matcher, AutoProcessor.from_pretrained(folders["caption"], backend="pil")


def test_special_tokens(case, converted):
    *_, processor = converted
    special = case.meta["special"]
    tokens = {"dec": "[DEC]", "enc": "[ENC]", "sep": "[SEP]"}
    assert {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()} == special


def test_captioner(case, converted):
    captioner, *_ = converted
    given = {name: case.inputs[f"caption.{name}"] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        outputs = captioner(pixel_values=case.inputs["pixel_values"], **given)
    torch.testing.assert_close(outputs.image_embeds, case.outputs["caption.image_embeds"], **case.tolerance)
    attended = given["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[attended], case.outputs["caption.logits"][attended], **case.tolerance)
    torch.testing.assert_close(outputs.loss, case.outputs["caption.loss"].squeeze(), **case.tolerance)


@pytest.mark.parametrize("name", ["greedy", "beam3"])
def test_captions(case, converted, name):
    """The official settings; what `generate` cuts off at the prompt's end is its `[SEP]`."""
    captioner, *_ = converted
    settings = case.meta["gen"][name]
    assert settings["eos_token_id"] == captioner.config.text_config.sep_token_id
    assert settings["pad_token_id"] == captioner.config.text_config.pad_token_id
    prompt = case.inputs["caption.prompt_ids"]
    prompt = torch.cat([prompt, torch.full_like(prompt[:, :1], settings["eos_token_id"])], dim=1)
    ids = captioner.generate(
        case.inputs["pixel_values"],
        prompt,
        do_sample=False,
        **{name: settings[name] for name in ("num_beams", "max_length", "min_length", "repetition_penalty")},
    )
    assert ids.tolist() == case.outputs[f"caption.generate.{name}.ids"].tolist()


def test_matcher(case, converted):
    """The official matching head reads `[ENC]` where transformers' class leaves `[CLS]`, so it is put there."""
    _, matcher, _ = converted
    ids, mask = case.inputs["itm.input_ids"], case.inputs["itm.attention_mask"]
    encoded = ids.clone()
    encoded[:, 0] = case.meta["special"]["enc"]
    images = case.inputs["pixel_values"]
    with torch.no_grad():
        matching = matcher(encoded, images, attention_mask=mask)
        similarity = matcher(ids, images, attention_mask=mask, use_itm_head=False)
    torch.testing.assert_close(matching.last_hidden_state, case.outputs["itm.image_embeds"], **case.tolerance)
    torch.testing.assert_close(matching.itm_score, case.outputs["itm.itm_logits"], **case.tolerance)
    torch.testing.assert_close(similarity.itm_score, case.outputs["itm.itc_sim"], **case.tolerance)


def test_processor(case, converted):
    """From the picture files on, the official pixels."""
    *_, processor = converted
    images = [Image.open(path).convert("RGB") for path in sorted((case.folder / "images").glob("*.png"))]
    inputs = processor(images=images, text=["a picture of "] * len(images), return_tensors="pt")
    official = case.inputs["pixel_values"]
    assert case.same_pixels(inputs["pixel_values"], official)
    # `generate` puts [DEC] first and leaves [SEP] out
    assert inputs["input_ids"][:, 1:-1].tolist() == case.inputs["caption.prompt_ids"][:, 1:].tolist()
