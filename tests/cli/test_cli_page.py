"""`vlbridge app`: what reaches the page, and what is refused. Tests of the page are in tests/zoo/test_app_page.py."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from tiny import tiny_model
from typer.testing import CliRunner

from vlbridge.cli import app


def page(*arguments: str):
    return CliRunner().invoke(app, ["app", *map(str, arguments)])


@pytest.fixture
def opened(monkeypatch):
    """What would be opened: models are loaded, the page is not made."""
    found: dict = {}

    class Page:
        def __init__(self, bridges, limits):
            found.update(bridges=bridges, limits=limits)
            self.blocks = SimpleNamespace(block_thread=lambda: found.update(blocked=True))

    def launch(shown, host, port, block):
        if port == 1:
            raise OSError("it is taken")
        found.update(host=host, port=port)
        return f"http://{host}:{port}/"

    monkeypatch.setitem(sys.modules, "vlbridge.app_page", SimpleNamespace(Page=Page, launch=launch))
    yield found
    for bridge in found.get("bridges", ()):
        bridge.close()


@pytest.fixture
def models(tmp_path):
    for name in ("mlp", "perceiver"):
        model, processor = tiny_model(name)
        model.save_pretrained(tmp_path / name, processor=processor)
    return [tmp_path / "mlp", tmp_path / "perceiver"]


def test_models_and_limits_reach_the_page(opened, models):
    result = page(
        *models, "--host", "0.0.0.0", "--port", "8123", "--device", "cpu", "--max-megapixels", "0.5",
        "--max-mebibytes", "2", "--max-new-tokens", "7", "--max-seconds", "3.5", "--max-waiting", "9",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stderr.endswith("http://0.0.0.0:8123/ shows mlp, perceiver; Ctrl+C ends it\n")
    assert [bridge.name for bridge in opened["bridges"]] == ["mlp", "perceiver"] and opened["blocked"]
    limits = opened["limits"]
    assert (limits.max_pixels, limits.max_bytes, limits.max_new_tokens) == (500_000, 2 << 20, 7)
    assert (limits.max_seconds, limits.max_waiting) == (3.5, 9)
    assert all(bridge.engine.limits == bridge.limits == limits for bridge in opened["bridges"])


def test_what_is_refused(opened, models, tmp_path):
    for arguments, code, said in [
        (["me/other/third"], 1, "cannot load 'me/other/third': no such folder"),
        ([models[0], models[0]], 2, f"{models[0]} is given twice"),
        ([models[0], "--device", "nowhere"], 2, "--device is 'nowhere'"),
        ([models[0], "--device", "cpu", "--port", "1"], 1, "cannot listen at 127.0.0.1:1: it is taken"),
        ([models[0], "--write-space", tmp_path / "new"], 1, "is a folder here, which a Space can't reach"),
        (["--write-space", tmp_path], 1, "is not empty"),
    ]:
        result = page(*arguments)
        assert (result.exit_code, said in result.stderr) == (code, True), result.stderr


def test_without_gradio_one_line_says_what_to_do(monkeypatch, models):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vlbridge.app_page", raising=False)
    result = page(models[0])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and "gradio" in result.stderr
    assert result.stderr.endswith("pip install 'vlbridge[app]'\n")
