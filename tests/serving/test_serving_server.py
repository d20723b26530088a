"""`vlbridge serve` on our engine, through the real `openai` client: answers are those of `generate`."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests
import tiny
import torch
from chat_server import asked, data_url, listening
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from tiny import COMBINATIONS, tiny_bridge_folder, tiny_image, tiny_model
from transformers import AutoModel, AutoProcessor

from vlbridge.inference import generate_texts
from vlbridge.serving.serving_engine import Engine
from vlbridge.serving.serving_requests import Limits
from vlbridge.serving.serving_server import App, CheckedRequests


NEW_TOKENS = 6
LIMITS = Limits(text_only=True, max_images=3, max_waiting=40, max_new_tokens=400)


def client_of(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def expected(model, processor, messages: list[dict], new_tokens: int = NEW_TOKENS) -> str:
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return generate_texts(model, processor, inputs, max_new_tokens=new_tokens)


def turn(*parts) -> list[dict]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


@pytest.fixture
def served(tmp_path):
    """Serve a tiny model; gives the client, the engine, the model and the processor."""
    stack = []

    def start(bridge: str, language: str = "llama", **options):
        model, processor = tiny_model(bridge, language)
        model.eval().save_pretrained(tmp_path / "model", processor=processor)
        engine = Engine(str(tmp_path / "model"), name="tiny", device="cpu", limits=options.pop("limits", LIMITS))
        server = listening(App(engine).asgi())
        address = server.__enter__()
        stack.append((server, engine))
        return client_of(address), engine, model, processor

    yield start
    for server, engine in stack:
        server.__exit__(None, None, None)
        engine.close()


@pytest.mark.core
@pytest.mark.parametrize(("bridge", "language"), COMBINATIONS)
def test_every_family_answers_as_generate_does(bridge, language, served):
    client, _, model, processor = served(bridge, language)
    pictures = [tiny_image(n, (40 + n, 33)) for n in range(4)]
    several = ("a ", pictures[2], " b ", pictures[3], " c")
    questions = [(pictures[0], "what?"), (pictures[1], "what?"), several, ("no?",)]
    for parts in questions:
        (text,) = expected(model, processor, turn(*parts))
        found = client.chat.completions.create(model="tiny", messages=asked(*parts), max_tokens=NEW_TOKENS)
        assert found.choices[0].message.content == text
        assert found.usage.completion_tokens <= NEW_TOKENS
        streamed = client.chat.completions.create(
            model="tiny", messages=asked(*parts), max_tokens=NEW_TOKENS, stream=True
        )
        assert "".join(event.choices[0].delta.content or "" for event in streamed).strip() == text
    inputs = processor.apply_chat_template(
        turn(*several), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    found = client.chat.completions.create(model="tiny", messages=asked(*several), max_tokens=1)
    assert found.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_many_clients_each_get_their_own_answer(served):
    client, engine, model, processor = served("mlp")
    pictures = [tiny_image(n) for n in range(12)]
    texts = [expected(model, processor, turn(picture, "what?"), 3 + n % 4)[0] for n, picture in enumerate(pictures)]
    assert len(set(texts)) > 6

    def ask(number: int) -> str:
        n = number % len(pictures)
        found = client.chat.completions.create(
            model="tiny", messages=asked(pictures[n], "what?"), max_tokens=3 + n % 4, timeout=120
        )
        return found.choices[0].message.content

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(ask, range(48)))
    assert found == [texts[number % len(pictures)] for number in range(48)]
    assert engine.counts["answered"] == 48 and engine.counts["batches"] < 48 and engine.waiting == 0


def test_bad_requests_disturb_nobody(served):
    client, engine, model, processor = served("mlp")
    (text,) = expected(model, processor, turn(tiny_image(1), "what?"))
    good = {"model": "tiny", "messages": asked(tiny_image(1), "what?"), "max_tokens": NEW_TOKENS}
    bad = [
        (openai.BadRequestError, {"messages": []}, "messages is missing"),
        (openai.NotFoundError, {"model": "other"}, "no model 'other' here; expected tiny"),
        (openai.BadRequestError, {"messages": asked(*[tiny_image(n) for n in range(50)])}, "more than 3 pictures"),
        (openai.BadRequestError, {"messages": asked(tiny_image(1), "<image> what?")}, "which stands for a picture"),
        (openai.APIStatusError, {"messages": asked(tiny_image(1), "w" * 600)}, "context has 512. Shorten"),
        (openai.APIStatusError, {"messages": asked(tiny_image(1), "w" * 40_000)}, "at most 32768"),
    ]
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(client.chat.completions.create, **good) for _ in range(4)]
        for kind, changed, said in bad:
            with pytest.raises(kind, match=said) as error:
                client.chat.completions.create(**{**good, **changed})
            assert 400 <= error.value.status_code < 500
        assert [answer.result().choices[0].message.content for answer in answers] == [text] * 4
    assert engine.counts["failed"] == 0 and engine.waiting == 0


def test_a_large_body_is_not_read(served):
    client, *_ = served("mlp", limits=Limits(max_bytes=2000))
    with pytest.raises(openai.APIStatusError, match="more than 2000 bytes"):
        client.chat.completions.create(model="tiny", messages=asked("w" * 3000))


def test_a_model_that_fails_for_one_request_answers_the_others(served, monkeypatch):
    client, engine, model, processor = served("mlp")
    (text,) = expected(model, processor, turn(tiny_image(1), "what?"))
    maker = engine.prompts[engine.base]
    genuine = maker.of_templates

    def refusing(templates, pictures_of):
        if any("refuse" in template for template in templates):
            raise ValueError("I can't")
        return genuine(templates, pictures_of)

    monkeypatch.setattr(maker, "of_templates", refusing)
    with ThreadPoolExecutor(6) as pool:
        ask = [
            pool.submit(
                client.chat.completions.create, model="tiny", max_tokens=NEW_TOKENS,
                messages=asked(tiny_image(1), "refuse" if number == 2 else "what?"),
            )
            for number in range(6)
        ]  # fmt: skip
    with pytest.raises(openai.BadRequestError, match="The model refuses this request: I can't"):
        ask[2].result()
    assert {ask[n].result().choices[0].message.content for n in (0, 1, 3, 4, 5)} == {text}


@pytest.fixture
def never_ending(served, monkeypatch):
    """A model that never says the end, so that answers take as long as they may."""
    client, engine, model, processor = served("mlp")
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", None)
    return client, engine


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(stream, never_ending):
    client, engine = never_ending
    began = threading.Event()
    genuine = engine.model.generate

    def generate(*args, **kwargs):
        began.set()
        return genuine(*args, **kwargs)

    engine.model.generate = generate
    body = {"messages": asked(tiny_image(1), "what?"), "max_tokens": 400, "stream": stream}
    url = f"{client.base_url}chat/completions"

    def leave():
        with requests.post(url, json=body, timeout=120, stream=True) as answer:
            next(answer.iter_content(1))

    if stream:
        leave()
    else:
        with pytest.raises(requests.Timeout):
            requests.post(url, json=body, timeout=(30, 0.3))
    assert began.wait(60)
    deadline = time.monotonic() + 60
    while engine.waiting and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.waiting == 0 and engine.counts["cancelled"] == 1 and engine.counts["tokens"] < 400


def test_a_full_queue_is_said(served, monkeypatch):
    client, engine, *_ = served("mlp", limits=Limits(max_waiting=1, text_only=True))
    hold = threading.Event()
    genuine = engine.model.generate
    engine.model.generate = lambda *args, **kwargs: hold.wait(60) and genuine(*args, **kwargs)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.chat.completions.create, model="tiny", messages=asked("a"), max_tokens=2)
        while not engine.waiting:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting already"):
            client.chat.completions.create(model="tiny", messages=asked("b"))
        hold.set()
        assert first.result().choices


def test_health_models_and_metrics(served):
    client, engine, *_ = served("qformer")
    assert [model.id for model in client.models.list()] == ["tiny"]
    root = str(client.base_url).removesuffix("/v1/")
    assert requests.get(f"{root}/health", timeout=60).status_code == 200
    client.chat.completions.create(model="tiny", messages=asked(tiny_image(1), "what?"), max_tokens=2)
    assert "vlbridge_answered_total 1\n" in requests.get(f"{root}/metrics", timeout=60).text
    engine.close()
    assert requests.get(f"{root}/health", timeout=60).status_code == 503


@pytest.mark.parametrize("bridge", tiny.BRIDGE_OPTIONS)
def test_bridges_by_name(bridge, tmp_path):
    """Each request is answered by the bridge that it names, whichever came before."""
    folder = tiny_bridge_folder(tmp_path, bridge)
    other = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in other.bridge.parameters():
            parameter.mul_(1.7)
    other.save_pretrained(tmp_path / "other", bridge_only=True)
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    conversation = turn(tiny_image(3), "what?")
    texts = {
        "base": expected(model, processor, conversation)[0],
        "base:other": expected(other, processor, conversation)[0],
    }
    assert len(set(texts.values())) == 2
    engine = Engine(str(folder), {"other": str(tmp_path / "other")}, "base", "cpu", limits=LIMITS)
    with listening(App(engine).asgi()) as address:
        client = client_of(address)
        assert [each.id for each in client.models.list()] == list(texts)

        def ask(name: str) -> str:
            found = client.chat.completions.create(
                model=name, messages=asked(tiny_image(3), "what?"), max_tokens=NEW_TOKENS
            )
            return found.choices[0].message.content

        names = ["base", "base:other"] * 4
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, names)) == [texts[name] for name in names]
        with pytest.raises(openai.NotFoundError, match="expected base or base:other"):
            ask("base:third")
    engine.close()


# ---------------------------------------------------------------------- before vLLM


def test_the_middleware_checks_requests_and_passes_good_ones_on():
    seen = []

    async def answer(request):
        seen.append(await request.json())
        return JSONResponse({"answered": True})

    app = Starlette(routes=[Route(path, answer, methods=["POST"]) for path in ("/v1/chat/completions", "/pause")])
    limits = Limits(max_images=2, max_pixels=10_000)
    good = {"messages": asked(tiny_image(1), "what?"), "logprobs": True, "max_tokens": 5}
    with listening(CheckedRequests(app, limits)) as address:
        assert requests.post(f"{address}/v1/chat/completions", json=good).json() == {"answered": True}
        assert seen == [good]  # the engine decides about the rest
        for changed, status, said in [
            ({"messages": asked("no picture")}, 400, "There is no picture"),
            ({"messages": asked(*[tiny_image(n) for n in range(3)])}, 400, "more than 2 pictures"),
            ({"messages": asked(tiny_image(1, (200, 200)), "a")}, 413, "200x200 pixels"),
            ({"max_tokens": 5000}, 400, "expected 1 to 1024"),
            ({"n": 3}, 400, "one answer per request"),
        ]:
            answered = requests.post(f"{address}/v1/chat/completions", json={**good, **changed})
            assert answered.status_code == status and said in answered.json()["error"]["message"]
        assert requests.post(f"{address}/pause", json={}).status_code == 404
    assert len(seen) == 1


def test_the_middleware_puts_fetched_pictures_into_the_request(monkeypatch):
    from vlbridge.serving import serving_requests

    picture = data_url(tiny_image(1))
    monkeypatch.setattr(serving_requests, "fetch", lambda *args: serving_requests.base64.b64decode(picture[22:]))
    body = {"messages": asked("a")}
    body["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})
    passed = json.loads(CheckedRequests(None, Limits(fetch=True)).checked(json.dumps(body).encode()))
    url = passed["messages"][0]["content"][1]["image_url"]["url"]
    assert url.partition(",")[2] == picture.partition(",")[2]
