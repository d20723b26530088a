"""Packing: every sample of a row, and every answer behind the shared prefix, is what it is alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from easy_vqa import PackedConversations, Stage, answer_all, blind_baseline, conversation, kind_of, warm_up
from tiny import QFORMER, VISION, VOCAB, bert_like_tokenizer, tiny_image, tiny_model, tiny_stage1, tiny_tokenizer
from torch.utils.data import DataLoader
from toy_records import assert_same, caption, document, image, loss_and_gradients, talk
from transformers import BloomConfig, FalconConfig

import vlbridge
from vlbridge.modeling.modeling_bridge import additive_mask
from vlbridge.training.training_easy_vqa import (
    COLORS,
    SHAPES,
    Example,
    caption_of,
    matched_pair,
    properties_of,
    yes_no_templates,
)
from vlbridge.training.training_encoding import IGNORED, SampleError, encoder_for
from vlbridge.training.training_features import FeatureCache
from vlbridge.training.training_packing import (
    PackedCollator,
    PackedEncoder,
    append_pairs,
    check_packable,
    common_prefix,
    first_fit,
    independent,
    share_prefix,
)


PAIRS = [([5, 6, 7, 8], [30, 31, 2]), ([5, 6, 9], [32, 2]), ([5, 6, 7, 10, 11], [33, 34, 35, 2])]
FAMILIES = [("mlp", "llama"), ("mlp", "opt"), ("qformer", "llama"), ("qformer", "opt"), ("perceiver", "llama"),
            ("perceiver", "gpt_neox"), ("perceiver", "mpt")]  # fmt: skip
QUESTIONS = talk("what is it?", "a cat", "what colour", "red", "why is that so?", "so", seed=3)
RECORDS = [
    caption("two dogs", 0),
    caption("a very long caption about the sea", 1),
    talk("what?", "a cat", seed=2),
    QUESTIONS,
]


# ---------------------------------------------------------------------- layout


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_prefix([[1], [2]]) == 0


def test_layout_of_branches():
    sample = append_pairs(PAIRS)
    assert sample["branch_ids"].tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3]
    collator = PackedCollator()
    row = collator.rows([sample], collator.order([sample]))
    # the last token of a branch predicts nothing
    assert row["input_ids"][0].tolist() == [5, 6, 7, 8, 30, 31, 9, 32, 7, 10, 11, 33, 34, 35]
    assert row["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 2, 3, 4, 5, 6, 7]
    assert row["logits_to_keep"].tolist() == [3, 4, 5, 6, 7, 10, 11, 12, 13, 13]  # room for labels that are shifted
    assert row["shift_labels"][0].tolist() == [30, 31, 2, 32, 2, 33, 34, 35, 2, IGNORED]
    assert row["labels"][0].tolist() == [IGNORED, 30, 31, 2, 32, 2, 33, 34, 35, 2]
    assert row["attention_mask"][0, 0, 7].nonzero()[:, 0].tolist() == [0, 1, 6, 7]


def test_layout_of_samples():
    samples = [
        {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([-100, 2, 3])},
        {"input_ids": torch.tensor([4, 5, 6, 7]), "labels": torch.tensor([4, 5, -100, -100])},
        append_pairs(PAIRS[:2]),
    ]
    collator = PackedCollator(8)
    order = collator.order(samples)
    assert order == [[0, 1], [2]]
    rows = collator.rows(samples, order)
    assert rows["input_ids"].tolist() == [[1, 2, 4, 5, 6, 7, 0, 0], [5, 6, 7, 8, 30, 31, 9, 32]]
    assert rows["segment_ids"].tolist() == [[0, 0, 1, 1, 1, 1, -1, -1], [0] * 8]
    assert rows["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 5, 2, 3]]
    # the first token of a sample is predicted by nobody: the loss of a sample alone does not count it either
    full = torch.full((2, 8), IGNORED)
    full[:, rows["logits_to_keep"][:-1]] = rows["shift_labels"][:, :-1]
    assert full.tolist() == [[2, 3, 5] + [IGNORED] * 5, [IGNORED] * 3 + [30, 31, 2, 32, 2]]
    seen = rows["attention_mask"][0, 0]
    assert [row.nonzero()[:, 0].tolist() for row in seen] == [
        [0],
        [0, 1],
        [2],
        [2, 3],
        [2, 3, 4],
        [2, 3, 4, 5],
        [6],
        [6, 7],
    ]


def test_prefixes_end_before_the_token_that_predicts_the_first_learned_one():
    sample = share_prefix([([1, 2, 3, 4], [-100, -100, 3, 4]), ([1, 2, 3, 5], [-100, -100, 3, 5])])
    assert sample["branch_ids"].tolist() == [0, 1, 1, 1, 2, 2, 2]
    same = share_prefix([([1, 2, 3], [-100, -100, 3])] * 2)  # the same question twice counts twice
    assert same["branch_ids"].tolist() == [0, 1, 1, 2, 2]
    learned_from_the_start = share_prefix([([1, 2], [1, 2]), ([1, 3], [1, 3])])
    assert learned_from_the_start["branch_ids"].tolist() == [1, 1, 2, 2]


def test_first_fit():
    assert first_fit([5, 4, 3, 9, 1, 30, 2], 10) == [[0, 1, 4], [2, 6], [3], [5]]
    assert first_fit([5, 4], None) == [[0, 1]]
    with pytest.raises(ValueError, match="max_tokens is 0"):
        PackedCollator(0)


# ---------------------------------------------------------------------- equal to unpacked


@pytest.mark.parametrize(("bridge", "language"), FAMILIES)
@pytest.mark.parametrize("max_tokens", [90, 400])
def test_packed_samples_have_the_loss_and_gradients_of_unpacked_ones(bridge, language, max_tokens):
    model, processor = tiny_model(bridge, language)
    model.eval()  # the Q-Former has dropout
    encoder = encoder_for(model, processor)
    packed = PackedEncoder(encoder, model, max_tokens)
    expected = encoder.collate([encoder.encode(record) for record in RECORDS])
    batch = packed.collate([packed.encode(record) for record in RECORDS])
    assert len(batch["input_ids"]) < len(RECORDS)
    assert_same(loss_and_gradients(model, batch), loss_and_gradients(model, expected))
    # as the trainer has it: a sum over what is learned, divided by the number of all batches of a step
    count = (batch["shift_labels"] != IGNORED).sum()
    assert count == (expected["labels"][:, 1:] != IGNORED).sum()
    ours = loss_and_gradients(model, batch, num_items_in_batch=count * 3)
    assert_same(ours, loss_and_gradients(model, expected, num_items_in_batch=count * 3))


@pytest.mark.parametrize("immediate", [True, False])
def test_conditioned_text_sees_the_images_of_its_own_sample_only(immediate):
    model, processor = tiny_model("perceiver", only_attend_immediate_media=immediate)
    encoder = encoder_for(model, processor)
    text = {**caption("no picture"), "images": [], "document": [{"type": "text", "text": "only words"}]}
    del text["caption"]
    records = [document("before", 0, "one", 1, "two"), text, document("long before", 2, "three"), caption("four", 3)]
    packed = PackedEncoder(encoder, model, 200)
    batch = packed.collate([packed.encode(record) for record in records])
    assert len(batch["input_ids"]) == 1
    expected = encoder.collate([encoder.encode(record) for record in records])
    assert_same(loss_and_gradients(model, batch), loss_and_gradients(model, expected))
    wrong = loss_and_gradients(model, {**batch, "segment_ids": None})[0]
    assert abs(wrong - model(**expected).loss) > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("bridge", "language"), FAMILIES)
def test_independent_questions_are_what_they_are_alone(bridge, language, attention):
    model, processor = tiny_model(bridge, language)
    encoder = encoder_for(model, processor)
    records = [QUESTIONS, caption("two dogs", 0), talk("one question", "yes", seed=4)]
    alone = [part for record in records for part in (independent(record) if "messages" in record else [record])]
    assert len(alone) == 5
    expected = encoder.collate([encoder.encode(record) for record in alone])
    packed = PackedEncoder(encoder, model, 400, independent_turns=True)
    samples = [packed.encode(record) for record in records]
    assert len(samples[0]["pixel_values"]) == 1 and int(samples[0]["branch_ids"].max()) == 3
    batch = packed.collate(samples)
    assert len(batch["pixel_values"]) == 3
    model.language_model.set_attn_implementation("sdpa")  # the samples alone, with a mask of two dimensions
    alone = loss_and_gradients(model, expected)
    model.language_model.set_attn_implementation(attention)
    assert_same(loss_and_gradients(model, batch), alone)
    connected = encoder.collate([encoder.encode(record) for record in records])
    assert connected["input_ids"].shape != expected["input_ids"].shape


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_in_half_precision(attention):
    """The mask has the dtype that the language model computes in: of its weights, or of autocast."""
    model, processor = tiny_model("mlp")
    model.language_model.set_attn_implementation(attention)
    packed = PackedEncoder(encoder_for(model, processor), model, 400)
    batch = packed.collate([packed.encode(record) for record in RECORDS])
    assert batch["attention_mask"].dtype == torch.bool
    added = additive_mask(batch["attention_mask"], torch.zeros(1, dtype=torch.bfloat16))
    assert added.dtype == torch.bfloat16 and torch.equal(added == 0, batch["attention_mask"])
    assert additive_mask(added, added) is added and additive_mask(None, added) is None
    with torch.no_grad():
        expected = float(model(**batch).loss)
        with torch.autocast("cpu", torch.bfloat16):
            assert additive_mask(batch["attention_mask"], torch.zeros(1)).dtype == torch.bfloat16
            assert float(model(**batch).loss) == pytest.approx(expected, rel=0.02)
        assert float(model.bfloat16()(**batch).loss) == pytest.approx(expected, rel=0.02)


def test_questions_that_an_instruction_aware_qformer_reads_have_images_of_their_own():
    model, processor = tiny_model("qformer", qformer_config={**QFORMER, "use_text": True, "vocab_size": 60})
    words = bert_like_tokenizer()
    processor.qformer_tokenizer = words
    encoder = encoder_for(model, processor)
    record = talk("w1 w2", "a cat", "w3", "red", seed=3)
    packed = PackedEncoder(encoder, model, 400, independent_turns=True)
    sample = packed.encode(record)
    assert len(sample["pixel_values"]) == 2 and sample["segment_ids"].max() == 1
    expected = encoder.collate([encoder.encode(part) for part in independent(record)])
    assert_same(loss_and_gradients(model, packed.collate([sample])), loss_and_gradients(model, expected))


def test_later_images_belong_to_later_questions():
    record = talk("what?", "a cat", "and this?", "a dog", "both?", "yes", seed=0)
    record["messages"][2]["content"].insert(0, {"type": "image", "text": None})
    record["images"].append(image(1))
    parts = independent(record)
    assert [len(part["images"]) for part in parts] == [1, 2, 2]
    assert [len(part["messages"][0]["content"]) for part in parts] == [2, 3, 3]
    model, processor = tiny_model("mlp")
    encoder = encoder_for(model, processor)
    packed = PackedEncoder(encoder, model, 400, independent_turns=True)
    expected = encoder.collate([encoder.encode(part) for part in parts])
    batch = packed.collate([packed.encode(record)])
    assert_same(loss_and_gradients(model, batch), loss_and_gradients(model, expected))


def test_questions_without_room_are_left_out_and_records_without_any_are_refused():
    model, processor = tiny_model("mlp")
    encoder = encoder_for(model, processor, max_length=50)
    packed = PackedEncoder(encoder, model, 400, independent_turns=True)
    record = talk("what?", "a cat", "why " * 20, "no room", "who?", "me")
    sample = packed.encode(record)
    assert int(sample["branch_ids"].max()) == 2
    with pytest.raises(SampleError, match="nothing to learn within max_length=50"):
        packed.encode(talk("why " * 20, "no room", "who " * 20, "no room"))


@pytest.mark.core
@pytest.mark.parametrize("bridge", ["mlp", "qformer", "perceiver"])
def test_packed_and_cached_is_uncached_and_unpacked(bridge, tmp_path):
    model, processor = tiny_model(bridge)
    encoder = encoder_for(model, processor)
    cache = FeatureCache(model, processor, tmp_path)
    cache.fill(RECORDS)
    packed = PackedEncoder(encoder, model, 150, store=cache.store)
    batch = packed.collate([packed.encode(record) for record in RECORDS])
    assert "pixel_values" not in batch
    expected = encoder.collate([encoder.encode(record) for record in RECORDS])
    assert_same(loss_and_gradients(model, batch), loss_and_gradients(model, expected))


def test_the_order_is_the_same_each_time_and_padding_is_counted_in_workers_too():
    model, processor = tiny_model("mlp")
    packed = PackedEncoder(encoder_for(model, processor), model, 100)
    samples = [packed.encode(record) for record in RECORDS]
    first, second = packed.collate(samples), packed.collate(copy.deepcopy(samples))
    assert all(torch.equal(first[name], second[name]) for name in first if isinstance(first[name], torch.Tensor))
    before = packed.packer.savings()
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert before["batches"] == 2 and before["samples"] == 8 and before["tokens"] <= 2 * sum(lengths)
    rows, columns = first["input_ids"].shape
    assert before["padding"] == 2 * rows * columns - before["tokens"]
    assert before["places_saved"] == pytest.approx(1 - rows * columns / (len(lengths) * max(lengths)))
    list(DataLoader(samples, batch_size=4, collate_fn=packed.collate, num_workers=1))
    assert packed.packer.savings()["batches"] == 3
    pickle.loads(pickle.dumps(packed)).encode(RECORDS[0])


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("bridge", ["mlp", "qformer"])
def test_encoder_decoders_are_refused(bridge):
    model, processor = tiny_model(bridge, "t5")
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        PackedEncoder(encoder_for(model, processor), model, 100)


def test_language_models_that_count_positions_themselves_are_refused():
    bloom = BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=VOCAB)
    falcon = FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB, alibi=True)
    for language in (bloom, falcon):
        model, _ = vlbridge.compose(VISION["clip"](), language, "mlp", tokenizer=tiny_tokenizer())
        with pytest.raises(ValueError, match="does not use position_ids"):
            check_packable(model)


def test_windows_are_refused_where_rows_are_longer():
    model, _ = tiny_model("mlp", "mistral")
    check_packable(model, 4096)
    for max_tokens in (4097, None):
        with pytest.raises(ValueError, match="a window of 4096 tokens"):
            check_packable(model, max_tokens)


def test_stage_1_and_other_attention_are_refused():
    model, processor = tiny_stage1()
    with pytest.raises(ValueError, match="stage 1"):
        PackedEncoder(encoder_for(model, processor), model, 100)
    model, processor = tiny_model("mlp")
    model.language_model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="attn_implementation is 'flex_attention'"):
        PackedEncoder(encoder_for(model, processor), model, 100)


# ---------------------------------------------------------------------- easy-VQA


@pytest.mark.parametrize(
    ("questions", "caption"),
    [
        ([("what color is the triangle?", "blue")], "a blue triangle"),
        ([("is there a red shape?", "yes"), ("is there not a circle?", "no")], "a red circle"),
        ([("is there not a red shape?", "yes"), ("what shape is present?", "circle")], None),
        ([("is no teal shape present?", "no"), ("is there a circle?", "no")], None),
        ([("what is the gray shape?", "rectangle")], "a gray rectangle"),
    ],
)
def test_captions_are_what_questions_and_answers_tell(questions, caption):
    assert caption_of(Example(None, questions)) == caption


@pytest.mark.parametrize(
    "parts", [("mlp", "llama"), ("mlp", "opt"), ("qformer", "llama"), ("perceiver", "llama")], ids="-".join
)
def test_answers_from_a_shared_prefix_are_those_of_each_question_alone(parts):
    model, processor = tiny_model(*parts)
    examples = [
        Example(None, [("what is it?", "a"), ("is there a red circle in the image?", "b"), ("why", "c")]),
        Example(None, [("one question", "d")]),
    ]
    pictures = [tiny_image(0), tiny_image(1)]
    features = model.get_patch_features(processor.image_processor(pictures, return_tensors="pt")["pixel_values"])
    expected = []
    for picture, example in zip(pictures, examples):
        for question, _ in example.questions:
            text = processor.apply_chat_template(conversation(question), add_generation_prompt=True)
            inputs = processor(images=[picture], text=text, add_special_tokens=False, return_tensors="pt")
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=5)[:, inputs["input_ids"].shape[1] :]
            expected.append(processor.batch_decode(ids, skip_special_tokens=True)[0].strip().lower())
    assert answer_all(model, processor, examples, features, max_new_tokens=5) == expected


def test_warm_up_gives_every_token_the_words_for_what_is_shown():
    torch.manual_seed(0)
    model, processor = tiny_model("mlp")
    examples = [Example(None, [("what color is it?", color), ("is there a circle?", "yes")]) for color in COLORS]
    examples.append(Example(None, [("is there a circle?", "no")]))  # nothing is known about it
    features = torch.randn(len(examples), 2, model.config.vision_feature_size)
    warm_up(model, processor, examples, features, steps=1500, learning_rate=1e-2)
    table = model.get_input_embeddings().weight

    def embedding(word):
        return table[processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]].mean(dim=0)

    wanted = torch.stack([embedding(color) + embedding("circle") for color in COLORS])
    given = model.bridge(features[:-1])
    torch.testing.assert_close(given, wanted[:, None].expand_as(given), atol=0.05, rtol=0)


def test_the_curriculum_asks_own_questions_then_pairs_about_more_and_more():
    _, processor = tiny_model("mlp")
    forms = ("is there a {} shape?", "is there not a {} shape?", "is there a {}?", "is no {} here?")
    own = [("what color is it?", "blue"), ("is there a circle?", "yes")]
    own += [(form.format(word), "no") for form, word in zip(forms[1:], ("blue", "square", "circle"))]
    curriculum = (Stage(2), Stage(3, 2, ("{shape}",), negated=False), Stage(40, 1))
    data = PackedConversations([Example(None, own)], torch.zeros(1, 1, 8), processor, 4, curriculum)
    asked = []
    data.prompt = lambda question: asked.append(question) or [len(asked), 1]
    per_step = []
    for _ in range(sum(stage.steps for stage in curriculum) + 1):  # the trainer may fetch one more
        data[0]
        per_step.append(asked[:])
        asked.clear()
    known = {question for question, _ in own} | {processor.caption_prompt}
    assert all(len(questions) == 4 for questions in per_step)
    assert all(set(questions) <= known for questions in per_step[:2])
    shapes = {f"is there a {shape}?" for shape in SHAPES}
    assert all(set(questions) <= shapes for questions in per_step[2:5])
    assert all(set(questions[2:]) <= known for questions in per_step[5:])
    pairs = {question for questions in per_step[5:] for question in questions[:2]}
    assert any("not" in question for question in pairs) and any(color in q for q in pairs for color in COLORS)


def test_blind_baseline():
    train = [Example(None, [("q", "yes"), ("q", "yes"), ("q", "no"), ("p", "no")])]
    assert blind_baseline(train, [Example(None, [("q", "yes"), ("p", "yes"), ("new", "yes"), ("q", "no")])]) == 0.25


def test_a_matched_pair_differs_in_what_is_shown_only_and_is_answered_rightly():
    examples = [
        Example(None, [("is there a red shape?", "yes"), ("is no circle present?", "no"), ("what is it?", "red")])
    ]
    templates = yes_no_templates(examples)
    assert templates == ["is no {shape} present?", "is there a {color} shape?"]
    generator = torch.Generator().manual_seed(0)
    found = {"color": "blue", "shape": "circle"}
    seen = set()
    for _ in range(400):
        pair = matched_pair(found, templates, lambda below: int(torch.randint(below, (), generator=generator)))
        assert {answer for _, answer in pair} == {"yes", "no"}
        assert [kind_of(*asked) for asked in pair] == ["yes/no, shown", "yes/no, absent"]
        for question, answer in pair:
            shown = "blue" in question or "circle" in question
            assert answer == ("yes" if shown != ("no" in question.split()) else "no")
            # what a question and its answer affirm is what was drawn from
            assert properties_of(Example(None, [(question, answer)])).items() <= found.items()
            seen.add(question)
    assert len(seen) == 8 + 3


@pytest.mark.parametrize(
    "question, answer, kind",
    [
        ("what color is the shape?", "teal", "color"),
        ("what shape is it?", "circle", "shape"),
        ("is there a red shape?", "yes", "yes/no, shown"),
        ("is there not a red shape?", "no", "yes/no, shown"),
        ("is no circle present?", "yes", "yes/no, absent"),
    ],
)
def test_kinds_of_questions(question, answer, kind):
    assert kind_of(question, answer) == kind
