"""`vlbridge` itself, and `info` and `list`: what they print, where, and with which exit code."""

import json
import re
import subprocess
import sys

import pytest
import transformers
from tiny import LANGUAGE, tiny_model, tiny_stage1
from typer.testing import CliRunner

import vlbridge
from vlbridge import inference
from vlbridge.summary import summarize, summary_lines
from vlbridge_cli.cli_app import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_version():
    result = run("--version")
    lines = result.stdout.splitlines()
    assert (lines[0], result.exit_code) == (f"vlbridge {vlbridge.__version__}", 0)
    assert f"transformers {transformers.__version__}" in lines
    assert lines[-1] == f"python {sys.version.split()[0]}"


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    named = re.findall(r"^  ([a-z-]+)  ", result.stdout.partition("Commands:")[2], re.MULTILINE)
    assert named == COMMANDS


def test_help_names_every_dtype():
    assert f"One of {', '.join(inference.DTYPES)}." in run("caption", "--help").stdout


@pytest.mark.parametrize("module", ["vlbridge_cli", "vlbridge.cli"])
def test_the_module_as_a_program(module):
    """The commands and what they share must not be imported twice, or errors would not be recognised."""
    command = [sys.executable, "-m", module, "info", "./nowhere"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("", 1)
    assert result.stderr == "vlbridge: error: cannot load './nowhere': no such folder\n"


HEAVY = {"vlbridge", "torch", "transformers", "huggingface_hub", "datasets", "PIL", "numpy"}
LIGHT = [["--help"], ["--version"], [], ["--no-such-option"], ["no-such-command"], ["caption"]]
COMMANDS = [
    "caption",
    "ask",
    "compare",
    "info",
    "inspect",
    "capfilt",
    "train",
    "evaluate",
    "bakeoff",
    "export",
    "transplant",
    "new-recipe",
    "list",
    "push",
    "serve",
    "app",
    "data",
    "convert",
]


@pytest.mark.core
def test_nothing_heavy_is_imported_before_work_begins():
    """All of them in one process that has imported nothing yet."""
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from vlbridge_cli.cli_app import app\n"
        f"for arguments in {[*LIGHT, *([command, '--help'] for command in COMMANDS)]}:\n"
        "    result = CliRunner().invoke(app, arguments)\n"
        "    assert result.exit_code in (0, 2) and result.output, (arguments, result)\n"
        f"    assert not set(sys.modules) & {HEAVY}, arguments\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)


class TestInfo:
    def test_json(self, tmp_path):
        model, _ = tiny_model("perceiver")
        model.config.save_pretrained(tmp_path)
        result = run("info", tmp_path, "--json")
        assert (result.stderr, result.exit_code) == ("", 0)
        assert json.loads(result.stdout) == summarize(tmp_path)

    def test_without_a_language_model(self, tmp_path):
        model, _ = tiny_stage1()
        model.config.save_pretrained(tmp_path)
        result = run("info", tmp_path)
        assert (result.stderr, result.exit_code) == ("", 0)
        assert result.stdout.splitlines() == list(summary_lines(summarize(tmp_path)))

    def test_the_embedded_bridge(self):
        result = run("info")
        assert result.exit_code == 0
        assert result.stdout.startswith(f"{vlbridge.default_model()}: mlp_llava, MLPLlavaForConditionalGeneration\n")

    def test_model_that_is_not_bridged(self, tmp_path):
        LANGUAGE["gpt2"]().save_pretrained(tmp_path)
        result = run("info", tmp_path)
        assert (result.stdout, result.exit_code) == ("", 1)
        assert result.stderr == (
            f"vlbridge: error: cannot load '{tmp_path}': it is a 'gpt2' model, not a bridged one\n"
        )


def test_list_shows_published_figures():
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in run("list").stdout.splitlines())
    for release in vlbridge.catalogue.CATALOGUE.values():
        line = lines[release.name]
        assert line.startswith(release.title)
        single = [f"{metric} {value}" for metric, value in release.published.items() if isinstance(value, (int, float))]
        assert all(figure in line for figure in single)
        assert line.endswith(")") or not release.published
