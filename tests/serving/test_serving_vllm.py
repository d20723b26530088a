"""The real vLLM: ids of prompts and greedy tokens are those of `generate`. Run it with `make serving`."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import openai
import pytest
import requests


pytest.importorskip("vllm")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

import tiny
import torch
from chat_server import asked
from tiny import QFORMER, TOKENS, bert_like_tokenizer, tiny_image, tiny_model, tiny_tokenizer
from transformers import AutoModel, AutoProcessor, Blip2VisionConfig, LlamaConfig, OPTConfig
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import vlbridge
from vlbridge import compat
from vlbridge.compat_vllm import NAMES
from vlbridge.convert import export


pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
NEW_TOKENS = 8
# vLLM's attention on CPUs takes heads of 32 and more
WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512}
LANGUAGE = {
    "llama": lambda: LlamaConfig(**WIDE, **TOKENS, num_key_value_heads=1, intermediate_size=96),
    "opt": lambda: OPTConfig(**WIDE, **TOKENS, ffn_dim=96, word_embed_proj_dim=64),
}
# Whether a prompt may have several pictures: exported BLIP-2's can't
KINDS = {
    "square": ("mlp", "llama", "clip", {}),
    "pad": ("mlp", "llama", "clip", {"image_aspect_ratio": "pad"}),
    "anyres": ("mlp", "llama", "clip", {"image_aspect_ratio": "anyres"}),
    "cnn": ("mlp", "opt", "resnet", {}),
    "qformer": ("qformer", "opt", "clip", {}),
    "instructed": ("qformer", "llama", "clip", {"qformer_config": {**QFORMER, "use_text": True, "vocab_size": 60}}),
}


@pytest.fixture(autouse=True)
def _wide_language_models(monkeypatch):
    for name, config in LANGUAGE.items():
        monkeypatch.setitem(tiny.LANGUAGE, name, config)


@pytest.fixture(autouse=True)
def _free():
    yield
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.path)
def test_name_is_what_we_take_it_for(name):
    assert compat.problem_with(name) is None


def turn(*contents) -> list[dict]:
    """A user's turn of texts and pictures."""
    return [
        {"role": "user", "content": [
            {"type": "text", "text": content} if isinstance(content, str) else {"type": "image", "image": content}
            for content in contents
        ]}
    ]  # fmt: skip


def conversations(several: bool = True) -> list[list[dict]]:
    found = [turn(tiny_image(n, size), f"w{n} w1 is {n}?") for n, size in enumerate([(40, 33), (33, 70), (90, 30)])]
    found.append(turn(tiny_image(0, (40, 33)), "w7 w3 another question"))  # an image that vLLM has seen
    if several:
        found += [turn(tiny_image(8, (50, 20)), "and", tiny_image(9, (20, 50)), "?"), turn("no picture?")]
    return found


def as_vllm_takes_it(conversation: list[dict]) -> list[dict]:
    content = [
        part if part["type"] == "text" else {"type": "image_pil", "image_pil": part["image"]}
        for part in conversation[0]["content"]
    ]
    return [{"role": "user", "content": content}]


def same_as_generate(llm: LLM, model, processor, asked: list) -> None:
    """Twice: the second time vLLM has the pictures in its cache."""
    expected = []
    for conversation in asked:
        inputs = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        expected.append((inputs["input_ids"][0].tolist(), out[0, inputs["input_ids"].shape[1] :].tolist()))
    assert len({tuple(tokens) for _, tokens in expected}) > 1
    for _ in range(2):
        answers = llm.chat(
            [as_vllm_takes_it(conversation) for conversation in asked],
            SamplingParams(temperature=0, max_tokens=NEW_TOKENS),
            use_tqdm=False,
        )
        found = [(answer.prompt_token_ids, list(answer.outputs[0].token_ids)) for answer in answers]
        assert found == expected


def start(folder, **options) -> LLM:
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 4}
    return LLM(str(folder), **settings, limit_mm_per_prompt={"image": 2}, **options)


def whole_model(kind: str, folder):
    """One of `KINDS` and its processor, which are saved in a folder too."""
    bridge, language, vision, options = KINDS[kind]
    model, processor = tiny_model(bridge, language, vision, **options)
    if kind == "instructed":
        processor.qformer_tokenizer = bert_like_tokenizer()
    model.eval().save_pretrained(folder, processor=processor)
    return model, processor


@pytest.mark.parametrize("kind", KINDS)
def test_whole_models(kind, tmp_path):
    model, processor = whole_model(kind, tmp_path)
    same_as_generate(start(tmp_path), model, processor, conversations())


def pinned(folder):
    model, processor = tiny_model("mlp", "llama")
    model.vision_model.save_pretrained(folder / "eye")
    model.language_model.save_pretrained(folder / "language")
    parts = {"image_processor": processor.image_processor, "tokenizer": tiny_tokenizer()}
    model, processor = vlbridge.compose(folder / "eye", folder / "language", "mlp", **parts)
    tiny.spread_weights(model.bridge)
    model.eval().save_pretrained(folder / "bridge", bridge_only=True, processor=processor)
    return folder / "bridge"


def test_a_bridge_alone_and_its_pins(tmp_path):
    folder = pinned(tmp_path)
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    same_as_generate(start(folder), model, processor, conversations())
    gc.collect()
    cleanup_dist_env_and_memory()
    model.language_model.model.embed_tokens.weight.data[5] += 1
    model.language_model.save_pretrained(tmp_path / "language")
    with pytest.raises(vlbridge.FrozenPartError, match="not the one that this bridge was trained with"):
        start(folder)


@pytest.mark.parametrize(("bridge", "language"), [("perceiver", "llama"), ("qformer", "t5")])
def test_other_models_are_refused(bridge, language, tmp_path):
    model, processor = tiny_model(bridge, language)
    model.save_pretrained(tmp_path, processor=processor)
    with pytest.raises(compat.CompatibilityError, match="Use `vlbridge serve MODEL --engine transformers`"):
        start(tmp_path)


@pytest.mark.parametrize("kind", ["square", "pad", "anyres", "blip2"])
def test_exported_models(kind, tmp_path):
    """In transformers' classes, which vLLM has its own implementations of: our ids and greedy tokens."""
    if kind == "blip2":
        vision = Blip2VisionConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                                   image_size=30, patch_size=6)  # fmt: skip
        model, processor = tiny_with_vision(vision)
    else:
        bridge, language, vision, options = KINDS[kind]
        model, processor = tiny_model(bridge, language, vision, vision_feature_layer=-2, **options)
    model.eval().save_pretrained(tmp_path / "ours", processor=processor)
    export(tmp_path / "ours", tmp_path / "native")
    same_as_generate(start(tmp_path / "native"), model, processor, conversations(several=False))


def tiny_with_vision(vision):
    torch.manual_seed(0)
    options = {"vision_feature_layer": -1, "qformer_config": QFORMER}
    model, processor = vlbridge.compose(vision, LANGUAGE["opt"](), "qformer", tokenizer=tiny_tokenizer(), **options)
    tiny.spread_weights(model)
    return model, processor


@contextmanager
def serving(command: list, *more: str):
    """The address of a server, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--dtype", "float32", *more, "--enforce-eager", "--max-model-len", "512"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen([*map(str, command), *options], env=environment)
    try:
        deadline = time.monotonic() + 1500
        while True:
            assert process.poll() is None and time.monotonic() < deadline, "the server does not start"
            try:
                if requests.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200:
                    break
            except requests.ConnectionError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=120)


def same_through_the_client(address: str, model, processor) -> openai.OpenAI:
    """Ids and greedy tokens of `generate`, asked for with the `openai` client."""
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    answers = set()
    for number, size in enumerate([(40, 33), (33, 70), (90, 30)]):
        picture, text = tiny_image(number, size), f"w{number} w1 what is {number}?"
        inputs = processor.apply_chat_template(
            turn(picture, text), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        expected = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        found = client.chat.completions.create(
            model="tiny", messages=asked(picture, text), max_tokens=NEW_TOKENS, temperature=0,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        ids = inputs["input_ids"][0].tolist()
        assert found.prompt_token_ids == ids
        assert found.choices[0].token_ids == expected[0, len(ids) :].tolist()
        answers.add(tuple(found.choices[0].token_ids))
    assert len(answers) > 1
    return client


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_serve_finds_the_plugin(kind, tmp_path):
    model, processor = whole_model(kind, tmp_path)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", tmp_path, "--served-model-name", "tiny"]
    with serving(command, "--max-num-seqs", "4") as address:
        same_through_the_client(address, model, processor)


def test_our_checks_stand_before_vllm(tmp_path):
    model, processor = whole_model("square", tmp_path)
    command = [sys.executable, "-m", "vlbridge_cli", "serve", tmp_path, "--engine", "vllm", "--name", "tiny"]
    with serving(command, "--max-images", "2", "--") as address:
        client = same_through_the_client(address, model, processor)
        for changed, status in [
            ({"messages": asked(*[tiny_image(n) for n in range(3)])}, 400),
            ({"messages": asked("no picture")}, 400),
            ({"messages": asked(tiny_image(1), "w" * 40_000)}, 413),
            ({"messages": asked(tiny_image(1), "w" * 600)}, 400),  # vLLM's own check of the context
            ({"model": "tiny:other"}, 404),
        ]:
            with pytest.raises(openai.APIStatusError) as error:
                client.chat.completions.create(**{"model": "tiny", "messages": asked(tiny_image(1), "a"), **changed})
            assert error.value.status_code == status
