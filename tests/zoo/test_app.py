"""What the page does, without the page: answers are those of the processors and `generate`, for every family."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import tiny_image, tiny_model

from vlbridge.app import PAGE_LIMITS, Asked, Bridge, Example, Turn, names_of, read_picture, replies
from vlbridge.inference import answer, answer_few_shot, generate_texts, question_inputs
from vlbridge.inspection import answer_attention, did_it_look
from vlbridge.inspection.inspection_looking import ids_of, words_of
from vlbridge.serving.serving_requests import RequestError


FAMILIES = [("mlp", "llama"), ("qformer", "llama"), ("qformer", "t5"), ("perceiver", "llama")]
NEW_TOKENS = 8
LIMITS = replace(PAGE_LIMITS, max_images=3, max_new_tokens=400, max_characters=2000)


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def family(request, tmp_path_factory):
    """A bridge of the page, and the same model and processor for comparison."""
    model, processor = tiny_model(*request.param)
    folder = tmp_path_factory.mktemp("models") / "-".join(request.param)
    model.eval().save_pretrained(folder, processor=processor)
    bridge = Bridge(folder.name, str(folder), "cpu", limits=LIMITS)
    yield bridge, model, processor
    bridge.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two bridges of the page that don't say the same."""
    bridges = []
    for seed, kind in enumerate(("mlp", "perceiver")):
        model, processor = tiny_model(kind, seed=seed)
        folder = tmp_path_factory.mktemp("models") / kind
        model.eval().save_pretrained(folder, processor=processor)
        bridges.append(Bridge(kind, str(folder), "cpu", limits=LIMITS))
    yield bridges
    for bridge in bridges:
        bridge.close()


def last(bridges, asked: Asked, stop=None) -> dict:
    *_, found = replies(bridges, asked, stop)
    return found


def one(bridge: Bridge, asked: Asked, stop=None):
    return last([bridge], asked, stop)[bridge.name]


@pytest.mark.core
def test_questions_and_captions_are_those_of_the_command_line(family):
    bridge, model, processor = family
    picture = tiny_image(1)
    for question in ("what?", ""):
        (text,) = answer(model, processor, [picture], question or processor.caption_prompt, max_new_tokens=NEW_TOKENS)
        reply = one(bridge, Asked(picture, question, max_new_tokens=NEW_TOKENS))
        assert (reply.state, reply.text, reply.error) == ("done", text, "")
        assert reply.prompt_tokens == question_inputs(processor, [picture], question or processor.caption_prompt)[
            "input_ids"
        ].shape[1]  # fmt: skip
        assert 1 <= reply.tokens <= NEW_TOKENS and reply.seconds > 0
        budget = bridge.budget(Asked(picture, question), reply)
        if budget["window"] is not None:
            assert sum(budget[name] for name in ("pictures", "text", "answer", "left")) == budget["window"]
        if model.config.visual_tokens_in_prompt:
            ids = question_inputs(processor, [picture], "what?")["input_ids"]
            assert budget["pictures"] == budget["visual_tokens"] == int((ids == model.config.image_token_id).sum())
        else:
            assert budget["pictures"] == 1 < budget["visual_tokens"]


def test_examples_are_shown_in_the_family_s_own_prompt(family):
    bridge, model, processor = family
    pictures = [tiny_image(n) for n in range(3)]
    shown = [{"image": pictures[0], "question": "a?", "answer": "b"}, {"image": pictures[1], "caption": "c"}]
    (text,) = answer_few_shot(
        model, processor, [shown], [{"image": pictures[2], "question": "d?"}], max_new_tokens=NEW_TOKENS
    )
    examples = [Example(pictures[0], "b", "a?"), Example(pictures[1], "c")]
    asked = Asked(pictures[2], "d?", examples, max_new_tokens=NEW_TOKENS)
    reply = one(bridge, asked)
    without = one(bridge, Asked(pictures[2], "d?", max_new_tokens=NEW_TOKENS))
    assert reply.text == text and reply.prompt_tokens > without.prompt_tokens
    assert bridge.budget(asked, reply)["pictures"] == 3 * bridge.budget(Asked(pictures[2]), reply)["pictures"]
    with pytest.raises(RequestError, match="more than 3 pictures"):
        bridge.job(Asked(pictures[2], "d?", [*examples, examples[0]]))
    with pytest.raises(RequestError, match="stands for a picture"):
        bridge.job(Asked(pictures[2], "d?", [Example(pictures[0], "<image>")]))


def test_a_conversation_is_read_again_with_each_question(family):
    bridge, model, processor = family
    picture = tiny_image(2)
    said = [Turn("", "a b"), Turn("c?", "d")]
    texts = [
        ("user", processor.caption_prompt),
        ("assistant", "a b"),
        ("user", "c?"),
        ("assistant", "d"),
        ("user", "e?"),
    ]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts]
    messages[0]["content"].insert(0, {"type": "image", "image": picture})
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    (text,) = generate_texts(model, processor, inputs, max_new_tokens=NEW_TOKENS)
    asked = Asked(picture, "e?", turns={bridge.name: said, "another": [Turn("x", "y")]}, max_new_tokens=NEW_TOKENS)
    reply = one(bridge, asked)
    assert (reply.text, reply.prompt_tokens) == (text, inputs["input_ids"].shape[1])
    refused = one(bridge, replace(asked, examples=[Example(picture, "f")]))
    assert refused.state == "failed" and "start over" in refused.error


def test_looking_inside_is_what_the_inspection_finds(family):
    bridge, model, processor = family
    picture, answer_text = tiny_image(3, (900, 600)), "ab cd"
    found = bridge.look(picture, "what?", answer_text)
    ids = ids_of(model, processor, answer_text)
    expected = did_it_look(model, processor, picture, "what?", ids)
    assert [word.word for word in found.words] == ["ab", "cd"]
    for ours, theirs in zip(found.words, expected):
        assert (ours.picture, ours.blank) == pytest.approx((theirs.picture, theirs.blank), abs=1e-4)
    attention = answer_attention(model, question_inputs(processor, [picture], "what?"), ids)
    shares = attention.share_on_images()[:, 0].tolist()
    grouped = [[shares[token] for token in tokens] for _, tokens in words_of(processor, ids[0].tolist())]
    assert found.shares == pytest.approx([sum(each) / len(each) for each in grouped], abs=1e-4)
    assert [word for word, _ in found.overlays] == ["ab", "cd"]
    assert {drawn.size for _, drawn in found.overlays} == {(512, 341)}
    with pytest.raises(RequestError, match="no answer"):
        bridge.look(picture, "what?", " ")


def test_models_answer_side_by_side_and_stream(pair):
    picture = tiny_image(4)
    asked = Asked(picture, "what?", max_new_tokens=40)
    states, texts = [], {bridge.name: [] for bridge in pair}
    for found in replies(pair, asked):
        states.append({reply.state for reply in found.values()})
        for name, reply in found.items():
            texts[name].append(reply.text)
    assert states[-1] == {"done"}
    for bridge in pair:
        seen = texts[bridge.name]
        assert seen[-1] == one(bridge, asked).text
        assert all(later.strip().startswith(earlier.strip()) for earlier, later in zip(seen, seen[1:]))
    assert texts["mlp"][-1] != texts["perceiver"][-1]


def test_what_goes_wrong_with_one_model_does_not_cost_the_other_its_answer(pair, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("out of something")

    engine = pair[0].engine
    monkeypatch.setattr(engine.prompts[engine.base], "of_templates", fail)
    found = last(pair, Asked(tiny_image(5), "what?", max_new_tokens=NEW_TOKENS))
    assert (found["mlp"].state, found["mlp"].error) == ("failed", "The model failed.")
    assert found["perceiver"].state == "done"
    assert "out of something" in capsys.readouterr().err
    monkeypatch.undo()
    long = last(pair, Asked(tiny_image(5), "w" * 490, max_new_tokens=60))
    assert all("context has 512. Shorten" in reply.error for reply in long.values())
    assert "at most 2000" in one(pair[0], Asked(tiny_image(5), "w" * 3000)).error
    assert "expected 1 to 400" in one(pair[0], Asked(tiny_image(5), "w", max_new_tokens=401)).error


def test_people_at_the_same_time_get_their_own_answers(pair):
    pictures = [tiny_image(n) for n in range(6)]
    asked = [Asked(picture, f"what {n}?", max_new_tokens=NEW_TOKENS) for n, picture in enumerate(pictures)]
    alone = [{name: reply.text for name, reply in last(pair, each).items()} for each in asked]
    assert len({texts["mlp"] for texts in alone}) > 3
    looked = pair[0].look(pictures[0], "what?", "ab")
    with ThreadPoolExecutor(13) as pool:
        found = [pool.submit(last, pair, each) for each in (*asked, *asked)]
        look = pool.submit(pair[0].look, pictures[0], "what?", "ab")
        together = [{name: reply.text for name, reply in each.result().items()} for each in found]
    assert together == [*alone, *alone]
    assert look.result().words == looked.words
    assert all(bridge.engine.waiting == 0 for bridge in pair)


@pytest.fixture
def endless(pair, monkeypatch):
    """A bridge whose answers go on until they are ended."""
    monkeypatch.setattr(pair[0].engine.model.generation_config, "eos_token_id", None)
    return pair[0]


def test_answers_end_when_they_are_stopped_or_time_is_up(endless, monkeypatch):
    asked = Asked(tiny_image(6), "what?", max_new_tokens=400)
    stop = threading.Event()
    for found in replies([endless], asked, stop):
        if found["mlp"].text:
            stop.set()
    assert found["mlp"].stopped == "stopped" and 0 < found["mlp"].tokens < 400 and found["mlp"].text
    short = replace(LIMITS, max_seconds=0.2)
    monkeypatch.setattr(endless, "limits", short)
    monkeypatch.setattr(endless.engine, "limits", short)
    reply = one(endless, asked)
    assert reply.stopped == "cut off after 0.2 seconds" and 0 < reply.tokens < 400
    assert one(endless, replace(asked, max_new_tokens=2)).stopped == "cut off after 2 tokens"


def test_a_person_who_leaves_frees_the_model(endless):
    watched = replies([endless], Asked(tiny_image(6), "what?", max_new_tokens=400))
    while not next(watched)["mlp"].text:
        pass
    watched.close()
    deadline = time.monotonic() + 60
    while endless.engine.waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert endless.engine.waiting == 0 and endless.engine.counts["cancelled"]


def test_a_full_queue_refuses_in_words(endless, monkeypatch):
    monkeypatch.setattr(endless.engine, "limits", replace(LIMITS, max_waiting=1))
    watched = replies([endless], Asked(tiny_image(6), "what?", max_new_tokens=400))
    next(watched)
    reply = one(endless, Asked(tiny_image(6), "what?"))
    assert (reply.state, reply.error) == ("failed", "1 requests are waiting already; try again later.")
    watched.close()


def test_pictures_are_checked_before_they_are_decoded(tmp_path):
    limits = replace(LIMITS, max_bytes=5000, max_pixels=10_000)
    tiny_image(0, (60, 50)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("1", (200, 100)).save(tmp_path / "large.png")
    (tmp_path / "heavy.png").write_bytes(bytes(6000))
    assert read_picture(tmp_path / "good.png", limits).size == (60, 50)
    for name, said in {
        "broken.png": "broken.png: cannot be read as an image",
        "empty.jpg": r"empty.jpg: the file is empty \(0 bytes\)",
        "text.png": "text.png: not an image, or not in a format that Pillow can read",
        "large.png": "large.png has 200x100 pixels; this server takes at most 10000",
        "heavy.png": "heavy.png has 0.0 MiB",
        "none.png": "none.png: no such file",
    }.items():
        with pytest.raises(RequestError, match=said):
            read_picture(tmp_path / name, limits)


def test_models_are_called_by_their_folders(tmp_path):
    for name in ("a/model", "b/model", "other"):
        (tmp_path / name).mkdir(parents=True)
    places = [str(tmp_path / name) for name in ("a/model", "b/model", "other")]
    assert names_of([None, places[2], "me/bridge"]) == ["embedded bridge", "other", "me/bridge"]
    assert names_of(places) == [*places[:2], "other"]
    with pytest.raises(ValueError, match="other is given twice"):
        names_of([places[2], places[2]])


def test_only_the_embedded_bridge_warns_of_what_it_can_not_know(monkeypatch):
    bridge = object.__new__(Bridge)
    noise = Image.effect_noise((80, 80), 90)
    bridge.source = "me/other"
    assert bridge.warning(noise) is None
    from vlbridge.assets import default_model, example_photograph, example_picture

    bridge.source = default_model()
    assert "vlbridge app llava." in bridge.warning(noise)
    assert bridge.warning(Image.open(example_picture())) is None
    assert bridge.warning(Image.open(example_photograph())) is None


def test_the_seed_of_torch_is_not_touched(pair):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one(pair[0], Asked(tiny_image(6), "what?", max_new_tokens=2))
    assert torch.equal(torch.rand(1), expected)
