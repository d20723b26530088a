"""Reading any checkpoint file safely, writing models shard by shard, leaving nothing half-written."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from vlbridge.convert.convert_files import TensorFiles, write_tensors, written_whole
from vlbridge.convert.convert_tables import ConversionError


TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(True)}


def write(path, layout: str):
    if layout == "safetensors":
        save_file(TENSORS, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    if layout == "legacy":
        torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    elif layout == "training":
        torch.save({"epoch": 1, "model_state_dict": TENSORS, "optimizer_state_dict": {"lr": 0.1}}, path)
    elif layout == "folder":
        path.mkdir()
        save_file({"a": TENSORS["a"]}, path / "one.safetensors")
        save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, path / "two.safetensors")
        where = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        torch.save(TENSORS, path)
    return path


@pytest.mark.parametrize("layout", ["safetensors", "zip", "legacy", "training", "folder"])
def test_every_layout_gives_the_same_tensors(layout, tmp_path):
    files = TensorFiles(write(tmp_path / "weights", layout))
    assert files.shapes == {"a": (2, 3), "b": (4,), "c": ()}
    assert files.dtypes == {name: tensor.dtype for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        assert torch.equal(files.read(name), tensor)


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    "content, message",
    [
        (Harmful(), "read safely"),
        ({"a": Harmful()}, "read safely"),
        ([torch.ones(1)], "holds a list"),
        ({"a": "text"}, "'a' is a str"),
        ({}, "no tensors"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content, message, tmp_path, capsys):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ConversionError, match=message):
        TensorFiles(tmp_path / "weights.pt")
    assert "must not run" not in capsys.readouterr().out


def test_torchscript_says_what_to_do(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "clip.pt")
    with pytest.raises(ConversionError, match="openai/clip-vit-large-patch14"):
        TensorFiles(tmp_path / "clip.pt")


def test_a_truncated_file_is_refused(tmp_path):
    for layout in ("safetensors", "zip"):
        path = write(tmp_path / layout, layout)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ConversionError, match=path.name):
            TensorFiles(path)


@pytest.mark.parametrize("shard_bytes", [10**6, 24])
def test_shards_read_back(shard_bytes, tmp_path):
    alive = []

    def read(name):
        alive.append(name)
        return TENSORS[name]

    entries = [(name, tuple(tensor.shape), tensor.dtype, partial(read, name)) for name, tensor in TENSORS.items()]
    assert write_tensors(tmp_path, entries, shard_bytes) == 24 + 8 + 1
    assert alive == list(TENSORS)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard_bytes > 24 else 2)
    files = TensorFiles(tmp_path)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in TENSORS.items())


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), written_whole(tmp_path / "model") as folder:
        (folder / "model.safetensors").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with written_whole(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match="holds a model already"), written_whole(tmp_path / "model"):
        pass
    with pytest.raises(ConversionError, match="is a file"), written_whole(tmp_path / "model" / "config.json"):
        pass
