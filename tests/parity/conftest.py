"""`pytest tests/parity --parity-root DIR` runs every case in `DIR/<family>/<case>/meta.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


DEFAULT_ROOT = Path(__file__).parent / "cases"


@dataclass
class Case:
    """One official model with its inputs and outputs.

    Args:
        folder: Where it lies.
        meta: What `meta.json` says.
    """

    folder: Path
    meta: dict

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    @cached_property
    def outputs(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "outputs.safetensors")

    @property
    def tolerance(self) -> dict[str, float]:
        """As recorded with the official outputs, fp32."""
        recorded = self.meta["tolerance"]
        return {"atol": recorded["fp32_atol"], "rtol": recorded["fp32_rtol"]}

    @property
    def tags(self) -> list[str]:
        """Names of the batches: `inputs` are `<tag>.<name>`."""
        return sorted({name.split(".")[0] for name in self.inputs if name.endswith((".lang_x", ".input_ids"))})


def cases(config, family: str) -> list[Case]:
    root = Path(config.getoption("--parity-root") or DEFAULT_ROOT)
    found = sorted((root / family).glob("*/meta.json"))
    return [Case(path.parent, json.loads(path.read_text())) for path in found]


def pytest_generate_tests(metafunc):
    """A test module's `FAMILY` names the folder whose cases its `case` fixture runs over; where there is a function
    `applies(case, fixtures)` it says which of them a test with these fixtures is about."""
    if "case" in metafunc.fixturenames:
        found = cases(metafunc.config, metafunc.module.FAMILY)
        assert found, f"no cases of {metafunc.module.FAMILY} in {metafunc.config.getoption('--parity-root')}"
        if hasattr(metafunc.module, "applies"):
            found = [case for case in found if metafunc.module.applies(case, metafunc.fixturenames)]
        metafunc.parametrize("case", found, ids=[case.folder.name for case in found], indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(request) -> Case:
    return request.param
