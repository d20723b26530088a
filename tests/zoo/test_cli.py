"""`vlbridge caption`, `ask` and `info`: what they print, where, and with which exit code."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny import LANGUAGE, VISION, tiny_image, tiny_model
from transformers import BatchFeature
from typer.testing import CliRunner

import vlbridge
from vlbridge import cli


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
NAMES = {colour: name for name, colour in COLOURS.items()}


class StubProcessor:
    """Remembers prompts and images; its texts name the prompt and the image's colour."""

    caption_prompt = "Describe."

    def __init__(self):
        self.texts = []
        self.batches = []

    def apply_chat_template(self, conversations, **kwargs):
        assert kwargs["add_generation_prompt"] and kwargs["tokenize"] and kwargs["return_dict"]
        assert kwargs["processor_kwargs"] == {"padding": True}
        ids = []
        for [message] in conversations:
            image, text = message["content"]
            assert message["role"] == "user" and image["image"].mode == "RGB"
            ids.append(len(self.texts))
            self.texts.append(f" {text['text']} {NAMES[image['image'].getpixel((0, 0))]}\n")
        self.batches.append(len(conversations))
        prompts = torch.tensor([[100, 101, text_id] for text_id in ids])
        return BatchFeature({"input_ids": prompts, "attention_mask": torch.ones_like(prompts)})

    def batch_decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        assert ids.shape[1] == 1, "the prompt must be cut off"
        return [self.texts[row[0]] for row in ids]


class StubModel:
    """Answers with one token: the last one of the prompt."""

    device = torch.device("cpu")

    def __init__(self, is_encoder_decoder=False):
        self.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)
        self.calls = []
        self.fails = lambda rows: None

    def generate(self, input_ids, attention_mask, **kwargs):
        self.calls.append(kwargs)
        self.fails(input_ids)
        new = input_ids[:, -1:]
        return new if self.config.is_encoder_decoder else torch.cat([input_ids, new], dim=1)


@pytest.fixture
def stub(monkeypatch):
    """Stub model and processor in the place of what `load` gives; `loaded` collects the arguments of its calls."""
    stub = SimpleNamespace(model=StubModel(), processor=StubProcessor(), loaded=[])

    def load(model, device, dtype):
        stub.loaded.append((model, device, dtype))
        return stub.model, stub.processor

    monkeypatch.setattr(cli, "load", load)
    return stub


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Folder `pictures` in the working directory: three colours, and a text file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (4, 4), colour).save(tmp_path / "pictures" / f"{name}.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "pictures" / "more" / "deep.png")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def lines_of_json(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


class TestCaption:
    def test_one_image_gives_just_its_caption(self, stub, pictures):
        result = run("caption", "pictures/red.png")
        assert (result.stdout, result.stderr, result.exit_code) == ("Describe. red\n", "", 0)
        assert stub.model.calls == [{"max_new_tokens": 40, "do_sample": False}]

    def test_several_give_path_and_caption(self, stub, pictures):
        result = run("caption", "pictures/red.png", "pictures/blue.png")
        assert result.stdout == "pictures/red.png\tDescribe. red\npictures/blue.png\tDescribe. blue\n"
        assert (result.stderr, result.exit_code) == ("", 0)

    @pytest.mark.parametrize("pattern", ["pictures", "pictures/*.png"])
    def test_folder_and_glob(self, stub, pictures, pattern):
        result = run("caption", pattern)
        assert result.stdout.splitlines() == [
            f"pictures/{name}.png\tDescribe. {name}" for name in ("blue", "green", "red")
        ]

    def test_recursive(self, stub, pictures):
        result = run("caption", "pictures", "--recursive")
        assert "pictures/more/deep.png\tDescribe. red" in result.stdout.splitlines()
        assert len(result.stdout.splitlines()) == 4

    def test_options_arrive(self, stub, pictures):
        result = run(
            "caption", "pictures", "--model", "me/bridge", "--device", "cpu", "--dtype", "float16",
            "--max-new-tokens", 7, "--batch-size", 2, "--prompt", "In French:",
        )  # fmt: skip
        assert stub.loaded == [("me/bridge", "cpu", "float16")]
        assert stub.model.calls == [{"max_new_tokens": 7, "do_sample": False}] * 2
        assert stub.processor.batches == [2, 1]
        assert result.stdout.splitlines()[0] == "pictures/blue.png\tIn French: blue"

    def test_progress_is_on_stderr_when_there_are_several_batches(self, stub, pictures):
        result = run("caption", "pictures", "--batch-size", 1)
        assert "3/3" in result.stderr
        assert len(result.stdout.splitlines()) == 3 and "%" not in result.stdout
        assert run("caption", "pictures").stderr == ""

    def test_json(self, stub, pictures):
        result = run("caption", "pictures/red.png", "pictures/blue.png", "--json")
        assert lines_of_json(result.stdout) == [
            {"image": "pictures/red.png", "caption": "Describe. red"},
            {"image": "pictures/blue.png", "caption": "Describe. blue"},
        ]

    def test_batches_are_streamed(self, stub, pictures, monkeypatch):
        """What the first batch gave is out before the second begins."""
        out = []
        monkeypatch.setattr(cli, "_print", lambda line, file: out.append(line))
        before = []
        stub.model.fails = lambda rows: before.append(len(out))
        run("caption", "pictures", "--batch-size", 2)
        assert before == [0, 2]

    def test_encoder_decoder_output_holds_no_prompt(self, stub, pictures):
        stub.model.config.is_encoder_decoder = True
        assert run("caption", "pictures/red.png").stdout == "Describe. red\n"


class TestAsk:
    def test_one_image(self, stub, pictures):
        result = run("ask", "pictures/red.png", "What colour?")
        assert (result.stdout, result.exit_code) == ("What colour? red\n", 0)

    def test_every_image_of_a_folder(self, stub, pictures):
        result = run("ask", "pictures", "What colour?", "--json")
        assert lines_of_json(result.stdout) == [
            {"image": f"pictures/{name}.png", "question": "What colour?", "answer": f"What colour? {name}"}
            for name in ("blue", "green", "red")
        ]

    def test_a_glob_that_the_shell_expanded(self, stub, pictures):
        result = run("ask", "pictures/red.png", "pictures/blue.png", "Well?")
        assert result.stdout.splitlines() == ["pictures/red.png\tWell? red", "pictures/blue.png\tWell? blue"]

    @pytest.mark.parametrize("question", ["pictures/blue.png", " "])
    def test_forgotten_question(self, stub, pictures, question):
        result = run("ask", "pictures/red.png", question)
        assert result.exit_code == 2
        assert "question" in result.stderr and result.stderr.count("\n") == 1
        assert not stub.loaded


class TestFailures:
    def check(self, result, match: str, exit_code: int = 1):
        """One line on stderr, nothing on stdout."""
        assert result.stdout == ""
        assert result.stderr.startswith("vlbridge: error: ") and result.stderr.count("\n") == 1
        assert match in result.stderr
        assert result.exit_code == exit_code

    def test_missing_file(self, stub, pictures):
        self.check(run("caption", "nowhere.jpg"), "nowhere.jpg: no such file or folder")
        assert not stub.loaded, "no model is needed to say so"

    def test_empty_folder(self, stub, pictures):
        (pictures / "empty").mkdir()
        self.check(run("caption", "pictures/empty"), "pictures/empty: no image files")

    def test_unreadable_file_is_found_out_before_the_model_is_loaded(self, stub, pictures):
        self.check(run("caption", "pictures/notes.txt"), "pictures/notes.txt: not an image")
        assert not stub.loaded

    def test_one_bad_file_does_not_lose_the_others(self, stub, pictures):
        (pictures / "empty.jpg").touch()
        result = run("caption", "nowhere.jpg", "pictures", "pictures/notes.txt")
        assert [line.split("\t")[1] for line in result.stdout.splitlines()] == [
            f"Describe. {name}" for name in ("blue", "green", "red")
        ]
        assert result.stderr.splitlines() == [
            "vlbridge: error: nowhere.jpg: no such file or folder",
            "vlbridge: error: pictures/empty.jpg: the file is empty (0 bytes)",
            "vlbridge: error: pictures/notes.txt: not an image, or not in a format that Pillow can read",
        ]
        assert result.exit_code == 1

    def test_bad_files_in_json(self, stub, pictures):
        result = run("caption", "nowhere.jpg", "pictures/notes.txt", "pictures/red.png", "--json")
        assert [(row["image"], "caption" in row, "error" in row) for row in lines_of_json(result.stdout)] == [
            ("nowhere.jpg", False, True),
            ("pictures/notes.txt", False, True),
            ("pictures/red.png", True, False),
        ]
        assert (result.stderr, result.exit_code) == ("", 1)

    def test_an_image_that_the_model_refuses_does_not_lose_its_batch(self, stub, pictures):
        def refuse_green(rows):
            if any("green" in stub.processor.texts[row[-1]] for row in rows):
                raise ValueError("green is\nnot supported")

        stub.model.fails = refuse_green
        result = run("caption", "pictures")
        assert result.stdout == "pictures/blue.png\tDescribe. blue\npictures/red.png\tDescribe. red\n"
        assert result.stderr == "vlbridge: error: pictures/green.png: green is not supported\n"
        assert result.exit_code == 1

    def test_out_of_memory(self, stub, pictures):
        def run_out(rows):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")

        stub.model.fails = run_out
        self.check(run("caption", "pictures"), "--batch-size")

    def test_bugs_keep_their_traceback(self, stub, pictures):
        def divide(rows):
            raise ZeroDivisionError

        stub.model.fails = divide
        assert isinstance(run("caption", "pictures/red.png").exception, ZeroDivisionError)

    def test_bad_dtype(self, stub, pictures):
        self.check(run("caption", "pictures/red.png", "--dtype", "int8"), "'int8'; expected one of auto, float32", 2)

    def test_bad_device(self, stub, pictures):
        self.check(run("caption", "pictures/red.png", "--device", "toaster"), "'toaster'", 2)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="here cuda is not missing")
    def test_missing_device(self, stub, pictures):
        self.check(run("caption", "pictures/red.png", "--device", "cuda"), "--device cuda: ")

    @pytest.mark.parametrize("arguments", [["caption"], ["caption", "x", "--batch-size", "0"], ["ask", "x"], ["paint"]])
    def test_usage(self, stub, arguments):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")

    def test_interrupted(self, stub, pictures):
        def interrupt(rows):
            raise KeyboardInterrupt

        stub.model.fails = interrupt
        result = run("caption", "pictures/red.png")
        assert (result.stdout, result.stderr, result.exit_code) == ("", "", 130)

    def test_reader_that_has_had_enough(self, stub, pictures, monkeypatch):
        def closed(line, file):
            raise BrokenPipeError

        monkeypatch.setattr(cli, "_print", closed)
        result = run("caption", "pictures/red.png")
        assert (result.stderr, result.exit_code) == ("", 0)

    def test_characters_that_the_terminal_lacks(self, capsys):
        with open(os.devnull, "w", encoding="ascii") as file:
            cli._print("déjà vu", file)
            cli._print("surrogate \udcff", file)

    @pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c"])
    @pytest.mark.parametrize("command", ["caption", "info"])
    def test_model_folder_that_does_not_exist(self, pictures, command, name):
        arguments = ("caption", "pictures/red.png", "--model", name) if command == "caption" else ("info", name)
        self.check(run(*arguments), f"cannot load {name!r}: no such folder")

    def test_model_that_is_a_file(self, pictures):
        self.check(run("info", "pictures/red.png"), "it is a file; give the folder")

    def test_model_name_that_the_hub_does_not_allow(self, pictures):
        self.check(run("info", "a:b"), "not a name that the Hub allows")

    def test_model_that_is_not_on_the_hub(self, pictures, monkeypatch):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # its arguments differ between versions
        monkeypatch.setattr(HfApi, "model_info", self.raises(error))
        self.check(run("info", "nobody/nothing"), "the Hub has no such model")

    def test_hub_that_does_not_answer(self, pictures, monkeypatch):
        from huggingface_hub import HfApi

        monkeypatch.setattr(HfApi, "model_info", self.raises(ConnectionError("Name or service\nnot known")))
        self.check(run("info", "nobody/nothing"), "the Hub cannot be asked: Name or service not known")

    @staticmethod
    def raises(error):
        def call(*args, **kwargs):
            raise error

        return call

    @pytest.mark.parametrize("command", ["caption", "info"])
    def test_model_that_is_not_bridged(self, pictures, command):
        LANGUAGE["gpt2"]().save_pretrained("gpt2")
        arguments = ("caption", "pictures/red.png", "--model", "gpt2") if command == "caption" else ("info", "gpt2")
        self.check(run(*arguments), "it is a 'gpt2' model, not a bridged one")

    def test_damaged_weights(self, pictures):
        model, processor = tiny_model("mlp")
        model.save_pretrained("model")
        processor.save_pretrained("model")
        (pictures.parent / "model" / "model.safetensors").write_bytes(b"not weights")
        self.check(run("caption", "pictures/red.png", "--model", "model", "--device", "cpu"), "cannot load 'model'")


class TestInfo:
    @pytest.mark.parametrize(
        ("bridge", "tokens", "in_prompt"), [("mlp", 25, 25), ("qformer", 5, 5), ("perceiver", 6, 1)]
    )
    def test_against_the_real_model(self, tmp_path, bridge, tokens, in_prompt):
        model, _ = tiny_model(bridge)
        model.config.frozen_parts = {
            "vision_model": {"source": "someone/clip", "revision": "0123456789abcdef", "sha256": "00"},
            "language_model": {"source": "someone/llama", "revision": None, "sha256": "11"},
        }
        model.config.save_pretrained(tmp_path)  # the configuration alone: no weights to read
        result = run("info", tmp_path, "--json")
        assert (result.stderr, result.exit_code) == ("", 0)
        about = json.loads(result.stdout)
        assert about["model_type"] == model.config.model_type
        assert about["class"] == type(model).__name__
        assert [part["name"] for part in about["parts"]] == ["vision_model", "bridge", "language_model"]
        assert [part["source"] for part in about["parts"]] == [
            "someone/clip@0123456789ab",
            str(tmp_path),
            "someone/llama",
        ]
        for part in about["parts"]:
            real = getattr(model, part["name"])
            assert part["class"] == type(real).__name__
            assert part["parameters"] == sum(p.numel() for p in real.parameters())
            assert part["trainable_parameters"] == (part["parameters"] if part["name"] == "bridge" else 0)
        assert about["parameters"] == sum(p.numel() for p in model.parameters())
        assert about["trainable_parameters"] == sum(p.numel() for p in model.bridge.parameters())
        pixels = torch.zeros(1, 3, about["image_size"], about["image_size"])
        assert about["image_tokens"] == tokens == model.get_image_features(pixels).pooler_output.shape[1]
        assert about["prompt_tokens_per_image"] == in_prompt
        assert (about["context_window"], about["context_left"]) == (512, 512 - in_prompt)

    def test_for_people(self, tmp_path):
        model, _ = tiny_model("mlp")
        model.config.save_pretrained(tmp_path)
        lines = run("info", tmp_path).stdout.splitlines()
        assert lines[0] == f"{tmp_path}: mlp_llava, MLPLlavaForConditionalGeneration"
        total = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.bridge.parameters())
        assert lines[-4].split() == ["altogether", f"{trainable:,}", f"{total:,}"]
        assert lines[-2:] == [
            "visual tokens per image: 25 (30 x 30 pixels), 25 in the prompt",
            "context window: 512 tokens; one image leaves 487 (95.1%) for text",
        ]

    def test_any_resolution_shows_a_range(self, tmp_path):
        model, _ = tiny_model("mlp", image_aspect_ratio="anyres")
        model.config.save_pretrained(tmp_path)
        about = cli.describe(str(tmp_path))
        # 1 x 2 tiles of 5 x 5 features: no column of a thin picture is left, but 5 line ends; 2 x 2 tiles are most
        assert (about["fewest_image_tokens"], about["image_tokens"]) == (25 + 5, 25 + 10 * 11)
        assert about["context_left"] == 512 - 135
        assert "visual tokens per image: 30 to 135 (tiles of 30 x 30 pixels)" in run("info", tmp_path).stdout

    @pytest.mark.core
    @pytest.mark.parametrize("language", ["t5", "gpt2"])
    @pytest.mark.parametrize("vision", ["timm", "resnet"])
    def test_other_parts(self, tmp_path, vision, language):
        model, _ = tiny_model("mlp", language=language, vision=vision)
        model.config.save_pretrained(tmp_path)
        about = cli.describe(str(tmp_path))
        side = about["image_size"]
        assert about["image_tokens"] == model.get_image_features(torch.zeros(1, 3, side, side)).pooler_output.shape[1]
        # T5's positions are relative: no limit
        assert about["context_window"] == (None if language == "t5" else 512)
        assert about["context_left"] == (None if language == "t5" else 512 - about["image_tokens"])
        assert "no limit" in run("info", tmp_path).stdout or language != "t5"

    def test_window_that_is_too_small(self, tmp_path):
        config = LANGUAGE["llama"]()
        config.max_position_embeddings = 20
        vlbridge.MLPLlavaConfig(vision_config=VISION["clip"](), text_config=config).save_pretrained(tmp_path)
        assert "20 tokens; one image does not fit (5 too many)" in run("info", tmp_path).stdout


class TestRealModel:
    @pytest.mark.parametrize("bridge", ["mlp", "qformer", "perceiver"])
    def test_batches_equal_single_images(self, bridge):
        model, processor = tiny_model(bridge)
        images = [Image.new("RGB", (40, 33), colour) for colour in ("red", "white", "black")]
        alone = [cli.answer(model, processor, [image], "What?", max_new_tokens=6)[0] for image in images]
        assert cli.answer(model, processor, images, "What?", max_new_tokens=6, batch_size=2) == alone
        assert len(set(alone)) > 1, "the images must matter"

    def test_saved_model_from_the_command_line(self, pictures):
        model, processor = tiny_model("mlp")
        model.save_pretrained("model")
        processor.save_pretrained("model")
        tiny_image(1).save("image.png")
        result = run("caption", "image.png", "--model", "model", "--device", "cpu", "--json", "--max-new-tokens", 6)
        assert result.exit_code == 0
        [expected] = cli.answer(model, processor, [tiny_image(1)], processor.caption_prompt, max_new_tokens=6)
        assert lines_of_json(result.stdout) == [{"image": "image.png", "caption": expected}]

    @pytest.mark.parametrize(("dtype", "expected"), [(None, "float32"), ("bfloat16", "bfloat16"), ("auto", "float32")])
    def test_dtype_on_the_cpu(self, tmp_path, dtype, expected):
        model, processor = tiny_model("mlp")
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        loaded, _ = cli.load(str(tmp_path), "cpu", dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, expected)}
        assert not loaded.training


class TestProcess:
    """What only a process of its own shows."""

    @staticmethod
    def start(code: str, **kwargs):
        return subprocess.Popen(
            [sys.executable, "-c", f"from vlbridge import cli\n{code}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs,
        )  # fmt: skip

    def test_version(self):
        result = run("--version")
        assert (result.stdout, result.exit_code) == (f"vlbridge {vlbridge.__version__}\n", 0)

    def test_help(self):
        result = run("--help")
        assert result.exit_code == 0
        assert all(command in result.stdout for command in ("caption", "ask", "info"))

    def test_the_module_itself_imports_nothing_heavy(self):
        tree = ast.parse(Path(cli.__file__).read_text(encoding="utf-8"))
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
        assert "typer" in names and not names & {"torch", "transformers", "PIL", "numpy", None}

    @pytest.mark.skipif(sys.platform == "win32", reason="no pipes that break, no SIGINT")
    def test_broken_pipe(self, pictures):
        code = (
            "import time\n"
            "cli._device_and_dtype = lambda *a: None\n"
            "def answers(files, *a):\n"
            "    for file in files: yield file, 'x' * 100_000, None\n"
            "cli._answer_files = answers\n"
            "cli.app(['caption', 'pictures'])"
        )
        process = self.start(code)
        process.stdout.read(1)
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == ("", 0)

    @pytest.mark.skipif(sys.platform == "win32", reason="no pipes that break, no SIGINT")
    def test_interrupt(self, pictures):
        code = (
            "import signal, time\n"
            # background jobs of a shell are started with this signal ignored
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "cli._device_and_dtype = lambda *a: None\n"
            "def answers(files, *a):\n"
            "    yield files[0], 'first', None\n"
            "    time.sleep(60)\n"
            "cli._answer_files = answers\n"
            "cli.app(['caption', 'pictures'])"
        )
        process = self.start(code)
        assert process.stdout.readline() == "pictures/blue.png\tfirst\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (errors, process.returncode) == ("", 130)
