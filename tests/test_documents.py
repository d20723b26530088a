"""The documents for contributors: links lead somewhere, every file is listed, and the example of a family works."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from test_readme import blocks_of, check_targets

from vlbridge import __version__


ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(path.name for path in ROOT.glob("*.md"))
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")
EXAMPLE = """
import torch, vlbridge
from tiny import LANGUAGE, VISION, tiny_image, tiny_tokenizer
from transformers import AutoModel

assert vlbridge.__file__.startswith({package!r})
model, processor = vlbridge.compose(
    VISION["clip"](), LANGUAGE["llama"](), "average", tokenizer=tiny_tokenizer(), num_visual_tokens=5
)
images = [tiny_image(0), tiny_image(1)]
inputs = processor(images=images, text=["<image>a", "bc<image>"], padding=True, return_tensors="pt")
assert (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist() == [5, 5]
labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
model(**inputs, labels=labels).loss.backward()
assert {{name for name, weight in model.named_parameters() if weight.grad is not None}} == {{
    "bridge.projection.weight", "bridge.projection.bias"
}}
before = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)
model.save_pretrained("full")
after = AutoModel.from_pretrained("full").generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)
assert torch.equal(before, after)
classifier, _ = vlbridge.FAMILIES["average"].classifier_class.from_bridge(model, num_labels=3)
assert classifier(pixel_values=inputs["pixel_values"]).logits.shape == (2, 3)
assert torch.equal(classifier.bridge.projection.weight, model.bridge.projection.weight)
"""


def package_folders() -> dict[str, Path]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    pairs = (line.split("=") for line in setup["options"]["package_dir"].strip().splitlines())
    return {name.strip(): ROOT / folder.strip() for name, folder in pairs}


def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub gives to a file's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    wrong = []
    for target, anchor in LINK.findall((ROOT / name).read_text(encoding="utf-8")):
        path = ROOT / (target or name)
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            wrong.append(f"{target}#{anchor}")
    assert not wrong


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name):
    for target in re.findall(r"`make ([\w.-]+)[^`]*`", (ROOT / name).read_text(encoding="utf-8")):
        check_targets(name, [target])


def test_every_module_has_its_line():
    """ARCHITECTURE.md lists the modules of each folder: all of them, and no others."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for folder in (
        "zoo",
        "configuration",
        "processing",
        "modeling",
        "convert",
        "training",
        "evaluation",
        "inspection",
        "serving",
        "cli",
    ):
        section = re.search(rf"^### {folder}/ .*?(?=^##)", text, re.MULTILINE | re.DOTALL).group()
        listed = re.findall(r"^\| `(\w+\.py)` \|", section, re.MULTILINE)
        found = {path.name for path in (ROOT / folder).glob("*.py")} - ({"__init__.py"} if folder != "zoo" else set())
        assert sorted(listed) == sorted(found), folder


def test_the_example_of_a_family_works(tmp_path):
    """Its modules, put into a copy of the package, and its line in the registry are all that it takes."""
    package = tmp_path / "site"
    for name, folder in package_folders().items():
        target = package.joinpath(*name.split("."))
        target.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.py"):
            shutil.copy2(path, target)
    blocks = [block.code for block in blocks_of(ROOT / "CONTRIBUTING.md") if block.language == "python"]
    *modules, entry = [code.removeprefix("# ").partition("\n") for code in blocks]
    for path, _, code in modules:
        (package / "vlbridge" / path).write_text(code, encoding="utf-8")
    assert entry[0] == "zoo/families.py"
    registry = package / "vlbridge" / "families.py"
    imports = "".join(f"from .{path.removesuffix('.py').replace('/', '.')} import *\n" for path, _, _ in modules)
    text = registry.read_text(encoding="utf-8")
    changed = text.replace("\n\n@dataclass", f"\n{imports}\n\n@dataclass", 1)
    changed = changed.replace("    for family in (\n", f"    for family in (\n        {entry[2].strip()},\n", 1)
    assert changed.count("average") >= 3
    registry.write_text(changed, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(ROOT / "tests")])}
    code = EXAMPLE.format(package=str(package))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_changelog_tells_of_this_version():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    released = [heading for heading in headings[1:] if re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", heading)]
    assert released == headings[1:]
    assert "dev" in __version__ or released[0].startswith(f"{__version__} ")


def test_pre_commit_runs_the_locked_ruff():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (revision,) = [repo["rev"] for repo in config["repos"] if repo["repo"].endswith("/ruff-pre-commit")]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pin,) = [line for line in lines if not line.startswith("#") and Requirement(line).name == "ruff"]
    assert pin == f"ruff=={revision.removeprefix('v')}"


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_issue_forms_have_what_github_requires(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "config.yml":
        assert isinstance(form["blank_issues_enabled"], bool)
        return
    assert form["name"] and form["description"] and form["body"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    for field in form["body"]:
        assert field["attributes"].get("value" if field["type"] == "markdown" else "label")
