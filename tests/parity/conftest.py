"""`pytest tests/parity --parity-root DIR` runs every case in `DIR/<family>/<case>`, of whichever families there are
some.

A folder without a case, cases of an unknown family and cases that lack files are errors before any test runs. Tests
that no case is for are left out, and the last lines say how many cases of which family ran.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import PIL
import pytest
from packaging.version import Version


if TYPE_CHECKING:
    import torch

DEFAULT_ROOT = Path(__file__).parent / "cases"

# What a case must have beside its meta.json: files of every case, and those of its family.
FILES = ["inputs.safetensors", "outputs.safetensors", "images"]
FAMILY_FILES: dict[str, Callable[[dict], list[str]]] = {
    "blip": lambda meta: ["caption.pth", "itm.pth", "bert-base-uncased"],
    "blip2": lambda meta: ["checkpoint.pth", "vit.pth", "bert-base-uncased"] + ["llm"] * ("llm_config" in meta),
    "llava": lambda meta: (
        ["checkpoint", "clip_vision_tower"] + ["base_llm"] * (meta.get("checkpoint_layout") == "lora")
    ),
    "openflamingo": lambda meta: ["checkpoint.pt", "clip_open_clip.pt", "base_lm", "tokenizer_base"],
}


@dataclass
class Case:
    """One official model with its inputs and outputs.

    Args:
        family: Which of `FAMILY_FILES` it is of.
        folder: Where it lies.
        meta: What `meta.json` says.
    """

    family: str
    folder: Path
    meta: dict

    @property
    def name(self) -> str:
        return f"{self.family}/{self.folder.name}"

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        return load(self.folder / "inputs.safetensors")

    @cached_property
    def outputs(self) -> dict[str, torch.Tensor]:
        return load(self.folder / "outputs.safetensors")

    @property
    def tolerance(self) -> dict[str, float]:
        """As recorded with the official outputs, fp32."""
        recorded = self.meta["tolerance"]
        return {"atol": recorded["fp32_atol"], "rtol": recorded["fp32_rtol"]}

    @property
    def tags(self) -> list[str]:
        """Names of the batches: `inputs` are `<tag>.<name>`."""
        return sorted({name.split(".")[0] for name in self.inputs if name.endswith((".lang_x", ".input_ids"))})

    @staticmethod
    def same_pixels(found: torch.Tensor, official: torch.Tensor) -> bool:
        """Whether pixels differ by at most one grey level of 255; all official code normalises with CLIP's std.

        The cases hold the pixels of Pillow 13. Older releases resized pictures that are higher than wide in another
        order of passes, so that some pixels differ by up to nine levels.

        Args:
            found: Normalised pixels, `(..., 3, height, width)`.
            official: What they should be.
        """
        std = found.new_tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        levels = 1 if Version(PIL.__version__) >= Version("13") else 10
        return found.shape == official.shape and ((found - official).abs() * std).max().item() < 1.01 * levels / 255


def load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file  # here: a folder that is refused need not wait for PyTorch

    return load_file(path)


# ---------------------------------------------------------------------- the folder


def folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def find_cases(root: Path) -> list[Case]:
    """All cases in a folder. What else lies there (`README.md`, `manifests`) is not read.

    Raises:
        pytest.UsageError: If there is no case, one of an unknown family, or one that lacks files.
    """
    if not root.is_dir():
        raise pytest.UsageError(f"--parity-root: there is no folder {root}.")
    known = ", ".join(FAMILY_FILES)
    found, wrong = [], []
    for family in folders_in(root):
        if family.name not in FAMILY_FILES:
            if any((folder / "meta.json").is_file() for folder in folders_in(family)):
                wrong.append(f"{family}: no such family. Known are {known}.")
            continue
        for folder in folders_in(family):
            try:
                meta = json.loads((folder / "meta.json").read_text())
            except FileNotFoundError:
                wrong.append(f"{folder}: it has no meta.json.")
                continue
            except ValueError as error:
                wrong.append(f"{folder}: meta.json is not JSON: {error}.")
                continue
            missing = [name for name in FILES + FAMILY_FILES[family.name](meta) if not (folder / name).exists()]
            if missing:
                wrong.append(f"{folder}: it has no {', '.join(missing)}.")
            found.append(Case(family.name, folder, meta))
    if wrong:
        raise pytest.UsageError("--parity-root: " + "\n".join(wrong))
    if not found:
        names = ", ".join(path.name for path in folders_in(root)) or "none"
        raise pytest.UsageError(
            f"--parity-root: {root} holds no case. Expected {root}/<family>/<case>/meta.json, where <family> is one of "
            f"{known}; its folders: {names}."
        )
    return found


# ---------------------------------------------------------------------- pytest's hooks


cases_key, root_key = pytest.StashKey[list[Case]](), pytest.StashKey[Path]()


def pytest_configure(config):
    config.stash[root_key] = Path(config.getoption("--parity-root") or DEFAULT_ROOT)
    config.stash[cases_key] = find_cases(config.stash[root_key])


def pytest_generate_tests(metafunc):
    """A test module's `FAMILY` names the family whose cases its `case` fixture runs over; where there is a function
    `applies(case, fixtures)` it says which of them a test with these fixtures is about."""
    if "case" in metafunc.fixturenames:
        found = [case for case in metafunc.config.stash[cases_key] if case.family == metafunc.module.FAMILY]
        if hasattr(metafunc.module, "applies"):
            found = [case for case in found if metafunc.module.applies(case, metafunc.fixturenames)]
        metafunc.parametrize("case", found, ids=[case.folder.name for case in found], indirect=True, scope="module")


def pytest_collection_modifyitems(config, items):
    """Leave out what pytest makes of a test without cases: a skipped one."""
    without = []
    for item in items:
        if item.path.parent == Path(__file__).parent and "case" in item.fixturenames:
            case = item.callspec.params["case"]
            if isinstance(case, Case):
                item.user_properties.append(("parity_case", case.name))
            else:
                without.append(item)
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


def pytest_terminal_summary(terminalreporter, config):
    reports = [report for kind in ("passed", "failed", "error") for report in terminalreporter.getreports(kind)]
    ran = {value for report in reports for name, value in report.user_properties if name == "parity_case"}
    found = [case.name for case in config.stash[cases_key]]
    counts = []
    for family in FAMILY_FILES:
        names = {name for name in found if name.startswith(f"{family}/")}
        counts.append(f"{family} {len(names & ran)} of {len(names)}")
    terminalreporter.write_line(f"parity cases that ran, of those in {config.stash[root_key]}: {', '.join(counts)}")


@pytest.fixture(scope="module")
def case(request) -> Case:
    return request.param


@pytest.fixture(autouse=True)
def placeholders_may_be_generated(monkeypatch):
    """Ours never generate `<image>`. The official code knows of no placeholder, and takes its row for a token."""
    from vlbridge.modeling.modeling_generation import NeverGenerated

    monkeypatch.setattr(NeverGenerated, "__call__", lambda self, input_ids, scores: scores)
