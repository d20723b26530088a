"""Wheel and sdist: complete, installable, and what is installed runs from anywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vlbridge.assets import SHIPPED


ROOT = Path(__file__).parent.parent
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")
FOLDERS = dict(
    (part.strip() for part in line.split("=")) for line in SETUP["options"]["package_dir"].strip().splitlines()
)
LISTS = [SETUP["options"]["install_requires"], *dict(SETUP["options.extras_require"]).values()]
REQUIREMENTS = [
    Requirement(line) for text in LISTS for line in text.strip().splitlines() if not line.startswith("vlbridge[")
]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    output = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(output.glob("*.whl")), next(output.glob("*.tar.gz"))


def test_every_package_is_named():
    """A forgotten package imports from a checkout and is missing from the wheel."""
    folders = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/__init__.py")}
    folders |= {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("zoo/*/__init__.py")}
    assert set(FOLDERS.values()) == folders
    assert set(SETUP["options"]["packages"].split()) == set(FOLDERS)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_every_requirement_has_a_lower_bound(requirement):
    """Without one, an installer that is asked for the lowest versions takes some that never worked."""
    assert any(specifier.operator == ">=" for specifier in requirement.specifier)


def test_the_lock_pins_every_requirement_within_its_range():
    """For every Python and system, exactly one version: `make lock` was run after setup.cfg was changed."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for requirement in REQUIREMENTS:
        for python in PYTHONS:
            for system in ("linux", "darwin"):
                here = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": system}
                found = [
                    specifier.version
                    for pin in pins
                    if pin.name == requirement.name.replace("_", "-")
                    and (pin.marker is None or pin.marker.evaluate(here))
                    for specifier in pin.specifier
                ]
                assert len(found) == 1, f"{requirement.name}: {found} on {system}, Python {python}"
                assert requirement.specifier.contains(found[0], prereleases=True), f"{requirement}: {found[0]}"


def test_the_lock_names_no_place():
    """Packages come from wherever the user's pip finds them."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"://|--|(^|\s)/|@", text)


def test_the_wheel_holds_every_file(built):
    wheel, _ = built
    held = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).iterdir():
            if path.is_file() and path.suffix in (".py", ".png"):
                assert f"{package.replace('.', '/')}/{path.name}" in held
    recipes = (ROOT / "training" / "recipes").glob("*.yaml")
    assert {f"vlbridge/training/recipes/{path.name}" for path in recipes} <= held
    tasks = (ROOT / "evaluation" / "tasks").glob("*.yaml")
    assert {f"vlbridge/evaluation/tasks/{path.name}" for path in tasks} <= held
    assert "vlbridge/modeling/everyday_words.json" in held
    assert "vlbridge/assets/photograph.jpg" in held
    for name in SHIPPED.values():
        bridge = ROOT / "zoo" / "assets" / name
        assert {f"vlbridge/assets/{name}/{path.name}" for path in bridge.iterdir()} <= held
    assert [name for name in held if name.startswith("vlbridge/model_cards/") and name.endswith(".md")] == [
        "vlbridge/model_cards/template.md"
    ]
    assert not [name for name in held if name.startswith(("tests", "benchmarks", "notebooks"))]


def test_the_sdist_holds_what_tests_need(built):
    _, sdist = built
    held = {name.split("/", 1)[-1] for name in tarfile.open(sdist).getnames()}
    assert {"LICENSE", "README.md", "Makefile", "setup.cfg", "pyproject.toml", "tests/tiny.py"} <= held
    assert "cli/cli_app.py" in held
    assert {"constraints.txt", "noxfile.py", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", ".ci/run"} <= held


def test_the_installed_wheel_runs_from_another_folder(built, tmp_path):
    wheel, _ = built
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = (
        "import vlbridge, vlbridge.training.training_packing; print(vlbridge.__file__); print(vlbridge.default_model())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    module, bridge = done.stdout.split()
    assert module.startswith(str(site)) and (Path(bridge) / "config.json").exists()
    assert (site / "bin" / "vlbridge").exists()
    done = subprocess.run(
        [sys.executable, "-m", "vlbridge_cli", "--help"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "caption" in done.stdout
