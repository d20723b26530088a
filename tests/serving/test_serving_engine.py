"""The engine under the page and the server: a picture is encoded once, however often people ask about it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny import COMBINATIONS, tiny_image, tiny_model

from vlbridge.inference import generate_texts
from vlbridge.serving import serving_engine
from vlbridge.serving.serving_engine import Engine
from vlbridge.serving.serving_requests import ChatRequest


NEW_TOKENS = 5


@pytest.fixture
def engine_of(tmp_path):
    """Make an engine of a tiny model; gives the engine and what its vision encoder has seen."""
    engines = []

    def start(bridge: str, language: str = "llama"):
        model, processor = tiny_model(bridge, language)
        model.eval().save_pretrained(tmp_path / "model", processor=processor)
        engine = Engine(str(tmp_path / "model"), device="cpu")
        engines.append(engine)
        seen = SimpleNamespace(pictures=0)

        def count(module, args, kwargs):
            seen.pictures += len(kwargs["pixel_values"])

        engine.model.vision_model.register_forward_pre_hook(count, with_kwargs=True)
        return engine, seen

    yield start
    for engine in engines:
        engine.close()


def say(engine, messages: list[dict]) -> str:
    request = ChatRequest(None, messages, NEW_TOKENS, options={"do_sample": False})
    return engine.submit(engine.prepare(request)).done.result(timeout=60).text


def in_the_plain_way(engine, messages: list[dict]) -> str:
    inputs = engine.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return generate_texts(engine.model, engine.processor, inputs, max_new_tokens=NEW_TOKENS)[0]


def question(text: str, *images) -> dict:
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


@pytest.mark.core
@pytest.mark.parametrize(("bridge", "language"), COMBINATIONS)
def test_a_conversation_encodes_its_picture_once(bridge, language, engine_of):
    engine, seen = engine_of(bridge, language)
    messages, said = [], []
    for number, text in enumerate(("what?", "a b?", "no?")):
        # the page and clients send the picture again with each turn
        messages.append(question(text, *([tiny_image(3)] if number == 0 else [])))
        if number:
            messages[0] = question("what?", tiny_image(3))
        said.append(say(engine, messages))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": said[-1] or "a"}]})
    assert seen.pictures == 1
    for number, text in enumerate(said):
        assert in_the_plain_way(engine, messages[: 2 * number + 1]) == text
    assert seen.pictures == 4, "without the engine, each turn encodes it"
    assert say(engine, [question("what?", tiny_image(4))]) == in_the_plain_way(
        engine, [question("what?", tiny_image(4))]
    ), "another picture is not taken for the first"


def test_few_pictures_are_kept_the_oldest_go_first(engine_of, monkeypatch):
    monkeypatch.setattr(serving_engine, "KEPT_PICTURES", 2)
    engine, seen = engine_of("mlp")
    for number, pictures in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4), (2, 5)):
        say(engine, [question("what?", tiny_image(number))])
        assert seen.pictures == pictures


def test_pictures_are_kept_within_their_bytes(engine_of, monkeypatch):
    monkeypatch.setattr(serving_engine, "KEPT_BYTES", 1)
    engine, seen = engine_of("perceiver")
    for _ in range(2):
        say(engine, [question("what?", tiny_image(0))])
    assert seen.pictures == 2
