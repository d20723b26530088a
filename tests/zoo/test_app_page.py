"""The page of `vlbridge app` in headless Chromium, as people use it. `nox --session app` has what this needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny import tiny_image, tiny_model

from vlbridge.inference import answer, answer_few_shot, generate_texts
from vlbridge.serving import serving_engine


pytest.importorskip("gradio", reason="Gradio is not installed: nox --session app")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: nox --session app")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

FAMILIES = {"mlp": "llama", "qformer": "t5", "perceiver": "llama"}
NEW_TOKENS = 12
SECONDS = 60_000  # for one step of the page, in milliseconds


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders, models and processors of the three families."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for name, language in FAMILIES.items():
        model, processor = tiny_model(name, language)
        model.eval().save_pretrained(folder / name, processor=processor)
        found[name] = (folder / name, model, processor)
    return found


@pytest.fixture(scope="module")
def page_of_models(models):
    """The page and its address."""
    from vlbridge.app import PAGE_LIMITS, Bridge
    from vlbridge.app_page import Page, launch

    limits = replace(PAGE_LIMITS, max_pixels=1_000_000, max_images=3, max_new_tokens=450)
    bridges = [Bridge(name, str(folder), "cpu", limits=limits) for name, (folder, *_) in models.items()]
    shown = Page(bridges, limits)
    yield shown, launch(shown, block=False)
    shown.blocks.close()
    for bridge in bridges:
        bridge.close()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, page_of_models):
    """Opens the page as somebody new; at the end nothing must have been asked of other servers."""
    contexts, asked = [], []

    def open_page(width: int = 1280, height: int = 900, **options):
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        context.on("request", lambda request: asked.append(request.url))
        context.set_default_timeout(SECONDS)
        contexts.append(context)
        page = context.new_page()
        page.goto(page_of_models[1])
        page.locator("#question textarea").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    own = page_of_models[1].rstrip("/")
    assert asked and [url for url in asked if not url.startswith((own, "data:", "blob:"))] == []


@pytest.fixture
def pictures(tmp_path):
    """Files of different pictures."""
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        tiny_image(number, (90, 70)).save(path)
    return paths


def show(page, path: Path, field: str = "#picture") -> None:
    """Upload a picture, and wait until the page has it."""
    page.locator(f"{field} input[type=file]").set_input_files(path)
    page.locator(f"{field} img").wait_for()


def choose(page, name: str) -> None:
    page.locator("#bridge label", has_text=name).click()


def set_longest(page, tokens: int = NEW_TOKENS) -> None:
    page.locator("#longest input[type=number]").fill(str(tokens))
    page.locator("#longest input[type=number]").press("Tab")


def said(page, number: int) -> list[str]:
    """What the model with this number has said, without whitespace."""
    return ["".join(text.split()) for text in page.locator(f"#chat-{number} [data-testid=bot]").all_inner_texts()]


def finished(page, *numbers: int, answers: int = 1) -> None:
    """Wait until models have that many answers, and the page takes questions again."""
    for number in numbers:
        page.locator(f"#chat-{number} [data-testid=bot]").nth(answers - 1).wait_for()
    page.wait_for_function("document.querySelector('#stop').disabled && !document.querySelector('#ask').disabled")


def ask(page, question: str) -> None:
    page.locator("#question textarea").fill(question)
    page.locator("#ask").click()


def expected(models, name: str, path: Path, question: str | None) -> str:
    _, model, processor = models[name]
    picture = Image.open(path).convert("RGB")
    (text,) = answer(model, processor, [picture], question or processor.caption_prompt, max_new_tokens=NEW_TOKENS)
    return "".join(text.split())


@needs_chromium
@pytest.mark.parametrize("name", FAMILIES)
def test_from_opening_the_page_to_an_answer_of_each_bridge(name, visit, models, pictures):
    page, number = visit(), list(FAMILIES).index(name)
    show(page, pictures[0])
    choose(page, name)
    set_longest(page)
    ask(page, "what?")
    finished(page, number)
    first = expected(models, name, pictures[0], "what?")
    assert said(page, number) == [first]
    facts = page.locator(f"#facts-{number}").inner_text()
    assert re.search(r"\d+ tokens in \d+\.\d s, \d+\.\d tokens/s", facts) and "visual tokens" in facts
    page.locator("#caption").click()
    finished(page, number, answers=2)
    assert said(page, number)[1] == expected(models, name, pictures[0], None)
    page.locator("#converse input").check()
    ask(page, "and?")
    finished(page, number, answers=3)
    _, model, processor = models[name]
    answers = [answer(model, processor, [Image.open(pictures[0]).convert("RGB")], asked, max_new_tokens=NEW_TOKENS)[0]
               for asked in ("what?", processor.caption_prompt)]  # fmt: skip
    turns = ["what?", answers[0], processor.caption_prompt, answers[1], "and?"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": [{"type": "text", "text": text}]}
                for n, text in enumerate(turns)]  # fmt: skip
    messages[0]["content"].insert(0, {"type": "image", "image": Image.open(pictures[0]).convert("RGB")})
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    (text,) = generate_texts(model, processor, inputs, max_new_tokens=NEW_TOKENS)
    assert said(page, number)[2] == "".join(text.split())
    page.locator("#again").click()
    page.wait_for_function(f"!document.querySelector('#chat-{number} [data-testid=bot]')")


@needs_chromium
def test_all_side_by_side_with_an_example(visit, models, pictures):
    page = visit()
    show(page, pictures[0])
    choose(page, "all, side by side")
    set_longest(page)
    page.locator("#examples button").first.click()
    show(page, pictures[1], "#shot-picture")
    page.locator("#shot-add").click()
    page.locator("#message", has_text="The example has no answer.").wait_for()
    page.locator("#shot-question textarea, #shot-question input").fill("which?")
    page.locator("#shot-answer textarea, #shot-answer input").fill("red")
    page.locator("#shot-add").click()
    page.locator("#shots", has_text="which? red").wait_for()
    ask(page, "what?")
    finished(page, 0, 1, 2)
    shown = [{"image": Image.open(pictures[1]).convert("RGB"), "question": "which?", "answer": "red"}]
    query = {"image": Image.open(pictures[0]).convert("RGB"), "question": "what?"}
    for number, (_, model, processor) in enumerate(models.values()):
        (text,) = answer_few_shot(model, processor, [shown], [query], max_new_tokens=NEW_TOKENS)
        assert said(page, number) == ["".join(text.split())]


@needs_chromium
def test_two_people_at_once_are_not_mixed(visit, models, pictures):
    pages = [visit(), visit()]
    for page, path in zip(pages, pictures):
        show(page, path)
        choose(page, "all, side by side")
        set_longest(page)
    for page, question in zip(pages, ("one?", "two?")):
        ask(page, question)
    for page, path, question in zip(pages, pictures, ("one?", "two?")):
        finished(page, 0, 1, 2)
        for number, name in enumerate(FAMILIES):
            assert said(page, number) == [expected(models, name, path, question)]


@needs_chromium
def test_what_is_wrong_is_said_in_words(visit, pictures, tmp_path, page_of_models, monkeypatch):
    page = visit()
    page.locator("#caption").click()
    page.locator("#message [role=alert]", has_text="There is no picture yet").wait_for()
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:400])
    page.locator("#picture input[type=file]").set_input_files(broken)
    page.locator("#message [role=alert]", has_text="broken.png: cannot be read as an image").wait_for()
    ask(page, "what?")
    page.locator("#message [role=alert]", has_text="broken.png: cannot be read as an image").wait_for()
    page.locator("#picture button[aria-label='Clear'], #picture button[aria-label='Remove Image']").first.click()
    Image.new("RGB", (1200, 1000)).save(tmp_path / "large.png")
    show(page, tmp_path / "large.png")
    page.locator("#message [role=alert]", has_text="large.png has 1200x1000 pixels").wait_for()
    page.locator("#picture button[aria-label='Clear'], #picture button[aria-label='Remove Image']").first.click()
    show(page, pictures[0])
    page.wait_for_function("!document.querySelector('#message').innerText.trim()")
    ask(page, " ")
    page.locator("#message [role=alert]", has_text="the question is empty").wait_for()
    ask(page, "w" * 500)
    page.locator("#facts-0 [role=alert]", has_text="Shorten the conversation").wait_for()
    from vlbridge.assets import default_model

    monkeypatch.setattr(page_of_models[0].bridges[1], "source", default_model())  # as if it were the embedded bridge
    choose(page, "qformer")
    page.locator("#message [role=status]", has_text="the embedded bridge is not sure what").wait_for()


@needs_chromium
def test_keyboard_alone(visit, models, pictures):
    page = visit()
    show(page, pictures[0])
    set_longest(page)
    page.locator("#question textarea").focus()
    page.keyboard.type("what?")
    reached = []
    for _ in range(3):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.closest('#converse') ? 'converse' : document.activeElement.id")
        )
    assert reached == ["converse", "ask", "caption"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    finished(page, 0)
    assert said(page, 0) == [expected(models, "mlp", pictures[0], "what?")]


@needs_chromium
def test_an_answer_is_streamed_and_can_be_stopped(visit, pictures, page_of_models, monkeypatch):
    engine = page_of_models[0].bridges[0].engine
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", None)
    ends = serving_engine._Ended.__call__

    def slowly(*args, **kwargs):
        time.sleep(0.05)  # per token: the model is tiny, and a busy machine would find it at its end
        return ends(*args, **kwargs)

    monkeypatch.setattr(serving_engine._Ended, "__call__", slowly)
    page = visit()
    show(page, pictures[0])
    set_longest(page, 450)
    ask(page, "what?")
    page.wait_for_function("document.querySelector('#chat-0 [data-testid=bot]')?.innerText.trim().length > 5")
    assert page.locator("#ask").is_disabled()
    page.locator("#stop").click()
    page.locator("#facts-0", has_text="; stopped").wait_for()
    finished(page, 0)
    ask(page, "what?")
    page.wait_for_function("document.querySelectorAll('#chat-0 [data-testid=bot]').length == 2")
    page.close()  # who leaves, frees the model
    deadline = time.monotonic() + 60
    while engine.waiting and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.waiting == 0


@needs_chromium
def test_a_phone_never_scrolls_sideways(visit):
    page = visit(390, 844, has_touch=True, is_mobile=True)
    page.locator("#try-one").click()
    page.locator("#picture img").wait_for()
    choose(page, "all, side by side")
    page.locator("#examples button").first.click()
    ask(page, "what is in the picture?")
    finished(page, 0, 1, 2)
    page.locator("#inside-2 button").first.click()
    page.locator("#look-2").click()
    page.locator("#words-2 table").wait_for()
    page.locator("#maps-2 img").first.wait_for()
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    boxes = [page.locator(f"#model-{number}").bounding_box() for number in range(3)]
    assert (
        boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"] and len({box["x"] for box in boxes}) == 1
    )  # one below the other


def test_the_browser_is_told_to_load_nothing_from_elsewhere(page_of_models):
    with urllib.request.urlopen(page_of_models[1]) as found:
        policy = found.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'") and "http" not in policy


def test_a_space_runs_as_it_is_written(models, tmp_path):
    from vlbridge.app_space import write_space

    written = write_space(tmp_path / "space", ["me/tiny"])
    assert [path.name for path in written] == ["app.py", "requirements.txt", "README.md"]
    card = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---")[1])
    import gradio

    assert (card["sdk"], card["sdk_version"], card["app_file"]) == ("gradio", gradio.__version__, "app.py")
    assert (card["suggested_hardware"], card["models"]) == ("cpu-basic", ["me/tiny"])
    required = (tmp_path / "space" / "requirements.txt").read_text()
    assert "\ntorch" in f"\n{required}" and "\ntimm" in required and "extra" not in required
    script = tmp_path / "space" / "app.py"
    script.write_text(script.read_text().replace("me/tiny", str(models["mlp"][0])))  # there is no Hub here
    environment = {**os.environ, "GRADIO_SERVER_PORT": "7999", "PYTHONPATH": ""}
    look = f"import runpy, vlbridge; assert vlbridge.__file__.startswith({str(tmp_path)!r}); "
    command = [sys.executable, "-c", f"{look}runpy.run_path('app.py', run_name='__main__')"]
    running = subprocess.Popen(command, cwd=script.parent, env=environment)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen("http://127.0.0.1:7999", timeout=10) as found:
                    assert "gradio" in found.read().decode()
                    break
            except OSError:
                assert running.poll() is None and time.monotonic() < deadline
                time.sleep(0.5)
    finally:
        running.kill()
        running.wait()
    with pytest.raises(ValueError, match="is not empty"):
        write_space(tmp_path / "space", [None])
    with pytest.raises(ValueError, match="is a folder here"):
        write_space(tmp_path / "other", [str(models["mlp"][0])])
