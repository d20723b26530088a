"""transformers' own common test suites: fetched from its sdist at the installed version and cached.

They are never copied into this repository.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import stand_ins
import tiny
import torch
import transformers

from vlbridge.families import FAMILIES
from vlbridge.files import cache_dir


PACKAGE = "transformers_tests"  # the folder is `tests` in the sdist, a name that every project has


def fetch() -> Path:
    """Folder that holds the suites as a package; downloaded with pip the first time.

    Raises:
        RuntimeError: The sdist can't be downloaded, or has no tests.
    """
    version = transformers.__version__
    target = cache_dir() / f"transformers-{version}-tests"
    if (target / PACKAGE).is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        temporary = Path(temporary)
        archive = download(version, temporary)
        with tarfile.open(archive) as tar:
            root = f"transformers-{version}/tests/"
            tar.extractall(temporary, [m for m in tar.getmembers() if m.name.startswith(root)], filter="data")
        suites = temporary / root
        if not (suites / "test_modeling_common.py").is_file():
            raise RuntimeError(
                f"{archive.name} holds no tests/test_modeling_common.py; expected transformers' test suites."
            )
        ready = temporary / "ready"
        # The suites import "transformers from its sources" by executing these two: empty, they find the installed one.
        for package in (ready / PACKAGE, ready / "src" / "transformers"):
            package.mkdir(parents=True)
            (package / "__init__.py").touch()
        shutil.copytree(suites, ready / PACKAGE, dirs_exist_ok=True)
        try:
            ready.rename(target)
        except OSError:  # another process was faster
            if not (target / PACKAGE).is_dir():
                raise
    return target


def download(version: str, folder: Path) -> Path:
    """Let pip download the sdist of transformers.

    Args:
        version: Which one.
        folder: Where to.

    Raises:
        RuntimeError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", "--dest", str(folder), f"transformers=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = sorted(folder.glob("transformers-*.tar.gz"))
    if done.returncode or not archives:
        raise RuntimeError(f"pip could not download the sdist of transformers {version}:\n{done.stderr.strip()}")
    return archives[0]


def load(name: str):
    """Import a module of the suites.

    Args:
        name: Such as `"test_modeling_common"`.
    """
    if "TRANSFORMERS_TINY_MODEL_PATH" not in os.environ:
        raise RuntimeError("TRANSFORMERS_TINY_MODEL_PATH is not set; run tests/conformance/run_conformance.py.")
    folder = str(fetch())
    if folder not in sys.path:
        sys.path.append(folder)
        stand_ins.install(Path(folder) / PACKAGE)
    return importlib.import_module(f"{PACKAGE}.{name}")


def save_tiny_models(folder: Path) -> None:
    """Write a tiny model and processor of every family where the pipeline suite looks for them, and a picture.

    Args:
        folder: Becomes `TRANSFORMERS_TINY_MODEL_PATH`.
    """
    summary = {}
    for name, family in FAMILIES.items():
        torch.manual_seed(0)
        model, processor = tiny.tiny_model(name)
        place = folder / family.config_class.model_type / family.model_class.__name__
        model.save_pretrained(place)
        processor.save_pretrained(place)
        summary[family.model_class.__name__] = {
            "tokenizer_classes": [type(processor.tokenizer).__name__],
            "processor_classes": [type(processor.image_processor).__name__],
        }
    tiny.tiny_image(0, (64, 48)).save(folder / "picture.png")
    reports = folder / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    (reports / "tiny_model_summary.json").write_text(json.dumps(summary))


def load_pipeline_suite():
    """The pipeline suite, with the stand-ins' tests of single pipelines."""
    suite = load("test_pipeline_mixin")
    for entry in suite.pipeline_test_mapping.values():
        if isinstance(entry["test"], str):  # earlier releases have the class itself
            entry["test"] = entry["test"].replace("tests.", f"{PACKAGE}.", 1)
    return suite
