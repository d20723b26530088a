"""Every notebook runs from top to bottom, in a folder of its own.

python tests/test_notebooks.py            # writes what the cells print into the notebooks
python tests/test_notebooks.py quickstart # into this one
"""

import os
import re
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import nbformat
import pytest
from hub_server import LocalHub
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels with the running interpreter, whichever kernels are installed for Jupyter."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a kernel of its own, whose Hub is a local one: it is logged in there as `me`.

    Args:
        path: The notebook.
        folder: Where its cells run; empty.

    Returns:
        The notebook with the outputs of this run.

    Raises:
        CellExecutionError: A cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=540, kernel_manager_class=ThisInterpreter, resources={"metadata": {"path": str(folder)}}
    )
    with closing(LocalHub()) as hub, tempfile.TemporaryDirectory() as home:
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        return client.execute(env=hub.environment(home, **threads))


@pytest.fixture
def own_jupyter(tmp_path, monkeypatch):
    """Keep kernels away from the user's settings and runtime files."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        folder = tmp_path / name.lower()
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, own_jupyter):
    folder = tmp_path / "here"
    folder.mkdir()
    try:
        execute(path, folder)
    except CellExecutionError as error:
        pytest.fail(f"{path.name}: {ESCAPES.sub('', str(error))}", pytrace=False)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_tidy(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"], "committed with an error"
    assert not [output for output in outputs if output.get("name") == "stderr"], "committed with warnings or bars"
    assert str(Path.home()) not in "".join(nbformat.writes(notebook)), "committed with someone's paths"


def test_the_list_is_complete():
    listed = re.findall(
        r"^\| \[([\w.]+)\]\(\1\) \| \S", (NOTEBOOKS[0].parent / "README.md").read_text(), flags=re.MULTILINE
    )
    assert sorted(listed) == [path.name for path in NOTEBOOKS]


def test_a_cell_that_raises_is_reported(tmp_path, own_jupyter):
    path = tmp_path / "broken.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(path, tmp_path)


def write_outputs(path: Path) -> None:
    """Run a notebook and save it with its outputs, without what libraries write to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(path, Path(folder))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = nbformat.read(path, as_version=4).metadata
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for notebook_path in NOTEBOOKS:
        if not sys.argv[1:] or notebook_path.stem in sys.argv[1:]:
            write_outputs(notebook_path)
