"""Records to model inputs: what is learned, against the official rules done the slow way; batches and single rows."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import COMBINATIONS, tiny_image, tiny_model, tiny_stage1
from toy_records import TEXT, caption, document, talk

from vlbridge.inference import question_inputs
from vlbridge.processing.processing_bridged import mark_answers
from vlbridge.training.training_encoding import IGNORED, SampleError, encoder_for


# a template without {% generation %}, and one that tells what it wrote before
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = "{{ messages[-1].content }}{% if add_generation_prompt %}{{ '>' }}{% endif %}"


RECORDS = [caption("two dogs", 0), caption("a sea", 1), talk("what?", "a cat", "why is that so?", "so", seed=2)]


def learned(encoder, sample: dict) -> str:
    return encoder.tokenizer.decode(sample["labels"][sample["labels"] != IGNORED])


def ids_of(processor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------------- what is learned


def test_llava_stage_1_learns_the_caption_behind_the_image():
    model, processor = tiny_model("mlp")
    sample = encoder_for(model, processor).encode(caption("two dogs"))
    said = ids_of(processor, "two dogs\n")  # preprocess_plain
    assert sample["input_ids"].tolist() == [processor.image_token_id] * 25 + said
    assert sample["labels"].tolist() == [IGNORED] * 25 + said
    assert sample["pixel_values"].shape == (1, 3, 30, 30)


@pytest.mark.parametrize(("family", "language"), COMBINATIONS)
def test_captions_are_learned_as_they_are_asked_for(family, language):
    """What `vlbridge caption` gives the model is what stands before the caption in training."""
    model, processor = tiny_model(family, language)
    encoder = encoder_for(model, processor, ask_for_captions=True)
    record = caption("two dogs", 3)
    asked = question_inputs(processor, encoder.images_of(record), processor.caption_prompt)
    sample = encoder.encode(record)
    length = asked["input_ids"].shape[1]
    assert sample["input_ids"][:length].tolist() == asked["input_ids"][0].tolist()
    assert learned(encoder, sample).replace("<|endofchunk|>", "").removesuffix("</s>").strip() == "two dogs"
    prompt, wanted = encoder.prompt_of(record)
    assert wanted == "two dogs" and prompt["input_ids"].tolist() == asked["input_ids"].tolist()
    torch.testing.assert_close(prompt["pixel_values"], asked["pixel_values"])
    with pytest.raises(ValueError, match="leave prompt and prefix_lm out"):
        encoder_for(model, processor, ask_for_captions=True, prompt="a photo of")


def test_the_plain_conversation_leaves_out_what_the_user_says():
    model, processor = tiny_model("mlp", conversation="vicuna_v1")
    encoder = encoder_for(model, processor, conversation="plain")
    assert encoder.encode(talk("describe it", "two dogs"))["input_ids"].tolist() == (
        encoder.encode(caption("two dogs"))["input_ids"].tolist()
    )


CHATML_WAYS = {
    "SmolLM2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "written out": (
        '{%- for message in messages -%}\n    {{- "<|im_start|>" + message.role + "\\n" + message.content | trim + '
        '"<|im_end|>\\n" -}}\n{%- endfor -%}\n{%- if add_generation_prompt -%}\n'
        '    {{- "<|im_start|>assistant\\n" -}}\n{%- endif -%}'
    ),
}


@pytest.mark.core
@pytest.mark.parametrize("way", CHATML_WAYS)
def test_answers_in_chatml_are_marked(way):
    """The text stays, and the marks are the answers that were found in the template without them."""
    template = CHATML_WAYS[way]
    model, processor = tiny_model("mlp")
    processor.tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": [{"type": "text", "text": "so"}]},
    ]
    processor.chat_template = processor.build_chat_template(processor.tokenizer, template)
    assert "{% generation %}" in processor.chat_template
    marked = encoder_for(model, processor).answer_spans(messages)
    unmarked = copy.deepcopy(processor)
    unmarked.chat_template = processor.build_chat_template(processor.tokenizer, "MARK").replace("MARK", template)
    assert "generation %}" not in unmarked.chat_template
    assert encoder_for(model, unmarked).answer_spans(messages) == marked
    text, spans = marked
    assert [text[start:end] for start, end in spans] == ["a cat<|im_end|>", "so<|im_end|>"]
    prompts = [each.apply_chat_template(messages[:1], add_generation_prompt=True) for each in (processor, unmarked)]
    assert prompts[0] == prompts[1] and prompts[0].endswith("<|im_start|>assistant\n")
    assert mark_answers(processor.chat_template) == processor.chat_template
    assert mark_answers(FORGETFUL) == FORGETFUL


@pytest.mark.parametrize("conversation", ["vicuna_v1", "mistral_instruct", "v0"])
def test_templates_that_mark_answers_are_believed(conversation):
    model, processor = tiny_model("mlp", conversation=conversation)
    record = talk("what?", "a cat", "why?", "so")
    sample = encoder_for(model, processor).encode(record)
    messages = [
        {
            **m,
            "content": [{"type": "image", "image": tiny_image(0)} if i["type"] == "image" else i for i in m["content"]],
        }
        for m in record["messages"]
    ]
    out = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    assert sample["input_ids"].tolist() == out["input_ids"][0].tolist()
    assert ((sample["labels"] != IGNORED) == out["assistant_masks"][0].bool()).all()
    torch.testing.assert_close(sample["pixel_values"], out["pixel_values"])


@pytest.mark.parametrize("bridge", ["mlp", "qformer", "perceiver"])
def test_answers_of_other_templates_are_found_up_to_their_end(bridge):
    model, processor = tiny_model(bridge)
    processor.tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    processor.chat_template = processor.build_chat_template(processor.tokenizer, CHATML)
    encoder = encoder_for(model, processor)
    sample = encoder.encode(talk("what?", "a cat", "why?", "so"))
    assert learned(encoder, sample) == "a cat<|im_end|>so<|im_end|>"


@pytest.mark.parametrize("bridge", ["mlp", "qformer", "perceiver"])
def test_the_vocabulary_is_not_read_for_every_record(monkeypatch, bridge):
    """A fast tokenizer builds it anew each time: with 50 k words it took more than half of a training step."""
    model, processor = tiny_model(bridge)
    processor.chat_template = processor.build_chat_template(processor.tokenizer, CHATML)
    encoder = encoder_for(model, processor)
    wanted = [encoder.encode(record) for record in RECORDS]
    monkeypatch.setattr(type(processor.tokenizer), "get_vocab", lambda self: pytest.fail("the vocabulary was read"))
    for sample, record in zip(wanted, RECORDS, strict=True):
        assert torch.equal(encoder.encode(record)["labels"], sample["labels"])


def test_templates_that_change_earlier_turns_are_refused():
    model, processor = tiny_model("mlp")
    processor.chat_template = processor.build_chat_template(processor.tokenizer, FORGETFUL)
    with pytest.raises(SampleError, match="does not write turns one after the other"):
        encoder_for(model, processor).encode(talk("what?", "a cat", "why?", "so"))


@pytest.mark.parametrize(("prompt", "end"), [("", None), ("a photo of", None), ("a photo of ", "\n")])
def test_blip2_learns_the_caption_behind_the_prompt(prompt, end):
    model, processor = tiny_model("qformer", "opt")
    sample = encoder_for(model, processor, prompt=prompt, end=end).encode(caption("two dogs"))
    said = "two dogs" + ("</s>" if end is None else end)
    said = f" {said}" if prompt == "a photo of" else said
    begin = [processor.image_token_id] * 5 + ids_of(processor, prompt)
    assert sample["input_ids"].tolist() == begin + ids_of(processor, said)
    assert sample["labels"].tolist() == [IGNORED] * len(begin) + ids_of(processor, said)


@pytest.mark.parametrize("bridge", ["mlp", "qformer"])
def test_encoder_decoders_read_the_prompt_and_write_the_caption(bridge):
    model, processor = tiny_model(bridge, "t5")
    sample = encoder_for(model, processor, prompt="a photo of").encode(caption("two dogs"))
    assert sample["labels"].tolist() == [*ids_of(processor, "two dogs"), 2]
    assert processor.tokenizer.decode(sample["input_ids"]).endswith("a photo of")
    sample = encoder_for(model, processor).encode(talk("what?", "a cat", "why?", "so"))
    assert sample["labels"].tolist() == [*ids_of(processor, "so"), 2]
    assert "a cat" in processor.tokenizer.decode(sample["input_ids"])


def test_prefix_lm_splits_captions_by_record_not_by_chance():
    model, processor = tiny_model("qformer", "t5")
    text, splits = "one two three four five six", set()
    for seed in range(12):
        encoder = encoder_for(model, processor, prefix_lm=True, seed=seed)
        sample = encoder.encode(caption(text))
        read = processor.tokenizer.decode(sample["input_ids"][5:]).strip()
        written = processor.tokenizer.decode(sample["labels"][:-1]).strip()
        assert f"{read} {written}".strip() == text and written
        assert encoder.encode(caption(text))["labels"].tolist() == sample["labels"].tolist()
        splits.add(len(written))
    assert len(splits) > 2
    with pytest.raises(ValueError, match="decoder-only"):
        encoder_for(*tiny_model("qformer", "opt"), prefix_lm=True)


def official_flamingo_labels(ids: list[int], image_id: int, end_of_chunk: int) -> list[int]:
    """What OpenFlamingo's training loop does with an interleaved document's labels, token by token."""
    labels = list(ids)
    place = 0
    while place < len(labels) and ids[place] != image_id:
        labels[place] = IGNORED
        place += 1
    for number, token in enumerate(ids):
        if token == end_of_chunk:
            place = number + 1
            while place < len(ids) and ids[place] != image_id:
                labels[place] = IGNORED
                place += 1
    return [IGNORED if token == image_id else token for token in labels]


def test_flamingo_pairs_and_documents_are_chunks():
    model, processor = tiny_model("perceiver")
    encoder = encoder_for(model, processor)
    pair = encoder.encode(caption(" two dogs "))
    text = "<image>two dogs<|endofchunk|></s>"
    assert pair["input_ids"].tolist() == ids_of(processor, text)
    assert pair["labels"].tolist() == [IGNORED, *ids_of(processor, text)[1:]]
    for record, text in (
        (document("before", 0, "one", "more", 1, "two"), "before<|endofchunk|><image>one more<|endofchunk|><image>two"),
        (document(0, "one", 1, 2, "two", "end"), "<image>one<|endofchunk|><image><|endofchunk|><image>two end"),
    ):
        sample = encoder.encode(record)
        text = text.replace("<|endofchunk|>", "", 1) if text.startswith("before") else text
        ids = ids_of(processor, f"{text}<|endofchunk|></s>")
        assert sample["input_ids"].tolist() == ids
        special = (processor.image_token_id, processor.tokenizer.convert_tokens_to_ids("<|endofchunk|>"))
        assert sample["labels"].tolist() == official_flamingo_labels(ids, *special)


def test_documents_keep_their_first_images():
    model, processor = tiny_model("perceiver")
    sample = encoder_for(model, processor, max_images=1).encode(document(0, "one", 1, "two"))
    assert sample["input_ids"].tolist() == ids_of(processor, "<image>one two<|endofchunk|></s>")
    assert len(sample["pixel_values"]) == 1


def test_blip2_answers_end_as_captions_do():
    model, processor = tiny_model("qformer")
    encoder = encoder_for(model, processor)
    sample = encoder.encode(talk("what?", "a cat"))
    assert learned(encoder, sample) == "a cat</s>" and sample["input_ids"][-1] == 2


def test_instruction_aware_qformers_read_the_question_not_the_answer():
    from tiny import QFORMER, bert_like_tokenizer

    model, processor = tiny_model("qformer", qformer_config={**QFORMER, "use_text": True, "vocab_size": 60})
    processor.qformer_tokenizer = bert_like_tokenizer()
    encoder = encoder_for(model, processor)
    sample = encoder.encode(talk("w1 w2", "w7", "w3", "w9"))
    read = processor.qformer_tokenizer.decode(sample["qformer_input_ids"][0], skip_special_tokens=True)
    assert read == "w1 w2 w3"
    batch = encoder.collate([sample, encoder.encode(talk("w4", "w5", seed=1))])
    assert batch["qformer_attention_mask"].sum(dim=1).tolist() == [5, 3]
    assert model(**batch).loss.isfinite()


def test_stage_1_takes_pairs():
    model, processor = tiny_stage1()
    encoder = encoder_for(model, processor)
    batch = encoder.collate([encoder.encode(caption("w1 w2")), encoder.encode(caption("w3", 1))])
    expected = processor(images=[tiny_image(0), tiny_image(1)], text=["w1 w2", "w3"], padding=True, return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask", "pixel_values", "image_ids"}
    for name in expected:
        torch.testing.assert_close(batch[name], expected[name])
    again = [encoder.encode(caption(text, seed))["image_ids"] for text, seed in (("w1 w2", 3), ("w3", 4))]
    assert torch.cat(again).tolist() == batch["image_ids"].tolist()  # same captions are no negatives of each other
    with pytest.raises(SampleError, match="stage 1 learns from captions"):
        encoder.encode(talk("w1", "w2"))
    with pytest.raises(ValueError, match="no option end, prefix_lm"):
        encoder_for(model, processor, end="w1", prefix_lm=True)


# ---------------------------------------------------------------------- lengths


@pytest.mark.parametrize("bridge", ["mlp", "qformer", "perceiver"])
def test_long_samples_are_cut_in_front_of_images_that_do_not_fit(bridge):
    model, processor = tiny_model(bridge)
    record = document(0, "first", 1, "second")
    whole = encoder_for(model, processor).encode(record)
    at = (whole["input_ids"] == processor.image_token_id).nonzero()[:, 0]
    per_image = len(at) // 2
    for limit in (len(whole["input_ids"]) - 2, int(at[per_image]) + 1, int(at[per_image]), int(at[per_image - 1]) + 3):
        cut = encoder_for(model, processor, max_length=limit).encode(record)
        images = 2 if limit > int(at[-1]) else 1
        assert len(cut["pixel_values"]) == images
        length = len(cut["input_ids"])
        assert length <= limit and cut["input_ids"].tolist() == whole["input_ids"][:length].tolist()
        assert int((cut["input_ids"] == processor.image_token_id).sum()) == images * per_image
        assert model(**encoder_for(model, processor).collate([cut])).loss.isfinite()
    with pytest.raises(SampleError, match="max_length=1"):
        encoder_for(model, processor, max_length=1).encode(record)


def test_tiles_of_images_that_do_not_fit_go_too():
    model, processor = tiny_model("mlp", image_aspect_ratio="anyres")
    record = document(0, "first", 1, "second")
    whole = encoder_for(model, processor).encode(record)
    encoder = encoder_for(model, processor, max_length=len(whole["input_ids"]) - 20)
    cut = encoder.encode(record)
    assert len(cut["image_sizes"]) == 1 and 2 * len(cut["pixel_values"]) == len(whole["pixel_values"])
    assert model(**encoder.collate([cut])).loss.isfinite()


def test_records_that_teach_nothing_are_refused():
    encoder = encoder_for(*tiny_model("mlp"), max_length=25)
    with pytest.raises(SampleError, match="nothing to learn within max_length=25"):
        encoder.encode(caption())
    with pytest.raises(SampleError, match="places for 1 images, the record has 0"):
        encoder.encode({**talk("what?", "a cat"), "images": []})
    model, processor = tiny_model("mlp")
    with pytest.raises(ValueError, match="'llama'; expected a bridged model, such as mlp_llava"):
        encoder_for(model.language_model, processor)


# ---------------------------------------------------------------------- batches


@pytest.mark.core
@pytest.mark.parametrize(("bridge", "language"), COMBINATIONS)
def test_rows_of_a_batch_are_what_they_are_alone(bridge, language):
    model, processor = tiny_model(bridge, language)
    encoder = encoder_for(model, processor)
    samples = [encoder.encode(record) for record in RECORDS]
    batch = encoder.collate(samples)
    outputs = model(**batch)
    losses = []
    for row, sample in enumerate(samples):
        single = encoder.collate([sample])
        alone = model(**single)
        kept = single["labels"].shape[1]
        assert batch["labels"][row, kept:].eq(IGNORED).all()
        torch.testing.assert_close(outputs.logits[row, :kept], alone.logits[0], atol=2e-5, rtol=1e-4)
        losses.append(alone.loss * (single["labels"] != IGNORED).sum())
    total = (batch["labels"] != IGNORED).sum()
    torch.testing.assert_close(outputs.loss, sum(losses) / total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("bridge", "language"), [("mlp", "llama"), ("qformer", "t5"), ("perceiver", "opt")])
def test_prompts_are_what_stands_in_front_of_what_is_learned(bridge, language):
    model, processor = tiny_model(bridge, language)
    encoder = encoder_for(model, processor)
    inputs, wanted = encoder.prompts(RECORDS)
    assert wanted == ["two dogs", "a sea", "so"]
    for row, record in enumerate(RECORDS):
        sample = encoder.encode(record)
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        assert sample["input_ids"][: len(prompt)].tolist() == prompt
        if not model.config.is_encoder_decoder:
            assert sample["labels"][len(prompt)] != IGNORED
        generated = model.generate(**inputs, **encoder.generation_options(model, 5))
        alone, _ = encoder.prompts([record])
        single = model.generate(**alone, **encoder.generation_options(model, 5))
        assert encoder.decode(generated, inputs)[row] == encoder.decode(single, alone)[0]


def test_text_without_images():
    record = {**talk("what?", "a cat"), "images": []}
    record["messages"][0]["content"] = [TEXT("what?")]
    for bridge in ("mlp", "qformer", "perceiver"):
        model, processor = tiny_model(bridge)
        encoder = encoder_for(model, processor)
        sample = encoder.encode(record)
        assert "pixel_values" not in sample
        assert model(**encoder.collate([sample])).loss.isfinite()
        assert model(**encoder.collate([sample, encoder.encode(caption())])).loss.isfinite()
