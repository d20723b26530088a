import datasets
import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """What is read here is cached beside the other temporary files."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before
    datasets.enable_progress_bars()


@pytest.fixture(autouse=True)
def _own_index(tmp_path, monkeypatch):
    """Indices of pictures are kept beside the other temporary files."""
    monkeypatch.setenv("VLBRIDGE_CACHE", str(tmp_path / "vlbridge_cache"))
