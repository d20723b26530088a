"""Few-shot answers: the shared prefix and encoded images give what full prompts give, and are made once."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import (
    BRIDGE_OPTIONS,
    COMBINATIONS,
    LANGUAGE,
    QFORMER,
    VISION,
    bert_like_tokenizer,
    spread_weights,
    tiny_image,
    tiny_tokenizer,
)
from transformers import AutoProcessor, MistralConfig

import vlbridge
from vlbridge import FewShotAnswerer, answer_with, default_model, rank_answers
from vlbridge.few_shot import draw, follows_mask
from vlbridge.prompts import EncodedImage, ImageCache, PromptMaker, image_key


families = pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
LENGTH = {"max_new_tokens": 5, "eos_token_id": None}


def few_shot_model(bridge: str, language: str = "llama", **options):
    """A tiny model in float64 whose language model has room for many demonstrations."""
    config = LANGUAGE[language]() if isinstance(language, str) else language
    for name in POSITIONS:
        if hasattr(config, name):
            setattr(config, name, 4096)
    torch.manual_seed(0)
    options = {"tokenizer": tiny_tokenizer(), **BRIDGE_OPTIONS[bridge], **options}
    model, processor = vlbridge.compose(VISION["clip"](), config, bridge, **options)
    spread_weights(model)
    return model.double(), processor


def shown(count: int, first: int = 0) -> list[dict]:
    return [
        {
            "image": tiny_image(first + number),
            "question": f"is it {number}?",
            "answer": "ab"[number % 2] * (number % 3 + 1),
        }
        for number in range(count)
    ]


def asked(count: int, first: int = 50) -> list[dict]:
    """Questions of different lengths."""
    return [
        {"image": tiny_image(first + number), "question": "wh" + "a" * (2 * number % 5) + "t?"}
        for number in range(count)
    ]


def full_prompts(model, processor, demonstrations, queries, **options) -> list[str]:
    """Each query alone, with all its pictures, through the processor and `generate`."""
    texts = []
    for each, query in zip(demonstrations, queries, strict=True):
        inputs = processor.few_shot(each, query)
        ids = model.generate(**inputs, **{"do_sample": False, **LENGTH, **options})
        ids = ids if model.config.is_encoder_decoder else ids[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    return texts


def count_work(model) -> dict[str, int]:
    """Counts images through the encoder, and tokens through the language model's embeddings."""
    seen = {"images": 0, "tokens": 0}

    def images(module, args, kwargs):
        seen["images"] += len(kwargs.get("pixel_values", args[0] if args else ()))

    model.vision_model.register_forward_pre_hook(images, with_kwargs=True)
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda module, args: seen.update(tokens=seen["tokens"] + args[0].numel()))
    return seen


# ---------------------------------------------------------------------- answers with a shared prefix


@pytest.mark.core
@pytest.mark.parametrize("shots", [0, 4, 8, 16, 32])
@families
def test_the_shared_prefix_gives_the_answers_of_full_prompts(bridge, shots):
    model, processor = few_shot_model(bridge)
    demonstrations, queries = shown(shots), asked(3)
    expected, first = [], []
    for query in queries:
        inputs = processor.few_shot(demonstrations, query)
        outputs = model.generate(**inputs, **LENGTH, do_sample=False, output_logits=True, return_dict_in_generate=True)
        new = outputs.sequences[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(new, skip_special_tokens=True).strip())
        first.append(outputs.logits[0][0])
    seen = count_work(model)
    answerer = FewShotAnswerer(model, processor, demonstrations, **LENGTH)
    assert answerer.answer(queries[:1]) + answerer.answer(queries[1:]) == expected
    assert seen["images"] == shots + 3
    # The prefix went through the language model once; then queries and answers
    prefix, maker = answerer.prefix, answerer.maker
    if prefix is None:
        assert shots == 0, "only without demonstrations two prompts may have nothing in common"
        return
    prompts = maker.make([demonstrations] * 3, queries)
    assert prefix.num_images == shots and all(prompt.ids[: len(prefix.ids)] == prefix.ids for prompt in prompts)
    rest = max(len(prompt.ids) for prompt in prompts) - len(prefix.ids)
    assert rest < 60, "only the query is left"
    assert seen["tokens"] <= len(prefix.ids) + 3 * (rest + LENGTH["max_new_tokens"])
    # Scores, which differ where the tokens of a tiny model happen to be the same
    inputs, known = prefix.continued(maker, [prompt.ids for prompt in prompts])
    known.update(maker.image_inputs(prompts, skip=prefix.num_images), logits_to_keep=1)
    new = inputs["input_ids"][:, len(prefix.ids) :]
    with torch.no_grad():
        found = model(input_ids=new, attention_mask=inputs["attention_mask"], **known).logits[:, -1]
        without = model(**processor.few_shot([], queries[0])).logits[0, -1]
    width = found.shape[1]
    for row, right in zip(found, first, strict=True):
        torch.testing.assert_close(row.float(), right[:width], atol=1e-5, rtol=0)  # generate gives float32
    assert (found[0] - found[1]).abs().max() > 1e-3, "the queries must matter"
    assert not shots or (found[0] - without).abs().max() > 1e-3, "the demonstrations must matter"


@pytest.mark.parametrize(("bridge", "language"), [pair for pair in COMBINATIONS if pair[1] != "llama"])
def test_other_language_models(bridge, language):
    """OPT's learned positions; and an encoder-decoder, where images are encoded once."""
    model, processor = few_shot_model(bridge, language)
    demonstrations, queries = shown(4), asked(3)
    expected = full_prompts(model, processor, [demonstrations] * 3, queries)
    seen = count_work(model)
    answerer = FewShotAnswerer(model, processor, demonstrations, **LENGTH)
    assert answerer.answer(queries, batch_size=2) == expected
    assert seen["images"] == 7
    assert (answerer.prefix is None) == model.config.is_encoder_decoder


@families
def test_logits_of_ragged_continuations_are_those_of_full_prompts(bridge):
    """Queries with one image, and without, behind the same prefix: positions and masks are right, in every place."""
    model, processor = few_shot_model(bridge)
    demonstrations = shown(3)
    queries = [*asked(3), {"question": "no picture?"}]
    answerer = FewShotAnswerer(model, processor, demonstrations, max_new_tokens=1)
    answerer.answer(queries)
    prefix, maker = answerer.prefix, answerer.maker
    prompts = maker.make([demonstrations] * 4, queries)
    inputs, known = prefix.continued(maker, [prompt.ids for prompt in prompts])
    length = len(prefix.ids)
    with torch.no_grad():
        found = model(
            input_ids=inputs["input_ids"][:, length:],
            attention_mask=inputs["attention_mask"],
            **known,
            **maker.image_inputs(prompts, skip=prefix.num_images),
        ).logits
        for row, query in enumerate(queries):
            expected = model(**processor.few_shot(demonstrations, query)).logits[0, length:]
            torch.testing.assert_close(found[row, -len(expected) :], expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": -1.0}]
)
@families
def test_beams(bridge, options):
    model, processor = few_shot_model(bridge)
    demonstrations, queries = shown(4), asked(3)
    expected = full_prompts(model, processor, [demonstrations] * 3, queries, **options)
    answerer = FewShotAnswerer(model, processor, demonstrations, **LENGTH, **options)
    assert answerer.answer(queries, batch_size=2) == expected
    assert answerer.prefix is not None


@families
def test_several_samples_per_query(bridge):
    """Drawn from one token, so that they are equal: the rows of one query are neighbours."""
    model, processor = few_shot_model(bridge)
    demonstrations, queries = shown(4), asked(3)
    expected = full_prompts(model, processor, [demonstrations] * 3, queries)
    answerer = FewShotAnswerer(
        model, processor, demonstrations, do_sample=True, top_k=1, num_return_sequences=2, **LENGTH
    )
    assert answerer.answer(queries) == [text for text in expected for _ in range(2)]


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}])
@families
def test_options_that_look_at_the_prompt_see_no_padding(bridge, options):
    model, processor = few_shot_model(bridge)
    demonstrations, queries = shown(2), asked(6)
    expected = full_prompts(model, processor, [demonstrations] * 6, queries, **options)
    answerer = FewShotAnswerer(model, processor, demonstrations, **LENGTH, **options)
    assert answerer.answer(queries, batch_size=3) == expected
    assert answerer.prefix is not None
    assert expected != full_prompts(model, processor, [demonstrations] * 6, queries), "the option must matter"


@pytest.mark.parametrize("language", ["mpt", "mosaic_gpt"])
def test_alibi_does_not_count_padding(language):
    model, processor = few_shot_model("perceiver", language)
    assert not follows_mask(model)
    demonstrations, queries = shown(4), asked(6)
    expected = full_prompts(model, processor, [demonstrations] * 6, queries)
    answerer = FewShotAnswerer(model, processor, demonstrations, **LENGTH)
    assert answerer.answer(queries, batch_size=4) == expected
    assert answerer.prefix is not None


@pytest.mark.parametrize("language", ["gpt_neox", "qwen3", "gpt2"])
def test_positions_follow_the_mask(language):
    """Learned and rotary ones: queries of different lengths go into one batch."""
    model, processor = few_shot_model("mlp", language)
    assert follows_mask(model)
    demonstrations, queries = shown(2), asked(4)
    expected = full_prompts(model, processor, [demonstrations] * 4, queries)
    assert FewShotAnswerer(model, processor, demonstrations, **LENGTH).answer(queries) == expected


@pytest.mark.parametrize("language", ["gemma2", "mistral"])
def test_sliding_windows_are_run_whole(language):
    config = LANGUAGE[language]()
    if language == "mistral":
        config = MistralConfig(**{**config.to_dict(), "sliding_window": 24})
    model, processor = few_shot_model("mlp", config)
    model.float()  # transformers' eager attention has no number for a fully masked row in float64
    demonstrations, queries = shown(2), asked(3)
    expected = full_prompts(model, processor, [demonstrations] * 3, queries)
    answerer = FewShotAnswerer(model, processor, demonstrations, **LENGTH)
    assert answerer.answer(queries) == expected
    assert answerer.prefix is None


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
@families
def test_other_caches_are_left_to_generate(bridge, options):
    model, processor = few_shot_model(bridge)
    demonstrations, queries = shown(2), asked(2)
    expected = full_prompts(model, processor, [demonstrations] * 2, queries)
    answerer = FewShotAnswerer(model, processor, demonstrations, **LENGTH, **options)
    assert answerer.answer(queries, batch_size=1) == expected
    assert answerer.prefix is None


@families
def test_captions_and_mixed_queries(bridge):
    model, processor = few_shot_model(bridge)
    demonstrations = [{"image": tiny_image(number), "caption": f"a {number}"} for number in range(3)]
    queries = [{"image": tiny_image(7)}, {"question": "who?"}, {"image": tiny_image(8), "question": None}]
    expected = full_prompts(model, processor, [demonstrations] * 3, queries)
    answerer = FewShotAnswerer(model, processor, demonstrations, **LENGTH)
    assert answerer.answer(queries) == expected
    assert answerer.prefix.num_images == 3
    assert answerer.answer([]) == []


@families
def test_demonstrations_without_their_pictures(bridge):
    model, processor = few_shot_model(bridge)
    demonstrations, queries = shown(4), asked(3)
    texts = [{key: value for key, value in each.items() if key != "image"} for each in demonstrations]
    expected = full_prompts(model, processor, [texts] * 3, queries)
    seen = count_work(model)
    assert FewShotAnswerer(model, processor, demonstrations, text_only=True, **LENGTH).answer(queries) == expected
    assert answer_with(model, processor, [demonstrations] * 3, queries, text_only=True, **LENGTH) == expected
    assert seen["images"] == 6
    ranked = rank_answers(model, processor, demonstrations, queries, [["a", "b"]] * 3, text_only=True)
    assert ranked == rank_answers(model, processor, texts, queries, [["a", "b"]] * 3)
    each = rank_answers(model, processor, [demonstrations] * 3, queries, [["a", "b"]] * 3, text_only=True)
    torch.testing.assert_close(torch.tensor(each), torch.tensor(ranked))


def test_a_prompt_that_begins_otherwise_is_run_whole():
    """A template may put something of the query before the demonstrations."""
    model, processor = few_shot_model("qformer")
    plain = processor.few_shot_text
    processor.few_shot_text = lambda turns: ("odd" if "odd" in (turns[-1].get("question") or "") else "") + plain(turns)
    demonstrations = shown(3)
    queries = [*asked(2), {"image": tiny_image(9), "question": "odd?"}, *asked(1, 70)]
    expected = full_prompts(model, processor, [demonstrations] * 4, queries)
    answerer = FewShotAnswerer(model, processor, demonstrations, **LENGTH)
    assert answerer.answer(queries) == expected
    assert answerer.prefix.num_images == 3
    processor.few_shot_text = lambda turns: (turns[-1].get("question") or "") + plain(turns)
    answerer = FewShotAnswerer(model, processor, demonstrations, **LENGTH)
    expected = full_prompts(model, processor, [demonstrations] * 4, queries)
    assert answerer.answer(queries) == expected and answerer.prefix is None, "nothing in common"


def test_an_instruction_aware_qformer_reads_every_prompt():
    """Its visual tokens depend on the query, so that only patch features are used again."""
    options = {"qformer_config": {**QFORMER, "use_text": True, "vocab_size": 49, "max_position_embeddings": 160}}
    model, processor = few_shot_model("qformer", **options)
    processor.qformer_tokenizer = bert_like_tokenizer()
    demonstrations = [
        {"image": tiny_image(number), "question": f"w{number} w3", "answer": f"w{number}"} for number in range(3)
    ]
    queries = [{"image": tiny_image(10 + number), "question": "w7 " * (number + 1)} for number in range(3)]
    expected = full_prompts(model, processor, [demonstrations] * 3, queries)
    seen = count_work(model)
    answerer = FewShotAnswerer(model, processor, demonstrations, **LENGTH)
    assert answerer.answer(queries) == expected
    assert answerer.prefix is None and seen["images"] == 6
    assert answer_with(model, processor, [demonstrations] * 3, queries, **LENGTH) == expected


def test_images_in_tiles():
    pinpoints = [[30, 60], [60, 30], [60, 60]]
    model, processor = few_shot_model("mlp", image_grid_pinpoints=pinpoints)
    sizes = [(40, 33), (80, 30), (30, 90), (64, 64), (31, 70)]
    pictures = [tiny_image(number, size) for number, size in enumerate(sizes)]
    demonstrations = [{"image": image, "question": "q?", "answer": "a"} for image in pictures[:3]]
    queries = [{"image": image, "question": "which?"} for image in pictures[3:]]
    expected = full_prompts(model, processor, [demonstrations] * 2, queries)
    answerer = FewShotAnswerer(model, processor, demonstrations, **LENGTH)
    assert answerer.answer(queries) == expected and answerer.prefix.num_images == 3
    beams = full_prompts(model, processor, [demonstrations] * 2, queries, num_beams=2)
    assert FewShotAnswerer(model, processor, demonstrations, num_beams=2, **LENGTH).answer(queries) == beams


def test_videos():
    model, processor = few_shot_model("perceiver", max_num_frames=4)
    frames = [tiny_image(number) for number in range(6)]
    demonstrations = [
        {"image": frames[:2], "question": "q?", "answer": "a"}, {"image": frames[2], "question": "q?", "answer": "b"}
    ]  # fmt: skip
    queries = [{"image": frames[3:], "question": "which?"}, {"image": frames[5], "question": "what?"}]
    expected = full_prompts(model, processor, [demonstrations] * 2, queries)
    assert FewShotAnswerer(model, processor, demonstrations, **LENGTH).answer(queries) == expected
    with pytest.raises(ValueError, match="a video without frames"):
        FewShotAnswerer(model, processor, [{"image": [], "caption": "a"}])
    model, processor = few_shot_model("mlp")
    with pytest.raises(ValueError, match="this model takes no videos"):
        FewShotAnswerer(model, processor, [{"image": frames[:2], "caption": "a"}])


@pytest.mark.parametrize("every", [False, True])
def test_flamingo_with_all_earlier_images(every):
    """Where text sees all earlier images, a prefix keeps theirs; else that of the last one."""
    model, processor = few_shot_model("perceiver", only_attend_immediate_media=not every)
    demonstrations, queries = shown(3), [*asked(2), {"question": "none?"}]
    expected = full_prompts(model, processor, [demonstrations] * 3, queries)
    answerer = FewShotAnswerer(model, processor, demonstrations, **LENGTH)
    assert answerer.answer(queries) == expected
    latents = answerer.prefix.visual_states.key_states[0].shape[2]
    assert latents == model.config.num_latents * (3 if every else 1)


def test_wrong_demonstrations_are_named():
    model, processor = few_shot_model("mlp")
    with pytest.raises(ValueError, match="demonstration 1 has neither caption nor answer"):
        FewShotAnswerer(model, processor, [*shown(1), {"image": tiny_image()}])
    with pytest.raises(ValueError, match="2 queries, but demonstrations for 1: give a list per query"):
        answer_with(model, processor, [[]], asked(2))


# ---------------------------------------------------------------------- the seam, and ids


def check_ids(processor, model, demonstrations, queries) -> None:
    """Together, again, and after other prompts, where what they begin with is not tokenized again."""
    maker = PromptMaker(ImageCache(model, processor))
    for shown_now in (demonstrations, demonstrations, demonstrations[1:], demonstrations):
        for prompt, query in zip(maker.make([shown_now] * len(queries), queries), queries, strict=True):
            assert prompt.ids == processor.few_shot(shown_now, query)["input_ids"][0].tolist()


@pytest.mark.parametrize("options", [{}, {"conversation": "vicuna_v1"}, {"image_aspect_ratio": "pad"}])
def test_ids_of_llava(options):
    model, processor = few_shot_model("mlp", **options)
    for space in (False, True):
        processor.space_after_image = space
        check_ids(processor, model, shown(2), asked(3))


@families
def test_ids_of_every_family(bridge):
    model, processor = few_shot_model(bridge)
    check_ids(processor, model, shown(2), asked(3))
    if bridge == "qformer":
        processor.text_start = "</s>"
        check_ids(processor, model, shown(2), asked(3))
    processor.tokenizer.chat_template = None
    processor.chat_template = "<s>" + processor.chat_template
    check_ids(processor, model, shown(2), asked(3))


def test_ids_of_a_real_tokenizer_and_template():
    """Byte pairs may join the prompt's last character with what follows: the seam is that of full prompts."""
    processor = AutoProcessor.from_pretrained(default_model())
    placeholders = processor.image_token * processor.num_image_tokens(224, 224)
    picture = tiny_image()
    encoded = EncodedImage(placeholders, processor.num_image_tokens(224, 224), torch.empty(0))
    demonstrations = [{"image": picture, "question": "What is it?", "answer": "a circle"}] * 3
    maker = PromptMaker(ImageCache(None, processor))
    questions = ("Is it red?", " 2 or 3?", "\nwhich", "\u00e9t\u00e9?")
    shown_encoded = [{**each, "image": encoded} for each in demonstrations]
    asked_encoded = [{"image": encoded, "question": question} for question in questions]
    for prompt, question in zip(maker.make([shown_encoded] * 4, asked_encoded), questions, strict=True):
        expected = processor.few_shot(demonstrations, {"image": picture, "question": question})
        assert prompt.ids == expected["input_ids"][0].tolist()


# ---------------------------------------------------------------------- demonstrations per query, encoded images


@families
def test_demonstrations_per_query(bridge):
    model, processor = few_shot_model(bridge)
    pool, queries = shown(6), asked(5)
    chosen = [[pool[index] for index in draw(6, number % 4, seed=number)] for number in range(5)]
    expected = full_prompts(model, processor, chosen, queries)
    seen = count_work(model)
    cache = ImageCache(model, processor)
    assert answer_with(model, processor, chosen, queries, batch_size=2, image_cache=cache, **LENGTH) == expected
    different = len({id(each["image"]) for each in (*[each for row in chosen for each in row], *queries)})
    assert seen["images"] == cache.num_encoded == different
    assert answer_with(model, processor, chosen, queries, image_cache=cache, **LENGTH) == expected
    assert seen["images"] == different, "known from the first call"
    beams = {"num_beams": 2, "num_return_sequences": 2}
    assert answer_with(model, processor, chosen, queries, image_cache=cache, **LENGTH, **beams) == full_prompts(
        model, processor, chosen, queries, **beams
    )


def test_the_cache_is_bounded():
    model, processor = few_shot_model("mlp")
    (one,) = ImageCache(model, processor).encode([tiny_image()])
    cache = ImageCache(model, processor, max_bytes=2 * one.num_bytes)
    first, second, third = (tiny_image(number) for number in range(3))
    cache.encode([first, second])
    cache.encode([first, third])  # the second was used longest ago
    assert cache.num_encoded == 3
    cache.encode([first, third])
    assert cache.num_encoded == 3
    cache.encode([second])
    assert cache.num_encoded == 4
    few = ImageCache(model, processor, max_images=1)
    for image, encoded in ((first, 1), (first, 1), (second, 2), (first, 3)):
        few.encode([image])
        assert few.num_encoded == encoded
    none = ImageCache(model, processor, max_bytes=0)
    queries, demonstrations = asked(3), shown(2)
    expected = full_prompts(model, processor, [demonstrations] * 3, queries)
    assert answer_with(model, processor, [demonstrations] * 3, queries, image_cache=none, **LENGTH) == expected


def test_images_are_known_by_their_content(tmp_path):
    picture = tiny_image(3)
    picture.save(tmp_path / "one.png")
    assert image_key(picture) == image_key(picture.copy()) != image_key(tiny_image(4))
    assert image_key(tmp_path / "one.png") == image_key(str(tmp_path / "one.png"))
    before = image_key(tmp_path / "one.png")
    tiny_image(4).save(tmp_path / "one.png")
    assert image_key(tmp_path / "one.png") != before
    array = torch.arange(27, dtype=torch.uint8).reshape(3, 3, 3)
    assert image_key(array) != image_key(array.flip(0))
    assert image_key(array.numpy()) != image_key(array.numpy()[::-1])
    assert image_key(array.bfloat16()) == image_key(array.bfloat16())
    assert image_key([picture, picture]) != image_key([picture])
    with pytest.raises(ValueError, match="An image is a int"):
        image_key(3)


def test_an_image_that_is_encoded_already_stands_for_its_picture():
    model, processor = few_shot_model("qformer")
    cache = ImageCache(model, processor)
    demonstrations, queries = shown(2), asked(2)
    expected = FewShotAnswerer(model, processor, demonstrations, **LENGTH).answer(queries)
    encoded = [
        [
            {**each, "image": image}
            for each, image in zip(part, cache.encode([each["image"] for each in part]), strict=True)
        ]
        for part in (demonstrations, queries)
    ]
    seen = count_work(model)
    assert FewShotAnswerer(model, processor, encoded[0], **LENGTH).answer(encoded[1]) == expected
    assert seen["images"] == 0


# ---------------------------------------------------------------------- rank classification

CHOICES = [["yes", "no", "no way"], ["a"], ["bc", "d", "efgh", "d"], [" x ", "yes"], ["no", "maybe so"]]


def slow_scores(model, processor, demonstrations, query, choices, mean: bool) -> list[float]:
    """Prompt and choice in one text, through the processor and one forward pass; the space before it is scored too."""
    prompt, pictures = processor.few_shot(demonstrations, query, tokenize=False)
    before = processor.few_shot(demonstrations, query)
    scores = []
    for choice in (choice.strip() for choice in choices):
        if model.config.is_encoder_decoder:
            labels = processor.tokenizer(choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
            logits = model(**before, labels=labels).logits[0]
            of_choice = labels[0]
        else:
            lead = "" if type(processor).__name__.startswith("Perceiver") else " "
            inputs = processor(text=[prompt + lead + choice], images=processor.nest([pictures]), return_tensors="pt")
            start = before["input_ids"].shape[1]
            of_choice = inputs["input_ids"][0, start:]
            logits = model(**inputs).logits[0, start - 1 : -1]
        chosen = logits.log_softmax(-1).gather(-1, of_choice[:, None])
        scores.append(float(chosen.mean() if mean else chosen.sum()))
    return scores


@pytest.mark.core
@pytest.mark.parametrize(("bridge", "language"), [*COMBINATIONS, ("mlp", "gemma2"), ("perceiver", "mpt")])
@torch.no_grad()
def test_ranks_are_those_of_full_forward_passes(bridge, language):
    """The shared prefix, its absence, and language models whose caches can't be shared."""
    model, processor = few_shot_model(bridge, language)
    model.to(torch.float32 if language == "gemma2" else torch.float64)
    demonstrations, queries = shown(3), [*asked(4), {"question": "no image?"}]
    for normalize in ("sum", "mean"):
        expected = [
            slow_scores(model, processor, demonstrations, query, choices, normalize == "mean")
            for query, choices in zip(queries, CHOICES, strict=True)
        ]
        shared = rank_answers(model, processor, demonstrations, queries, CHOICES, normalize, batch_size=3)
        each = rank_answers(model, processor, [demonstrations] * 5, queries, CHOICES, normalize, batch_size=2)
        for found in (shared, each):
            for row, right in zip(found, expected, strict=True):
                assert row == pytest.approx(right, abs=1e-4 if language == "gemma2" else 1e-8)
    assert len({round(value, 3) for row in expected for value in row}) > 8


def test_the_prefix_serves_answers_and_ranks():
    model, processor = few_shot_model("perceiver")
    demonstrations, queries = shown(8), asked(3)
    seen = count_work(model)
    answerer = FewShotAnswerer(model, processor, demonstrations, **LENGTH)
    answerer.rank(queries, [["a", "b"]] * 3)
    prefix = answerer.prefix
    assert prefix.num_images == 8
    before = seen["tokens"]
    answerer.answer(queries)
    assert answerer.prefix is prefix
    assert seen["tokens"] - before < len(prefix.ids)


def test_text_between_prompt_and_answer_is_not_scored():
    """Templates that begin every answer with empty thoughts: these belong to the prompt."""
    model, processor = few_shot_model("qformer")
    processor.chat_template = processor.chat_template.replace("{{ ' ' }}", "{{ '<think></think> ' }}")
    assert "<think>" in processor.few_shot_text([{"question": "a", "answer": "b"}])
    (found,) = rank_answers(model, processor, [], asked(1), [["yes", "no"]])
    prompt, pictures = processor.few_shot([], asked(1)[0], tokenize=False)
    for choice, value in zip(("yes", "no"), found, strict=True):
        inputs = processor(text=[f"{prompt}<think></think> {choice}"], images=pictures, return_tensors="pt")
        scored = len(choice) + 1
        with torch.no_grad():
            logits = model(**inputs).logits[0, -scored - 1 : -1].log_softmax(-1)
        right = logits.gather(-1, inputs["input_ids"][0, -scored:, None]).sum()
        assert value == pytest.approx(float(right), abs=1e-8)


def test_arguments_of_ranks():
    model, processor = few_shot_model("qformer")
    with pytest.raises(ValueError, match="normalize is 'max'; expected one of sum, mean"):
        rank_answers(model, processor, [], asked(1), [["a"]], "max")
    with pytest.raises(ValueError, match="1 queries, but choices for 2"):
        rank_answers(model, processor, [], asked(1), [["a"], ["b"]])
    with pytest.raises(
        ValueError, match="choices of query 0 are .'a', ' '.; expected a list of texts, none of them empty"
    ):
        rank_answers(model, processor, [], asked(1), [["a", " "]])
    with pytest.raises(ValueError, match="choices of query 0 are 'yes'"):
        rank_answers(model, processor, [], asked(1), ["yes"])
    with pytest.raises(ValueError, match="1 queries, but demonstrations for 2"):
        rank_answers(model, processor, [[], []], asked(1), [["a"]])
    assert rank_answers(model, processor, [], [], []) == []


# ---------------------------------------------------------------------- drawing


def test_drawn_demonstrations():
    assert draw(100, 4) == draw(100, 8)[:4] == [36, 90, 94, 9]
    assert draw(100, 8, seed=1) != draw(100, 8, seed=2)
    assert sorted(draw(8, 7, exclude=3)) == [0, 1, 2, 4, 5, 6, 7]
    assert sorted(draw(8, 5, seed="x", exclude={0, 1, 7, 99})) == [2, 3, 4, 5, 6]
    state = random.getstate()
    draw(100, 5)
    assert random.getstate() == state, "other random numbers are not touched"
    counts = torch.bincount(torch.tensor([index for seed in range(2000) for index in draw(10, 2, seed, exclude=4)]))
    assert counts[4] == 0 and all(360 < count < 530 for place, count in enumerate(counts.tolist()) if place != 4)
    with pytest.raises(ValueError, match="5 demonstrations are wanted, but the pool has 4"):
        draw(5, 5, exclude=2)
