"""Processors of Q-Former BLIP-2: instructions for the Q-Former, both tokenizers saved, and stage 1's pairs."""

from __future__ import annotations

import pytest
import torch
from tiny import QFORMER, bert_like_tokenizer, tiny_image, tiny_model
from transformers import AutoProcessor, CLIPImageProcessor

import vlbridge
from vlbridge.processing.processing_qformer import bert_tokenizer


QFORMER_TEXT = {**QFORMER, "use_text": True, "vocab_size": 50, "max_position_embeddings": 40}
TEXTS = ["<image>w1 w2?", "no picture", "w3 <image> w4\n<image>w5"]


def instructed():
    model, plain = tiny_model("qformer", qformer_config=dict(QFORMER_TEXT))
    processor = vlbridge.QFormerBlip2Processor.from_config(
        model.config, plain.image_processor, plain.tokenizer, qformer_tokenizer=bert_like_tokenizer()
    )
    return model, processor


def images(count: int):
    return [tiny_image(seed) for seed in range(count)]


@pytest.mark.core
def test_every_image_has_its_instruction():
    model, processor = instructed()
    inputs = processor(images=images(3), text=TEXTS, return_tensors="pt", padding=True)
    # "w2?" is no word of this tokenizer
    assert inputs["qformer_input_ids"].tolist() == [[2, 6, 1, 3, 0], [2, 8, 9, 10, 3], [2, 8, 9, 10, 3]]
    assert torch.equal(inputs["qformer_attention_mask"], (inputs["qformer_input_ids"] != 0).long())
    assert len(inputs["pixel_values"]) == 3
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    alone = processor(images=images(1), text=TEXTS[0], return_tensors="pt")
    assert model.generate(**alone, max_new_tokens=2, do_sample=False)[0, -2:].tolist() == ids[0, -2:].tolist()


def test_nothing_for_the_qformer_without_images_or_tensors():
    _, processor = instructed()
    assert "qformer_input_ids" not in processor(text=["no picture"], return_tensors="pt")
    lists = processor(images=images(1), text=TEXTS[:1])
    assert lists["qformer_input_ids"] == [[2, 6, 1, 3]]
    assert {"qformer_input_ids", "qformer_attention_mask"} <= set(processor.model_input_names)


def test_instruction_of_its_own():
    _, processor = instructed()
    inputs = processor(images=images(3), text=TEXTS, qformer_text=["w7", "w8", "w9"], return_tensors="pt", padding=True)
    assert inputs["qformer_input_ids"].tolist() == [[2, 12, 3], [2, 14, 3], [2, 14, 3]]
    with pytest.raises(ValueError, match="1 of qformer_text, but 3 texts"):
        processor(images=images(3), text=TEXTS, qformer_text="w7")
    _, plain = tiny_model("qformer")
    with pytest.raises(ValueError, match="needs a qformer_tokenizer"):
        plain(images=images(1), text=TEXTS[:1], qformer_text="w7")


def test_long_instructions_are_cut_off():
    _, processor = instructed()
    processor.qformer_max_length = 4
    inputs = processor(images=images(1), text=["<image>w1 w2 w3 w4 w5"], return_tensors="pt")
    assert inputs["qformer_input_ids"].tolist() == [[2, 6, 7, 3]]


@pytest.mark.core
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_saved_with_both_tokenizers(with_tokenizer, tmp_path):
    _, processor = instructed() if with_tokenizer else tiny_model("qformer")
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "qformer_tokenizer" / "tokenizer_config.json").exists() == with_tokenizer
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor) and again.qformer_max_length == 128
    assert (again.qformer_tokenizer is not None) == with_tokenizer
    one, other = (p(images=images(3), text=TEXTS, return_tensors="pt", padding=True) for p in (processor, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_qformer_that_reads_no_text_is_refused():
    model, plain = tiny_model("qformer")
    with pytest.raises(ValueError, match="reads images only"):
        vlbridge.QFormerBlip2Processor.from_config(
            model.config, plain.image_processor, plain.tokenizer, qformer_tokenizer=bert_like_tokenizer()
        )
    small, _ = tiny_model("qformer", qformer_config={**QFORMER_TEXT, "vocab_size": 20})
    with pytest.raises(ValueError, match="has 49 tokens, the Q-Former 20"):
        vlbridge.QFormerBlip2Processor.from_config(
            small.config, plain.image_processor, plain.tokenizer, qformer_tokenizer=bert_like_tokenizer()
        )


@pytest.mark.core
def test_pairs_for_stage1(tmp_path):
    tokenizer = bert_tokenizer(bert_like_tokenizer())
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("[DEC]", 49)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    processor = vlbridge.QFormerBlip2PreTrainingProcessor(image_processor, tokenizer, max_length=5)
    processor.save_pretrained(tmp_path)
    for each in (processor, AutoProcessor.from_pretrained(tmp_path)):
        inputs = each(images=images(2), text=["w0", "w1 w2 w3 w4 w5"], return_tensors="pt")
        assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"}
        assert inputs["input_ids"].tolist() == [[2, 5, 3, 0, 0], [2, 6, 7, 8, 3]]
        assert inputs["pixel_values"].shape == (2, 3, 30, 30)
    assert processor.batch_decode([[49, 6, 7, 3]], skip_special_tokens=True) == ["w1 w2"]


def test_another_stage1_model_is_refused():
    config = vlbridge.QFormerBlip2PreTrainingConfig(
        qformer_config={"vocab_size": 50}, bos_token_id=49, eos_token_id=3, pad_token_id=0
    )
    tokenizer = bert_tokenizer(bert_like_tokenizer())
    vlbridge.QFormerBlip2PreTrainingProcessor(CLIPImageProcessor(), tokenizer).check(config)
    config.bos_token_id = 48
    with pytest.raises(ValueError, match="bos_token_id is 49, the model's is 48"):
        vlbridge.QFormerBlip2PreTrainingProcessor(CLIPImageProcessor(), tokenizer).check(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bos_token_id": 60}, "bos_token_id is 60; expected an id within the Q-Former's 50 tokens"),
        ({"pad_token_id": 1}, "pad_token_id is 1, but the Q-Former's is 0"),
        ({"itm_weight": -1.0}, "can't be negative"),
    ],
    ids=str,
)
def test_configurations_that_contradict_themselves(fields, message):
    options = {"bos_token_id": 49, "eos_token_id": 3, **fields}
    with pytest.raises(ValueError, match=message):
        vlbridge.QFormerBlip2PreTrainingConfig(qformer_config={"vocab_size": 50}, **options)
