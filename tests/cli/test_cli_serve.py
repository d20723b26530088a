"""`vlbridge serve`: which engine it takes, and what it tells it."""

from __future__ import annotations

import json
import os

import pytest
from packaging.version import Version
from tiny import tiny_bridge_folder, tiny_model
from typer.testing import CliRunner

from vlbridge import serving
from vlbridge.cli import app
from vlbridge.compat_vllm import TRIED
from vlbridge.serving import serving_plugin, serving_server
from vlbridge.serving.serving_requests import LIMITS_VARIABLE, Limits


@pytest.fixture
def started(monkeypatch):
    """What would be started: engines are made, servers are not."""
    found: dict = {}
    monkeypatch.setattr(serving_server, "run", lambda engine, host, port: found.update(engine=engine, at=(host, port)))

    def execve(path, command, environment):
        found.update(command=command, environment=environment)
        raise SystemExit(0)  # nothing comes back

    monkeypatch.setattr(os, "execve", execve)
    yield found
    if "engine" in found:
        found["engine"].close()


@pytest.fixture
def vllm(monkeypatch):
    """As if a release of vLLM that was tried were installed."""
    installed = {"vllm": Version(f"{TRIED[-1]}.0")}
    monkeypatch.setattr(serving_plugin, "version_of", installed.get)


@pytest.fixture
def no_vllm(monkeypatch):
    monkeypatch.setattr(serving_plugin, "version_of", lambda name: None)


def saved(folder, bridge: str, language: str = "llama") -> str:
    model, processor = tiny_model(bridge, language)
    model.save_pretrained(folder / "model", processor=processor)
    return str(folder / "model")


def serve(*arguments: str):
    return CliRunner().invoke(app, ["serve", *arguments])


@pytest.mark.usefixtures("no_vllm")
def test_our_engine_where_there_is_no_vllm(started, tmp_path):
    result = serve(saved(tmp_path, "mlp"), "--port", "8123", "--max-images", "2", "--max-megapixels", "0.5")
    assert result.exit_code == 0, result.output
    engine = started["engine"]
    assert started["at"] == ("127.0.0.1", 8123) and engine.names == ["model"]
    assert engine.limits == Limits(max_images=2, max_pixels=500_000)
    assert "http://127.0.0.1:8123/v1 serves model" in result.stderr


@pytest.mark.usefixtures("no_vllm")
def test_further_bridges(started, tmp_path):
    folder = tiny_bridge_folder(tmp_path, "mlp")
    result = serve(str(folder), "--name", "base", "--bridge", f"again={folder}")
    assert result.exit_code == 0, result.output
    assert started["engine"].names == ["base", "base:again"]


@pytest.mark.usefixtures("vllm")
def test_vllm_where_it_can_serve_the_model(started, tmp_path):
    folder = saved(tmp_path, "qformer")
    result = serve(folder, "--media-folder", str(tmp_path), "--dtype", "float32", "--", "--max-model-len", "512")
    assert result.exit_code == 0, result.output
    command = started["command"]
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", folder]
    options = dict(zip(command[5::2], command[6::2]))
    assert options == {
        "--host": "127.0.0.1", "--port": "8000", "--served-model-name": "model", "--dtype": "float32",
        "--middleware": "vlbridge.serving.serving_server.CheckedRequests", "--max-model-len": "512",
        "--limit-mm-per-prompt": '{"image": 8}', "--override-generation-config": '{"temperature": 0}',
        "--allowed-local-media-path": str(tmp_path.resolve()),
    }  # fmt: skip
    limits = json.loads(started["environment"][LIMITS_VARIABLE])
    assert Limits(**limits) == Limits(media_folder=str(tmp_path))


@pytest.mark.usefixtures("vllm")
def test_arguments_of_vllm_without_a_model_are_not_the_model(started, monkeypatch, tmp_path):
    folder = saved(tmp_path, "mlp")
    monkeypatch.setattr("vlbridge.inference.default_model", lambda: folder)
    assert serve("--", "--enforce-eager", "--seed", "1").exit_code == 0
    assert started["command"][4] == folder and started["command"][-3:] == ["--enforce-eager", "--seed", "1"]


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(("bridge", "language"), [("perceiver", "llama"), ("qformer", "t5")])
def test_what_vllm_can_not_serve(bridge, language, started, tmp_path):
    """`auto` takes our engine and says why; `--engine vllm` is an error in one line."""
    folder = saved(tmp_path, bridge, language)
    result = serve(folder)
    assert result.exit_code == 0 and "not with vLLM: vLLM can't serve" in result.stderr and "engine" in started
    started["engine"].close()
    result = serve(folder, "--engine", "vllm")
    assert result.exit_code == 1 and "--engine transformers" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.usefixtures("vllm")
def test_bridges_by_name_are_refused_by_vllm(started, tmp_path):
    folder = str(tiny_bridge_folder(tmp_path, "mlp"))
    result = serve(folder, "--engine", "vllm", "--bridge", f"b={folder}")
    assert result.exit_code == 1 and "vLLM keeps one bridge per server" in result.stderr
    assert serve(folder, "--bridge", f"b={folder}").exit_code == 0 and "engine" in started


def test_vllm_that_is_missing_or_too_old(monkeypatch, started, tmp_path):
    folder = saved(tmp_path, "mlp")
    for installed, said in ((None, "vLLM is not installed"), (Version("0.9.2"), "0.9.2 is installed, which is older")):
        monkeypatch.setattr(serving_plugin, "version_of", lambda name, version=installed: version)
        result = serve(folder, "--engine", "vllm")
        assert result.exit_code == 1 and said in result.stderr
    assert serve(folder).exit_code == 0
    assert serving.vllm_problem() is not None and "engine" in started


@pytest.mark.usefixtures("no_vllm")
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--bridge", "name"], 2, "expected NAME=FOLDER"),
        (["--bridge", "a=b", "--bridge", "a=c"], 2, "twice"),
        (["--bridge", "a=/nowhere/at/all"], 1, "cannot load"),
        (["--media-folder", "/nowhere/at/all"], 2, "is no folder"),
        (["--device", "abacus"], 2, "--device is 'abacus'"),
        (["--", "--enforce-eager"], 2, "no argument '--enforce-eager' without vLLM"),
    ],
)
def test_wrong_command_lines(arguments, code, said, started, tmp_path):
    result = serve(saved(tmp_path, "mlp"), *arguments)
    assert result.exit_code == code and said in result.stderr and not started
    assert "Traceback" not in result.output
