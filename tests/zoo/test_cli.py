"""`vlbridge` itself, and `info` and `list`: what they print, where, and with which exit code."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import LANGUAGE, tiny_model, tiny_stage1
from typer.testing import CliRunner

import vlbridge
from vlbridge import cli, inference
from vlbridge.summary import summarize, summary_lines


MODULES = sorted(Path(cli.__file__).parent.glob("cli*.py"))


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_version():
    result = run("--version")
    assert (result.stdout, result.exit_code) == (f"vlbridge {vlbridge.__version__}\n", 0)


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    named = re.findall(r"^  ([a-z]+)  ", result.stdout.partition("Commands:")[2], re.MULTILINE)
    commands = ["caption", "ask", "info", "capfilt", "train", "export", "transplant", "list", "push", "data", "convert"]
    assert named == commands


def test_help_names_every_dtype():
    assert f"One of {', '.join(inference.DTYPES)}." in run("caption", "--help").stdout


def test_the_module_as_a_program():
    """The commands and what they share must not be imported twice, or errors would not be recognised."""
    command = [sys.executable, "-m", "vlbridge.cli", "info", "./nowhere"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("", 1)
    assert result.stderr == "vlbridge: error: cannot load './nowhere': no such folder\n"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_modules_import_nothing_heavy(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    own = {node.module for node in imports if isinstance(node, ast.ImportFrom) and node.level}
    assert all(name.startswith("cli_") for name in own)
    assert "typer" in names and not names & {"torch", "transformers", "PIL", "numpy", "tqdm"}


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
