import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))  # tests share `tiny`


def pytest_addoption(parser):
    # here, not in tests/parity: options are only taken from the topmost conftest
    parser.addoption("--parity-root", default=None, help="Folder of official cases, DIR/<family>/<case>/meta.json.")
