"""The documents: links lead somewhere, what is quoted or computed is so, and the example of a family works."""

from __future__ import annotations

import ast
import configparser
import dataclasses
import importlib
import importlib.util
import json
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
from vlbridge.catalogue import CATALOGUE


ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = sorted(path.name for path in ROOT.glob("*.md")) + PAGES
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


def script(path: str):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    generated = {ROOT / "docs" / page for page in script("docs/hooks.py").GENERATED}
    for target, anchor in LINK.findall((ROOT / name).read_text(encoding="utf-8")):
        path = Path(os.path.normpath((ROOT / name).parent / target)) if target else ROOT / name
        if path not in generated and (not path.exists() or (anchor and anchor not in anchors_of(path))):
            wrong.append(f"{target}#{anchor}")
    assert not wrong


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name):
    for target in re.findall(r"`make ([\w.-]+)[^`]*`", (ROOT / name).read_text(encoding="utf-8")):
        check_targets(name, [target])


@pytest.mark.parametrize("name", ["README.md", *PAGES])
def test_pictures_are_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text):
        assert ((ROOT / name).parent / target).is_file(), target


def test_every_page_is_in_the_navigation():
    hooks = script("docs/hooks.py")
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- [^#\n]*: ([\w/-]+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted({*(name.removeprefix("docs/") for name in PAGES), *hooks.GENERATED})


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def shown_text(node: ast.AST) -> str | None:
    """A text of the code as a message shows it, with `...` for values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    return None


def test_messages_of_the_troubleshooting_page_are_in_the_code():
    texts = []
    for folder in package_folders().values():
        for path in folder.glob("*.py"):
            texts += [shown_text(node) or "" for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    code = "\n".join(texts)
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `(.+?)`(?: \((\w+)\))? \|", page, re.MULTILINE)
    messages = [message for message, library in quoted if not library]  # those of other libraries name it
    assert len(messages) > 50
    # a value at the beginning or the end of a message may be outside of the text
    assert not [message for message in messages if message.strip(". ") not in code]


def test_every_command_is_in_the_reference():
    hooks = script("docs/hooks.py")
    text = hooks.cli_reference()
    shutil.rmtree(hooks.assemble())
    for name in ("caption", "ask", "train", "evaluate", "data check", "convert llava", "convert NAME OUTPUT", "push"):
        assert f"\n## vlbridge {name}\n" in text
    assert text.count("```text\nUsage: vlbridge ") == text.count("\n## ")


def test_every_recipe_and_every_key_is_in_the_reference():
    from vlbridge.training import training_recipes as recipes

    text = script("docs/hooks.py").recipe_reference()
    for name in recipes.shipped():
        assert f"\n### {name}\n" in text
    for kind in (recipes.Recipe, recipes.DataRecipe, recipes.TextRecipe, recipes.SamplesRecipe):
        for key in dataclasses.fields(kind):
            assert f"| `{key.name.rstrip('_')}` |" in text


def test_public_names_are_in_the_reference():
    """Of the names that packages export, all but those that the reference describes with their base."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    listed = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith("::: ")}
    exported = set()
    for package in ("vlbridge", "vlbridge.training", "vlbridge.convert", "vlbridge.evaluation", "vlbridge.inspection"):
        exported |= set(importlib.import_module(package).__all__)
    like_their_base = {name for name in exported if "Classification" in name}
    left = exported - listed - like_their_base
    assert left == {
        "FAMILIES", "QFormerBlip2PreTrainingProcessor", "__version__", "default_model", "example_photograph",
        "example_picture", "BakeoffError", "TaskError", "task_names",
    }  # fmt: skip


def test_the_table_of_memory_is_that_of_the_results():
    results = json.loads((ROOT / "benchmarks/results/memory.json").read_text(encoding="utf-8"))
    table = script("benchmarks/memory.py").table(results["releases"])
    assert table in (ROOT / "docs/hardware.md").read_text(encoding="utf-8")
    assert {row["release"] for row in results["releases"]} == set(CATALOGUE)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (?:OpenFlamingo|BLIP-2|LLaVA)[^|]+(?: \| [\d.]+)+ \|$", readme, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        numbers = line.partition(" | ")[2]
        assert any(row.endswith(numbers) for row in table.splitlines()), line


def test_memory_counts_what_official_manifests_hold():
    """Parameters of parts, against the shapes of official checkpoints."""
    memory, manifests = script("benchmarks/memory.py"), ROOT / "tests/convert/manifests"
    rows = {
        row["release"]: row for row in json.loads((ROOT / "benchmarks/results/memory.json").read_text())["releases"]
    }
    indexes = [json.loads(path.read_text()) for path in manifests.glob("index_*.json")]
    counts = {name: entry["n_elements"] for index in indexes for name, entry in index.items()}
    llava = rows["liuhaotian/llava-v1.5-7b"]
    assert llava["bridge_parameters"] == counts["llava_v1.5_7b.stage1_mm_projector_bin"]
    assert llava["bridge_parameters"] + llava["language_parameters"] == counts["llava_v1.5_7b.checkpoint"]
    vicuna = rows["blip2_vicuna_instruct/vicuna7b"]
    total = sum(vicuna[f"{part}_parameters"] for part in ("vision", "bridge", "language"))
    assert total == pytest.approx(counts["blip2_instruct_vicuna7b.full_model"], rel=1e-3)  # which counts buffers too
    flamingo = rows["openflamingo/OpenFlamingo-9B-vitl-mpt7b"]
    trained = counts["openflamingo_9b_vitl_mpt7b.checkpoint_frozenemb"]  # without the rows of the special tokens
    assert flamingo["bridge_parameters"] == pytest.approx(trained, rel=1e-4)
    small = memory.row_of(CATALOGUE["blip2/pretrain_vitL"])
    assert small == rows["blip2/pretrain_vitL"]
    assert small["training"] == 2 * small["vision_parameters"] + 16 * small["bridge_parameters"]


def test_the_pictures_are_drawn_by_their_script():
    draw = script("docs/draw.py")
    for theme in draw.COLOURS:
        assert (ROOT / f"docs/images/bridges-{theme}.svg").read_text(encoding="utf-8") == draw.bridges(theme)
    terminal = (ROOT / "docs/images/terminal.svg").read_text(encoding="utf-8")
    guide = (ROOT / "docs/guides/caption-and-ask.md").read_text(encoding="utf-8")  # whose commands a test runs
    for shown in re.findall(r"xml:space=\"preserve\">([^<]+)</text>", terminal)[:6]:
        assert shown in guide


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
