import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent))  # tests share `tiny` and `hub_server`
sys.path.insert(1, str(Path(__file__).parents[1] / "examples"))


def pytest_addoption(parser):
    # here, not in tests/parity: options are only taken from the topmost conftest
    parser.addoption("--parity-root", default=None, help="Folder of official cases, DIR/<family>/<case>/meta.json.")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine: this process' client uses it, logged in as `me`, with an empty cache in `tmp_path`."""
    from hub_server import LocalHub

    server = LocalHub()
    server.connect(monkeypatch, tmp_path / "hf_home")
    yield server
    from huggingface_hub import close_session

    close_session()
    server.close()
