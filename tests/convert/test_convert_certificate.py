"""Certificates: a changed tensor is noticed, also if it was split or fused, and the results are described."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from vlbridge.certificate import CERTIFICATE, card_section
from vlbridge.convert.convert_assembly import Conversion
from vlbridge.convert.convert_certificate import Checks, Comparison, certify
from vlbridge.convert.convert_files import TensorFiles
from vlbridge.convert.convert_runs import compare_outputs, fixed_image
from vlbridge.convert.convert_sources import resized
from vlbridge.convert.convert_tables import ConversionError, Fuse, Rename, Reshape, Split, SplitZeroKeyBias, plan
from vlbridge.files import sha256_of


TABLE = [
    Rename("a", "x"),
    Split("qkv", ("q", "k", "v")),
    Fuse(("up", "gate"), "fused"),
    Reshape("scalar", "vector", (), (1,)),
    SplitZeroKeyBias("bias", ("q_bias", "v_bias")),
    Rename("table", "rows"),
]
SOURCE = {
    "a": torch.arange(6.0).reshape(2, 3),
    "qkv": torch.arange(12.0).reshape(6, 2),
    "up": torch.ones(2, 2),
    "gate": torch.zeros(2, 2),
    "scalar": torch.tensor(3.0),
    "bias": torch.tensor([1.0, 2, 0, 0, 3, 4]),
    "table": torch.ones(3, 2, dtype=torch.bfloat16),
}


@pytest.fixture
def written(tmp_path):
    """A conversion with every kind of rule, the tensors that its file should hold, and the folder for it."""
    save_file(SOURCE, tmp_path / "source.safetensors")
    files = TensorFiles(tmp_path / "source.safetensors")
    pieces = {name: (files, piece, None) for name, piece in plan(TABLE, SOURCE).items()}
    pieces["rows"] = (*pieces["rows"][:2], resized(5))
    conversion = Conversion(None, pieces, None, checkpoint=files)
    (tmp_path / "out").mkdir()
    return conversion, {name: conversion.load(name) for name in pieces}, tmp_path / "out"


def compare_back(conversion, written):
    comparison = Comparison(conversion)
    comparison.add(written)
    return comparison.result()


def certified(conversion, folder):
    with Checks(conversion) as checks:
        checks.file(folder / "model.safetensors")
        return certify(conversion, folder, checks)


def test_all_tensors_are_found_again(written):
    conversion, tensors, folder = written
    save_file(tensors, folder / "model.safetensors")
    found = compare_back(conversion, TensorFiles(folder))
    assert (found["source_tensors"], found["changed_on_purpose"]) == (6, 1)


@pytest.mark.parametrize("name", ["x", "k", "fused", "vector", "q_bias", "v_bias", "rows"])
def test_a_changed_tensor_is_noticed(written, name):
    conversion, tensors, folder = written
    tensors[name] = tensors[name].clone()
    tensors[name].reshape(-1)[-1] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError, match="not what was written"):
        compare_back(conversion, TensorFiles(folder))


def test_files_are_compared_as_they_come(written):
    """Targets of one source that lie in two files are compared when both are written; a missing file is noticed."""
    conversion, tensors, folder = written
    first = {name: tensors[name] for name in ("x", "q", "v", "v_bias")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in first}
    save_file(first, folder / "one.safetensors")
    save_file(rest, folder / "two.safetensors")
    with Checks(conversion) as checks:
        checks.file(folder / "one.safetensors")
        with pytest.raises(ConversionError, match="were not written"):
            checks.result()
        checks.file(folder / "two.safetensors")
        assert checks.result()["source_tensors"] == 6
        assert checks.inputs["source.safetensors"]["source.safetensors"]["sha256"] == sha256_of(
            folder.parent / "source.safetensors"
        )
    tensors["k"] = tensors["k"] + 1
    save_file({name: tensors[name] for name in rest}, folder / "two.safetensors")
    with Checks(conversion) as checks:
        checks.file(folder / "one.safetensors")
        checks.file(folder / "two.safetensors")
        with pytest.raises(ConversionError, match="qkv was read back"):
            checks.result()


def test_what_is_written_down(written, monkeypatch):
    conversion, tensors, folder = written
    save_file(tensors, folder / "model.safetensors")
    (folder / "README.md").write_text("# A model\n")
    conversion.notes = [f"see {folder}/model.safetensors, and owner/name on the Hub"]
    conversion.run = lambda given: [{"what": "logits", "shape": [1], "largest_difference": 2e-6, "largest_value": 1.0}]
    certificate = certified(conversion, folder)
    assert certificate == json.loads((folder / CERTIFICATE).read_text())
    assert str(folder) not in json.dumps(certificate)
    assert certificate["notes"] == ["see model.safetensors, and owner/name on the Hub"]
    assert certificate["outputs"]["model.safetensors"]["sha256"] == sha256_of(folder / "model.safetensors")
    assert certificate["tensors"]["rows"] == {
        "shape": [5, 2],
        "dtype": "bfloat16",
        "from": "source.safetensors",
        "changed": True,
    }
    card = (folder / "README.md").read_text()
    assert (
        card.startswith("# A model\n")
        and card_section(certificate) in card
        and "| logits | largest difference 2e-06 |" in card
    )
    # too large to be run: the certificate says so
    monkeypatch.setattr("vlbridge.convert.convert_certificate.RUN_BYTES", 100)
    assert "the limit is 100" in certified(conversion, folder)["checks"][1]["why"]


def test_a_run_that_fails(written):
    """A source that can't be run is converted all the same; an exported model must run."""
    conversion, tensors, folder = written
    save_file(tensors, folder / "model.safetensors")

    def run(given):
        raise TypeError(f"no patch_size in {folder}/processor_config.json")

    conversion.run = run
    found = certified(conversion, folder)["checks"][1]
    assert "no patch_size in processor_config.json" in found["why"]
    conversion.direction = ("vlbridge", "elsewhere")
    with pytest.raises(ConversionError, match="can't be run"):
        certified(conversion, folder)


def test_differences_beyond_rounding_are_refused():
    ours = torch.tensor([1.0, -10.0])
    assert compare_outputs(ours, ours + 1e-3, "logits")["largest_difference"] == pytest.approx(1e-3, rel=1e-2)
    for theirs in (ours + 1, torch.full((2,), torch.nan)):
        with pytest.raises(ConversionError, match="logits differ"):
            compare_outputs(ours, theirs, "logits")


def test_the_fixed_image_is_fixed():
    image = fixed_image()
    assert image.size == (96, 64) and image.mode == "RGB"
    assert [image.getpixel(place) for place in ((0, 0), (95, 0), (0, 63))] == [(0, 0, 0), (255, 0, 127), (0, 255, 127)]
