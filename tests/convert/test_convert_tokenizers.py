"""Converted sentencepiece tokenizers split the official prompts as sentencepiece does, wherever they are loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tiny import QFORMER, bert_like_tokenizer, tiny_image, tiny_model, tiny_tokenizer
from transformers import AutoProcessor, AutoTokenizer

from vlbridge.convert import ConversionError, convert_llava, export
from vlbridge.convert.convert_blip2 import load_tokenizer as load_blip2_tokenizer
from vlbridge.convert.convert_blip2_transformers import port_processor
from vlbridge.convert.convert_language import load_language_tokenizer
from vlbridge.convert.convert_openflamingo import load_tokenizer as load_flamingo_tokenizer
from vlbridge.convert.convert_qformer import build_processor
from vlbridge.processing.processing_llava import CONVERSATIONS
from vlbridge.processing.processing_qformer import bert_tokenizer


CASE = Path(__file__).parents[1] / "parity" / "cases" / "llava" / "v16_anyres"
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
QUESTIONS = ["\nWhat is it?", " what  is it", "[INST] a\n\n b "]


def official_ids(path: Path, prompt: str, legacy: bool) -> list[int]:
    """What LLaMA's tokenizer of transformers 4, on sentencepiece, makes of a prompt; -200 for an image.

    The texts before, between and after images are tokenised separately, and in them the texts between special tokens:
    each like a whole text if legacy, else only the first one. The first token is added.
    """
    whole = SentencePieceProcessor(model_file=str(path))
    mark = len(whole.encode("\n"))

    def within(text: str) -> list[int]:  # without the space that begins a whole text
        return whole.encode("\n" + text)[mark:]

    ids = [SPECIAL["<s>"]]
    for number, chunk in enumerate(prompt.split("<image>")):
        ids += [-200] * bool(number)
        for index, text in enumerate(re.split(r"(<s>|</s>|<unk>)", chunk)):
            if text in SPECIAL:
                ids.append(SPECIAL[text])
            elif text:
                ids += whole.encode(text) if legacy or index == 0 else within(text)
    return ids


def ids_of(processor, text: str, images: list) -> list[int]:
    """The processor's ids, -200 for an image."""
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    [ids] = processor(images=images or None, text=[text])["input_ids"]
    ids = list(ids)
    return [-200 if t == image else t for k, t in enumerate(ids) if t != image or ids[k - 1] != image]


def checkpoint(folder: Path, kind: str, legacy: bool | None) -> Path:
    """The v1.6 fixture as a LLaMA's or a Mistral's."""
    shutil.copytree(CASE / "checkpoint", folder)
    fields = json.loads((folder / "config.json").read_text())
    fields["model_type"] = f"llava_{kind}"
    (folder / "config.json").write_text(json.dumps(fields))
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    fields.pop("legacy")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(fields if legacy is None else {**fields, "legacy": legacy})
    )
    return folder


@pytest.mark.core
@pytest.mark.parametrize("legacy", [True, None, False])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_prompts_are_split_as_sentencepiece_does(kind, legacy, tmp_path):
    """Of every conversation: after conversion, after saving again, and in an exported folder."""
    place = checkpoint(tmp_path / "checkpoint", kind, legacy)
    convert_llava(place, CASE / "clip_vision_tower", output=tmp_path / "out", verify=False)
    processors = {"converted": AutoProcessor.from_pretrained(tmp_path / "out")}
    processors["converted"].save_pretrained(tmp_path / "again")
    processors["again"] = AutoProcessor.from_pretrained(tmp_path / "again")
    processors["converted"].tokenizer.save_pretrained(tmp_path / "tokenizer")
    export(tmp_path / "out", tmp_path / "native", verify=False)
    export(tmp_path / "out", tmp_path / "official", to="official", verify=False)
    shutil.copytree(CASE / "clip_vision_tower", tmp_path / "official" / "clip_vision_tower")
    convert_llava(tmp_path / "official", CASE / "clip_vision_tower", output=tmp_path / "back", verify=False)
    if legacy is not False:  # else LLaMA's class, which needs its own setting
        processors["back from the official layout"] = AutoProcessor.from_pretrained(tmp_path / "back")
    native = AutoProcessor.from_pretrained(tmp_path / "native")
    tokenizers = [native.tokenizer, *(AutoTokenizer.from_pretrained(tmp_path / n) for n in ("tokenizer", "native"))]
    for name in CONVERSATIONS:
        if name in ("chatml_direct", "mpt"):  # of tokenizers with ChatML's tokens
            continue
        processor = processors["converted"]
        options = {"conversation": name, "image_aspect_ratio": "square", "space_after_image": legacy is False}
        processor = type(processor)(
            processor.image_processor, processor.tokenizer, image_size=28, patch_size=14, **options
        )
        for question in QUESTIONS:
            messages = [
                {"role": "user", "content": f"<image>{question}"},
                {"role": "assistant", "content": "a dog"},
                {"role": "user", "content": "hello"},
            ]
            for turns in (messages[:1], messages):
                prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
                expected = official_ids(place / "tokenizer.model", prompt, legacy is not False)
                for where, loaded in processors.items():
                    assert ids_of(loaded, prompt, [tiny_image()]) == expected, (name, where, prompt)
                if legacy is not False:  # else the native template has a space after the image
                    assert ids_of(native, prompt, [tiny_image()]) == expected, (name, prompt)
                text = prompt.replace("<image>", "")
                if legacy is not False or not text.startswith(" "):
                    expected = official_ids(place / "tokenizer.model", text, legacy is not False)
                    assert all(tokenizer(text)["input_ids"] == expected for tokenizer in tokenizers), (name, text)


@pytest.mark.core
@pytest.mark.parametrize("legacy", [True, None, False])
def test_vicuna_in_instructblip(legacy, tmp_path):
    """Queries, `</s>`, and the text as a whole: after conversion, saving, in transformers' processor, and back.

    Source: `generate` of `lavis/models/blip2_models/blip2_vicuna_instruct.py`, whose tokenizer is LLaMA's.
    """
    place = checkpoint(tmp_path / "llm", "llama", legacy)
    (place / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_blip2_tokenizer(place, "llm")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    bert = bert_tokenizer(bert_like_tokenizer())
    model, plain = tiny_model("qformer", qformer_config={**QFORMER, "use_text": True, "vocab_size": len(bert)})
    config, queries = model.config, QFORMER["num_query_tokens"]
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    converted = build_processor(config, "llm", plain.image_processor, tokenizer, bert)
    converted.save_pretrained(tmp_path / "saved")
    processors = {"converted": converted, "saved": AutoProcessor.from_pretrained(tmp_path / "saved")}
    processors["saved"].save_pretrained(tmp_path / "again")
    processors["again"] = AutoProcessor.from_pretrained(tmp_path / "again")
    port_processor(config, processors["again"]).save_pretrained(tmp_path / "native")
    native = AutoProcessor.from_pretrained(tmp_path / "native")
    assert type(native).__name__ == "InstructBlipProcessor"
    back = AutoTokenizer.from_pretrained(tmp_path / "native")
    processors["back"] = build_processor(config, "llm", plain.image_processor, back, bert)
    whole = SentencePieceProcessor(model_file=str(place / "tokenizer.model"))
    questions = [*QUESTIONS, "describe the image", "What is the color of the car? Short answer:", "\u00e9\u4f60 1234.5"]
    for question in [*questions, *([""] if legacy is not False else [])]:
        expected = [config.image_token_id] * queries + [2, *whole.encode(question)]
        for where, processor in processors.items():
            for text in (f"<image>{question}", question):
                [ids] = processor(images=[tiny_image()], text=[text])["input_ids"]
                assert list(ids) == expected, (where, text)
            assert processor.decode(whole.encode("a  dog\nb")) == "a  dog\nb"
        if legacy is not False or not question.startswith(" "):
            [ids] = native(images=[tiny_image()], text=[question])["input_ids"]
            assert list(ids) == expected, question
    answers = native(images=[tiny_image()] * 2, text=["a dog", "what is it"], padding=True)
    pad, begin = native.tokenizer.pad_token_id, [config.image_token_id] * queries
    short, long = whole.encode("a dog"), whole.encode("what is it")
    assert answers["input_ids"] == [
        [*begin, *[pad] * (len(long) - len(short)), 2, *short],
        [*begin, 2, *long],
    ]  # as in the official code, padding stands behind the queries


@pytest.mark.parametrize("legacy", [True, None])
def test_llama_in_openflamingo(legacy, tmp_path):
    """A file that does not say `legacy` meant it."""
    place = checkpoint(tmp_path / "llm", "llama", legacy)
    (place / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_flamingo_tokenizer(place)
    tokenizer.save_pretrained(tmp_path / "saved")
    whole = SentencePieceProcessor(model_file=str(place / "tokenizer.model"))
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        for text in QUESTIONS:
            assert loaded.encode(f"</s>{text}", add_special_tokens=False) == [2, *whole.encode(text)]
            assert loaded.encode(text, add_special_tokens=False) == whole.encode(text)
            assert loaded.decode(whole.encode("a  dog\nb")) == "a  dog\nb"


def trained(folder: Path, **options) -> Path:
    """A small tokenizer of sentencepiece's with LLaMA's settings, except `options`."""
    folder.mkdir()
    words = [f"{a}{b} {b} {a}\n" for a in ("what", "dog", "is", "the") for b in ("cat", "in", "hello")]
    (folder / "text").write_text("".join(words) * 20)
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=310, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2, **{**settings, **options},
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def test_a_tokenizer_without_a_space_in_front(tmp_path):
    """As Yi's in LLaVA-1.6-34B."""
    place = trained(tmp_path / "yi", add_dummy_prefix=False)
    whole = SentencePieceProcessor(model_file=str(place / "tokenizer.model"))
    tokenizer = load_language_tokenizer(place)
    tokenizer.save_pretrained(tmp_path / "saved")
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        for text in ("user\nwhat dog", " the cat", "hello"):
            assert loaded.encode(text, add_special_tokens=False) == whole.encode(text)
            assert loaded.encode(f"</s>{text}", add_special_tokens=False) == [2, *whole.encode(text)]
            assert loaded.decode(whole.encode(text)) == text


def test_a_tokenizer_that_cannot_be_followed_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="LlamaTokenizer can't follow.*Give a folder with the tokenizer.json"):
        load_language_tokenizer(trained(tmp_path / "other", remove_extra_whitespaces=True))


def test_a_complete_tokenizer_file_is_taken_as_it_is(tmp_path):
    """Also under LLaMA's name, whose class would build steps of its own."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**fields, "tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert load_language_tokenizer(tmp_path).encode("a dog") == tokenizer.encode("a dog")
