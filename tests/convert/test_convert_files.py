"""Checkpoint files are read safely; models are written shard by shard, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlbridge.convert import convert_assembly, convert_blip
from vlbridge.convert.convert_files import TensorFiles
from vlbridge.convert.convert_tables import ConversionError
from vlbridge.convert.convert_writing import FINISHED, finished_shards, output_folder, write_tensors
from vlbridge.files import sha256_of


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


@pytest.mark.core
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
def test_files_that_are_not_checkpoints_are_refused(content, message, tmp_path, capsys):
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
    with pytest.raises(RuntimeError), output_folder(tmp_path / "model") as folder:
        (folder / "model.safetensors").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with output_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match="holds a model already"), output_folder(tmp_path / "model"):
        pass
    with pytest.raises(ConversionError, match="is a file"), output_folder(tmp_path / "model" / "config.json"):
        pass


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize("key", [None, "0" * 64])
def test_permissions_follow_the_umask(mask, key, tmp_path, monkeypatch):
    """As with any new file; the umask itself is never changed, as other threads may be creating files."""
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")
            with output_folder(tmp_path / "model", key) as folder:
                write_tensors(folder, entries([]), 1)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~mask
    assert set(modes.values()) == {0o666 & ~mask} and len(modes) == 4


# ---------------------------------------------------------------------- interruptions


def entries(read: list[str], stop: str | None = None):
    """Arguments for `write_tensors`: three tensors of 24, 8 and 1 bytes; loading `stop` interrupts the run."""

    def give(name):
        if name == stop:
            raise KeyboardInterrupt
        read.append(name)
        return TENSORS[name]

    return [(name, tuple(tensor.shape), tensor.dtype, partial(give, name)) for name, tensor in TENSORS.items()]


def interrupt(output: Path, key: str) -> Path:
    with pytest.raises(KeyboardInterrupt, match="2 finished files stay in"), output_folder(output, key) as folder:
        write_tensors(folder, entries([], stop="c"), 1)
    assert not output.exists()
    return folder


@pytest.mark.parametrize("damage", [None, "bits", "length", "record", "half"])
def test_an_interrupted_run_is_resumed(damage, tmp_path):
    """Finished shards are kept, and written again only if they have changed since."""
    folder = interrupt(tmp_path / "model", "0" * 64)
    first = folder / "model-00001-of-00003.safetensors"
    assert sorted(finished_shards(folder)) == ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"]
    if damage == "bits":
        first.write_bytes(first.read_bytes()[:-1] + b"x")
    elif damage == "length":
        first.write_bytes(first.read_bytes()[:-1])
    elif damage == "record":
        (folder / FINISHED).write_text("[")
    else:
        (folder / "model-00003-of-00003.safetensors.part").write_text("half")
    read = []
    with output_folder(tmp_path / "model", "0" * 64) as folder:
        write_tensors(folder, entries(read), 1)
        (folder / "config.json").write_text("{}")
    assert read == {None: ["c"], "half": ["c"], "record": ["a", "b", "c"]}.get(damage, ["a", "c"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not list((tmp_path / "model").glob(".*")) and not list((tmp_path / "model").glob("*.part"))
    files = TensorFiles(tmp_path / "model")
    assert all(torch.equal(files.read(name), tensor) for name, tensor in TENSORS.items())


def test_other_inputs_start_from_scratch(tmp_path):
    interrupt(tmp_path / "model", "0" * 64)
    read = []
    with output_folder(tmp_path / "model", "1" * 64) as folder:
        write_tensors(folder, entries(read), 1)
    assert read == ["a", "b", "c"]


def test_an_error_leaves_nothing_to_resume(tmp_path):
    with pytest.raises(RuntimeError), output_folder(tmp_path / "model", "0" * 64) as folder:
        write_tensors(folder, entries([]), 1)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_two_runs_do_not_write_to_one_folder(tmp_path):
    with output_folder(tmp_path / "model", "0" * 64) as folder:
        with pytest.raises(ConversionError, match="Another process"), output_folder(tmp_path / "model", "0" * 64):
            pass
        (folder / "config.json").write_text("{}")
    assert (tmp_path / "model" / "config.json").exists()


BLIP = Path(__file__).parents[1] / "parity" / "cases" / "blip" / "blip_caption_itm"
HEADS = {"vision_config": {"num_attention_heads": 4}, "text_config": {"num_attention_heads": 4}}
KILLED = """
import json, os, signal, sys
from functools import partial
from vlbridge.convert import convert_assembly, convert_blip
from vlbridge.convert.convert_writing import finished_shards

def write(folder, entries, **options):
    def dying(name, read):
        if len(finished_shards(folder)) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return read()
    entries = [(*entry[:3], partial(dying, entry[0], entry[3])) for entry in entries]
    convert_files_write(folder, entries, 40_000, **options)

convert_files_write, convert_assembly.write_tensors = convert_assembly.write_tensors, write
convert_blip(sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no SIGKILL")
def test_a_killed_conversion_is_resumed(tmp_path, monkeypatch):
    """A real converter in its own process is killed while it writes its fourth shard."""
    bert = BLIP / "bert-base-uncased"
    arguments = [BLIP / "itm.pth", tmp_path / "model", bert, json.dumps(HEADS)]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".model-") and left.name.endswith(".partial")
    before = {path.name: path.stat().st_mtime_ns for path in left.glob("*.safetensors")}
    assert len(before) == 3

    # other settings make another conversion
    other = {**HEADS, "text_config": {"num_attention_heads": 2}}
    monkeypatch.setattr(convert_assembly, "write_tensors", partial(write_tensors, shard_bytes=40_000))
    convert_blip(BLIP / "itm.pth", tmp_path / "other", bert, other)
    assert left.is_dir()
    convert_blip(BLIP / "itm.pth", tmp_path / "model", bert, HEADS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "model").glob("*.safetensors")}
    assert len(after) > 3 and {name: after[name] for name in before} == before
    certificate = json.loads((tmp_path / "model" / "conversion.json").read_text())
    for name in after:
        assert certificate["outputs"][name]["sha256"] == sha256_of(tmp_path / "model" / name)
        assert sha256_of(tmp_path / "model" / name) == sha256_of(tmp_path / "other" / name)


# ---------------------------------------------------------------------- what is written


@pytest.mark.core
def test_safetensors_reads_what_is_written(tmp_path):
    """With dtypes of several sizes in one file, too."""
    given = {**TENSORS, "d": torch.arange(3, dtype=torch.int8), "\u00e9": torch.ones(2, 2, dtype=torch.float64).T}
    write_tensors(
        tmp_path,
        [(name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor) for name, tensor in given.items()],
    )
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == given.keys() and all(torch.equal(loaded[name], given[name]) for name in given)
    assert finished_shards(tmp_path)["model.safetensors"]["sha256"] == sha256_of(tmp_path / "model.safetensors")


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path):
    for shape, dtype in (((7,), torch.float32), ((6,), torch.float64)):
        with pytest.raises(ConversionError, match="a is .* expected"):
            write_tensors(tmp_path, [("a", shape, dtype, lambda: torch.ones(6))])


# ---------------------------------------------------------------------- what torch.save can hold


@pytest.mark.parametrize("zipped", [True, False])
def test_views_of_one_storage(zipped, tmp_path):
    storage = torch.arange(24.0)
    given = {"all": storage, "part": storage[3:9].view(2, 3), "turned": storage.view(4, 6).T, "steps": storage[::5],
             "parameter": torch.nn.Parameter(torch.ones(2)), "none": torch.tensor(2.0)}  # fmt: skip
    torch.save(given, tmp_path / "views.pt", _use_new_zipfile_serialization=zipped)
    files = TensorFiles(tmp_path / "views.pt")
    for name, tensor in given.items():
        assert files.shapes[name] == tuple(tensor.shape) and torch.equal(files.read(name), tensor), name


@pytest.mark.parametrize("zipped", [True, False])
def test_a_small_file_that_claims_to_be_large_is_refused(zipped, tmp_path):
    torch.save({"a": torch.ones(1).expand(10**12)}, tmp_path / "bomb.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConversionError, match=r"a is \[1000000000000\] of torch.float32, but its storage has 4 bytes"):
        TensorFiles(tmp_path / "bomb.pt")


def test_one_flipped_bit_is_found_if_there_are_checksums(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    place = data.index(TENSORS["a"].numpy().tobytes())
    data[place + 9] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    files = TensorFiles(tmp_path / "a.pt")
    assert torch.equal(files.read("b"), TENSORS["b"])
    with pytest.raises(ConversionError, match="a: .*a.pt is damaged"):
        files.read("a")


@pytest.mark.parametrize("content", [{1: torch.ones(1)}, {"a": torch.ones(2).to_sparse()}, {"a": torch.ones(2) * 1j}])
def test_other_contents_are_named(content, tmp_path):
    torch.save({"b": torch.ones(1), **content}, tmp_path / "odd.pt")
    if torch.is_complex(next(iter(content.values()))):
        assert TensorFiles(tmp_path / "odd.pt").dtypes["a"] == torch.complex64  # refused where it would be a weight
    else:
        with pytest.raises(ConversionError, match="odd.pt"):
            TensorFiles(tmp_path / "odd.pt")
