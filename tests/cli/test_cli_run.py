"""`vlbridge caption` and `ask`: what they print, where, and with which exit code."""

import functools
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny import LANGUAGE, clip_image_processor, tiny_image, tiny_model, tiny_stage1
from transformers import BatchFeature
from typer.testing import CliRunner

from vlbridge import inference
from vlbridge_cli import cli_run
from vlbridge_cli.cli_app import app
from vlbridge_cli.cli_common import print_line


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

    def __deepcopy__(self, memo):
        return self  # threads have copies of their own, whose prompts the test would not see

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
    """A stub model and processor instead of those that `load_model` gives; `loaded` collects its arguments."""
    stub = SimpleNamespace(model=StubModel(), processor=StubProcessor(), loaded=[])

    def load(model, device, dtype):
        stub.loaded.append((model, device, dtype))
        return stub.model, stub.processor

    monkeypatch.setattr(cli_run, "load_model", load)
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
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


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
        monkeypatch.setattr(cli_run, "print_line", lambda line, file: out.append(line))
        before = []
        stub.model.fails = lambda rows: before.append(len(out))
        run("caption", "pictures", "--batch-size", 2)
        assert before == [0, 2]

    def test_encoder_decoder_output_holds_no_prompt(self, stub, pictures):
        stub.model.config.is_encoder_decoder = True
        assert run("caption", "pictures/red.png").stdout == "Describe. red\n"

    def test_from_stdin(self, stub, pictures):
        data = (pictures / "red.png").read_bytes()
        result = CliRunner().invoke(app, ["caption", "-"], input=data)
        assert (result.stdout, result.stderr, result.exit_code) == ("Describe. red\n", "", 0)
        assert CliRunner().invoke(app, ["caption", "-"], input=b"").stderr.startswith("vlbridge: error: -: ")

    def test_from_an_address(self, stub, pictures):
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(pictures))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_port}"
            result = run("caption", f"{address}/red.png", f"{address}/none.png", "pictures/blue.png")
            server.shutdown()
        assert result.stdout.splitlines() == [f"{address}/red.png\tDescribe. red", "pictures/blue.png\tDescribe. blue"]
        assert f"{address}/none.png: cannot be fetched: HTTP Error 404" in result.stderr and result.exit_code == 1


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

    @pytest.mark.parametrize(
        ("arguments", "missing"), [([], "image"), (["What colour?"], "image"), (["pictures/red.png"], "question")]
    )
    def test_a_single_argument(self, stub, pictures, arguments, missing):
        result = run("ask", *arguments)
        expected = f'vlbridge: error: the {missing} is missing; expected IMAGE... and "QUESTION"\n'
        assert (result.exit_code, result.stderr) == (2, expected)

    @pytest.mark.parametrize("command", [[], ["ask"], ["data", "check"], ["convert"]])
    def test_short_help(self, command):
        assert run(*command, "-h").stdout == run(*command, "--help").stdout != ""


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

        monkeypatch.setattr(cli_run, "print_line", closed)
        result = run("caption", "pictures/red.png")
        assert (result.stderr, result.exit_code) == ("", 0)

    def test_characters_that_the_terminal_lacks(self, capsys):
        with open(os.devnull, "w", encoding="ascii") as file:
            print_line("déjà vu", file)
            print_line("surrogate \udcff", file)

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
        self.check(run("info", "nobody/nothing"), "the Hub cannot be reached: Name or service not known")

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

    @pytest.mark.parametrize("arguments", [["caption", "image.png"], ["ask", "image.png", "What?"]])
    def test_model_without_a_language_model(self, pictures, arguments):
        model, processor = tiny_stage1(image_processor=clip_image_processor())
        model.save_pretrained("stage1")
        processor.save_pretrained("stage1")
        tiny_image().save("image.png")
        self.check(run(*arguments, "--model", "stage1", "--device", "cpu"), "cannot load 'stage1': it is a 'qformer_")

    def test_damaged_weights(self, pictures):
        model, processor = tiny_model("mlp")
        model.save_pretrained("model")
        processor.save_pretrained("model")
        (pictures.parent / "model" / "model.safetensors").write_bytes(b"not weights")
        self.check(run("caption", "pictures/red.png", "--model", "model", "--device", "cpu"), "cannot load 'model'")


class TestPhotographs:
    """The embedded bridge knows plain drawings and what its encoder is sure of, and says so."""

    @pytest.fixture
    def photographs(self, pictures):
        for name in ("x", "y"):
            gradient = Image.linear_gradient("L").convert("RGB")
            gradient.putpixel((0, 0), COLOURS["red"])  # what the stub looks at
            gradient.save(pictures / f"{name}.png")

    @pytest.mark.parametrize("command", [("caption",), ("ask",)])
    def test_said_once(self, stub, photographs, command):
        question = ["what is it?"] if command == ("ask",) else []
        result = run(*command, "pictures", *question)
        assert result.exit_code == 0 and len(result.stdout.splitlines()) == 5
        assert (
            result.stderr.count("warning") == 1
            and "x.png: the embedded bridge is not sure what this shows" in result.stderr
        )
        assert "vlbridge convert liuhaotian/llava-v1.5-7b llava" in result.stderr

    def test_nothing_is_said_of_drawings_and_of_other_models(self, stub, photographs):
        assert "warning" not in run("caption", "pictures/red.png", "pictures/blue.png").stderr
        assert "warning" not in run("caption", "pictures", "--model", "elsewhere").stderr


class TestRealModel:
    def test_saved_model_from_the_command_line(self, pictures):
        model, processor = tiny_model("mlp")
        model.save_pretrained("model")
        processor.save_pretrained("model")
        tiny_image(1).save("image.png")
        result = run("caption", "image.png", "--model", "model", "--device", "cpu", "--json", "--max-new-tokens", 6)
        assert result.exit_code == 0
        [expected] = inference.answer(model, processor, [tiny_image(1)], processor.caption_prompt, max_new_tokens=6)
        assert lines_of_json(result.stdout) == [{"image": "image.png", "caption": expected}]


class TestOutput:
    """`--output`: rows in files."""

    @pytest.fixture
    def model(self, pictures):
        model, processor = tiny_model("mlp")
        model.save_pretrained("model")
        processor.save_pretrained("model")
        return ["--model", "model", "--device", "cpu", "--max-new-tokens", 4, "--output", "out"]

    @staticmethod
    def refused(arguments, match: str, exit_code: int):
        result = run("caption", *arguments)
        assert result.stdout == "" and match in result.stderr and result.exit_code == exit_code
        assert result.stderr.startswith("vlbridge: error: ") and result.stderr.count("\n") == 1

    def test_written_once(self, pictures, model, monkeypatch):
        (pictures / "broken.png").write_bytes(b"no picture")
        first = run("caption", "pictures", *model, "--rows-per-file", 3, "--shard", "1/2")
        assert (
            first.exit_code == 0 and "3 images done, 1 of them with an error, in out; 1 of 4 are left" in first.stdout
        )
        second = run("caption", "pictures", *model, "--rows-per-file", 3, "--json")
        assert json.loads(second.stdout) == {"output": "out", "images": 4, "done": 1, "failed": 0, "left": 0}
        assert "3 of 4 images are done" in second.stderr and "1/1" in second.stderr
        rows = [row for part in (0, 1) for row in lines_of_json(open(f"out/part-00000{part}.jsonl").read())]
        names = [os.path.basename(row["image"]) for row in rows]
        assert names == ["blue.png", "broken.png", "green.png", "red.png"]
        assert [row["error"] is None for row in rows] == [True, False, True, True]
        monkeypatch.setattr(cli_run, "load_model", None)  # nothing is left that would need it
        third = run("caption", "pictures", *model, "--rows-per-file", 3)
        assert third.stdout == "0 images done, 0 of them with an error, in out\n" and third.exit_code == 0
        self.refused(["pictures", *model], "out holds another job, with rows_per_file 3 (now 64)", 1)
        result = run("ask", "pictures", "What?", *model, "--rows-per-file", 3)
        assert "captions True (now False)" in result.stderr and result.exit_code == 1

    def test_answers(self, pictures, model):
        assert run("ask", "pictures", "pictures/more", "What?", *model, "--format", "parquet").exit_code == 0
        from pyarrow import parquet

        rows = parquet.read_table("out/part-000000.parquet").to_pylist()
        assert [row["question"] for row in rows] == ["What?"] * 4 and all(row["answer"] for row in rows)

    def test_only_failures(self, pictures, model):
        assert run("caption", "pictures/notes.txt", *model).exit_code == 1

    def test_refused(self, pictures, model):
        (pictures / "empty").mkdir()
        self.refused(["pictures/empty", *model], "pictures/empty: no image files, tars or Parquet files", 1)
        self.refused(["nowhere", *model], "nowhere: no such file or folder", 1)
        (pictures / "cut.tar").write_bytes(b"x" * 700)
        self.refused(["pictures", *model], "cut.tar is damaged or cut off", 1)
        self.refused(["-", *model], "-: --output takes files, folders and shards only", 2)
        self.refused(["pictures", *model, "--shard", "3/2"], "--shard is '3/2'; expected NUMBER/COUNT", 2)
        self.refused(["pictures", *model, "--shard", "1/2", "--ray-actors", 2], "leave --shard out", 2)
        for option in (["--format", "tar"], ["--rows-per-file", 2], ["--shard", "1/2"], ["--ray-actors", 2]):
            self.refused(["pictures", *option], f"{option[0]} needs --output FOLDER", 2)
        assert not os.path.exists("out")

    def test_without_ray(self, pictures, model, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        self.refused(["pictures/red.png", *model, "--ray-actors", 2], 'pip install "vlbridge[ray]"', 1)


class TestProcess:
    """What only a process of its own shows."""

    @staticmethod
    def start(code: str, **kwargs):
        return subprocess.Popen(
            [sys.executable, "-c", f"from vlbridge_cli import cli_app, cli_run\n{code}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs,
        )  # fmt: skip

    @pytest.mark.skipif(sys.platform == "win32", reason="no pipes that break, no SIGINT")
    def test_broken_pipe(self, pictures):
        code = (
            "import time\n"
            "cli_run.device_and_dtype = lambda *a: None\n"
            "def answers(run, files):\n"
            "    for file in files: yield file, 'x' * 100_000, None\n"
            "cli_run.answer_files = answers\n"
            "cli_app.app(['caption', 'pictures'])"
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
            "cli_run.device_and_dtype = lambda *a: None\n"
            "def answers(run, files):\n"
            "    yield files[0], 'first', None\n"
            "    time.sleep(60)\n"
            "cli_run.answer_files = answers\n"
            "cli_app.app(['caption', 'pictures'])"
        )
        process = self.start(code)
        assert process.stdout.readline() == "pictures/blue.png\tfirst\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (errors, process.returncode) == ("", 130)
